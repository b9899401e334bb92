"""Runs `python -m odcheap.bench`."""

from odcheap.bench.command import main

raise SystemExit(main())
