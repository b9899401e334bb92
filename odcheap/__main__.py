"""Runs the command line: `python -m odcheap train ...`."""

from odcheap.cli import main

raise SystemExit(main())
