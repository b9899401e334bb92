"""Options: their types and ranges, values that are computed, and messages about what is wrong with them."""

from odcheap.config import resolvers  # noqa: F401 - registers the values that the config computes
