"""The fused operators of the training step on channels-last maps, in Triton; none uses atomics or random order.

Sums over pixels are made in two stages: each program writes those of its own chunk of rows (a row is one pixel of one
image, with all its channels), and what reads them adds them up in a fixed order.
"""

from torch import Tensor, nn
from torch.nn import functional as F

from odcheap.layers.kernels.norm import batch_norm_act
from odcheap.layers.kernels.pair import pair_norm_act
from odcheap.layers.kernels.spatial import depthwise3x3, shift3x3

__all__ = ["batch_norm_act", "depthwise3x3", "pair_norm_act", "pointwise", "shift3x3"]


def pointwise(x: Tensor, conv: nn.Conv2d) -> Tensor:
    """A 1 x 1 convolution as one matrix product; autocast applies as it does to `nn.Linear`.

    Args:
        x: (N, C, H, W), contiguous in channels-last memory format.
        conv: a 1 x 1 convolution C -> O without padding or groups; its stride is taken by slicing first.

    Returns:
        (N, O, ceil(H / stride), ceil(W / stride)), channels-last.
    """
    down, right = conv.stride
    pixels = x[:, :, ::down, ::right].permute(0, 2, 3, 1)
    return F.linear(pixels.contiguous(), conv.weight.flatten(1), conv.bias).permute(0, 3, 1, 2)
