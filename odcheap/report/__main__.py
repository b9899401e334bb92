"""Runs `python -m odcheap.report`."""

from odcheap.utils.performance import shorten_waiting
from odcheap.utils.signals import exit_on_signals

shorten_waiting()
with exit_on_signals():
    from odcheap.report.command import main

raise SystemExit(main())
