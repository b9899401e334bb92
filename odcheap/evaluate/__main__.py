"""Runs `python -m odcheap.evaluate`."""

from odcheap.utils.signals import exit_on_signals

with exit_on_signals():
    from odcheap.evaluate.arguments import parse_arguments

    parse_arguments()  # answers `--help` before PyTorch is imported
    from odcheap.evaluate.command import main

raise SystemExit(main())
