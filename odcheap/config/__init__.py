"""The options of a run: their types and ranges, values that are computed, and messages about wrong options."""

from odcheap.config import resolvers  # noqa: F401 - registers the values that the config computes
