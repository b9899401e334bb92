"""Runs the report command: `python -m odcheap.report DIR...`."""

from odcheap.report.command import main

raise SystemExit(main())
