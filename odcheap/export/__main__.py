"""Runs `python -m odcheap.export`."""

from odcheap.utils.performance import shorten_waiting
from odcheap.utils.signals import exit_on_signals

shorten_waiting()
with exit_on_signals():
    from odcheap.export.arguments import parse_arguments

    parse_arguments()  # answers `--help` before PyTorch is imported
    from odcheap.export.command import main

raise SystemExit(main())
