"""The fused operators of training steps on channels-last maps, in Triton; none uses atomics or a random order.

A row is one pixel of one image with all its channels. Sums over pixels have two stages: each program writes the sums
of its own chunk of rows, and the kernel that reads them adds them up in a fixed order.
"""

from odcheap.layers.kernels.norm import batch_norm_act
from odcheap.layers.kernels.pair import pair_norm_act
from odcheap.layers.kernels.spatial import depthwise3x3, shift3x3

__all__ = ["batch_norm_act", "depthwise3x3", "pair_norm_act", "shift3x3"]
