"""Runs `python -m odcheap.bench`."""

from odcheap.utils.signals import exit_on_signals
from odcheap.utils.threads import shorten_waiting

shorten_waiting()
with exit_on_signals():
    from odcheap.bench.arguments import parse_arguments

    parse_arguments()  # answers `--help` before PyTorch is imported
    from odcheap.bench.command import main

raise SystemExit(main())
