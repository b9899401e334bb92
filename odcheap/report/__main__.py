"""Runs `python -m odcheap.report`."""

from odcheap.utils.signals import exit_on_signals
from odcheap.utils.threads import shorten_waiting

shorten_waiting()
with exit_on_signals():
    from odcheap.report.command import main

raise SystemExit(main())
