"""Other ways to compute the same, for the benchmark to hold against those that the rest of the house uses."""

import copy

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from odcheap.layers.cheap_conv import CheapConv, shift_taps
from odcheap.layers.fuse import dense_kernel


def composed(pair: CheapConv, x: Tensor) -> Tensor:
    """A 3 x 3 pair as one dense convolution, composed anew; gradients reach both of its parts."""
    return F.conv2d(x, dense_kernel(pair), None, pair.pointwise.stride, padding=1)


def shift_by_slices(x: Tensor) -> Tensor:
    """A 3 x 3 shift: each of the nine sets of channels is copied from its window of the padded image."""
    padded, (_, channels, height, width) = F.pad(x, (1, 1, 1, 1)), x.shape
    whole, moved = channels // 9 * 9, x.clone()
    for t in range(9):
        window = padded[:, t:whole:9, t // 3 : t // 3 + height, t % 3 : t % 3 + width]
        moved[:, t:whole:9] = window
    return moved


class SlicedPair(nn.Module):
    """A 3 x 3 Shift pair as runtimes could best have it without convolving: pad, ten slices, one concatenation.

    The concatenation leaves the channels sorted by their tap; the 1 x 1 convolution's weights are sorted alike.
    """

    def __init__(self, pair: CheapConv):
        super().__init__()
        self.pointwise = copy.deepcopy(pair.pointwise)
        channels = self.pointwise.in_channels
        whole = channels // 9 * 9
        self.parts = [(t, slice(t, whole, 9)) for t in range(9)] + [(4, slice(whole, channels))]
        order = torch.cat([torch.arange(channels)[part] for _, part in self.parts])
        self.pointwise.weight.data = pair.pointwise.weight.data[:, order]

    def forward(self, x: Tensor) -> Tensor:
        height, width = x.shape[2:]
        padded = F.pad(x, (1, 1, 1, 1))
        moved = [padded[:, part, t // 3 : t // 3 + height, t % 3 : t % 3 + width] for t, part in self.parts]
        return self.pointwise(torch.cat(moved, dim=1))


def shift_by_gather(x: Tensor) -> Tensor:
    """A 3 x 3 shift: one `gather` from the padded image."""
    padded, (_, channels, height, width) = F.pad(x, (1, 1, 1, 1)), x.shape
    taps = shift_taps(channels, (3, 3), x.device)
    rows = torch.arange(height, device=x.device)[:, None] + (taps // 3)[:, None, None]
    columns = torch.arange(width, device=x.device) + (taps % 3)[:, None, None]
    index = (rows * (width + 2) + columns).flatten(1).expand(len(x), -1, -1)
    return padded.flatten(2).gather(2, index).view_as(x)


def compile_blocks(network: nn.Module) -> None:
    """Compiles, in place, every block of the network's stages: names of weights stay as they are."""
    torch._dynamo.config.recompile_limit = 64  # one code, several shapes: beyond the limit it runs uncompiled
    for stage in network.modules():
        if isinstance(stage, nn.Sequential) and not isinstance(stage, CheapConv):
            for block in stage:
                if any(True for _ in block.children()):
                    block.compile()
