"""Runs `python -m odcheap.push`."""

from odcheap.push.command import main

raise SystemExit(main())
