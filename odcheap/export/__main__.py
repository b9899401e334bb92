"""Runs the export command: `python -m odcheap.export JOB_DIR`."""

from odcheap.export.command import main

raise SystemExit(main())
