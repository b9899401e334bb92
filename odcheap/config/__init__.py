"""The options of a run: their types and ranges, values that are computed, and messages about wrong options."""

from odcheap.config import compose  # noqa: F401 - defines the values that the config computes
