"""Runs `python -m odcheap.report`."""

from odcheap.report.command import main

raise SystemExit(main())
