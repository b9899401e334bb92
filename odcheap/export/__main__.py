"""Runs `python -m odcheap.export`."""

from odcheap.export.command import main

raise SystemExit(main())
