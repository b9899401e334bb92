"""Runs `python -m odcheap.demo`."""

from odcheap.demo.command import main

raise SystemExit(main())
