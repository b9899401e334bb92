"""The fused operators of training steps on channels-last feature maps, in Triton.

A row is one pixel of one image with all its channels. Sums over pixels have two stages: each program writes the sums
of its own chunk of rows, and the next kernel adds up these sums in a fixed order. No kernel uses atomics, so the
results do not depend on the order in which programs run.
"""

from odcheap.layers.kernels.norm import batch_norm_act
from odcheap.layers.kernels.pair import MAX_CHANNELS, MAX_GROUP, PAIR_TYPES, pair_norm_act
from odcheap.layers.kernels.spatial import depthwise3x3, shift3x3

__all__ = ["MAX_CHANNELS", "MAX_GROUP", "PAIR_TYPES", "batch_norm_act", "depthwise3x3", "pair_norm_act", "shift3x3"]
