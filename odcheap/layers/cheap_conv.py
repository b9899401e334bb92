"""Convolutions: the shift operator, and the block types a backbone is given.

A block type is called with (in_channels, out_channels, stride) and returns a 3 x 3 convolution without bias. The cheap
ones are pairs: a spatial operator that keeps the channels, then a 1 x 1 convolution that mixes them and carries the
stride, as in the 2019 code. For the conversion of other networks (`convert`) they also offer the spatial operator
alone, for any window: `spatial(channels, window)`, `refusal(channels, window)` where that makes no sense, and
`fit(kernel)`, the pair's weights nearest to a given kernel.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from odcheap.layers import factorize
from odcheap.utils.errors import OptionError

Pair = tuple[int, int]


@dataclass(frozen=True)
class Window:
    """How a convolution slides: all but its channels, in the terms of `nn.Conv2d`."""

    kernel_size: Pair = (3, 3)
    stride: Pair = (1, 1)
    padding: Pair | str = (1, 1)
    dilation: Pair = (1, 1)
    padding_mode: str = "zeros"

    @staticmethod
    def of(conv: nn.Conv2d) -> "Window":
        return Window(conv.kernel_size, conv.stride, conv.padding, conv.dilation, conv.padding_mode)

    @property
    def taps(self) -> int:
        return self.kernel_size[0] * self.kernel_size[1]

    def conv(self, channels: int, groups: int) -> nn.Conv2d:
        """A convolution with this window from `channels` to as many, without bias."""
        k, s, p, d = self.kernel_size, self.stride, self.padding, self.dilation
        return nn.Conv2d(channels, channels, k, s, p, d, groups, bias=False, padding_mode=self.padding_mode)


class Shift2d(nn.Module):
    """Moves each channel by a fixed offset, with zeros from outside the image; (N, C, H, W) -> (N, C, H/s, W/s).

    Channel c < k*k*floor(C / (k*k)) reads from row h + d*(floor(c/k) mod k - floor(k/2)) and column
    w + d*(c mod k - floor(k/2)); the remaining channels are copied. No parameters, no arithmetic. Source: Wu et al.,
    "Shift: a zero FLOP, zero parameter alternative to spatial convolutions", 2018; offsets as in the 2019 code.
    `kernel_size`, `dilation`, `stride` and `padding` may be pairs (rows, columns); `padding` and `padding_mode` are
    `nn.Conv2d`'s, for the size and the border of a convolution that is replaced.
    It runs as a depth-wise convolution with one-hot kernels: exact in every type, with the opposite shift as its
    gradient. On two CPU cores, channels-last, forward and backward, that is 2 to 8 times as fast as copying slices.
    """

    def __init__(
        self,
        kernel_size: int | Pair = 3,
        dilation: int | Pair = 1,
        stride: int | Pair = 1,
        padding: int | Pair | str | None = None,
        padding_mode: str = "zeros",
    ):
        super().__init__()
        self.kernel_size, self.dilation, self.stride = pair(kernel_size), pair(dilation), pair(stride)
        self.padding, self.padding_mode = padding, padding_mode
        self.border = [side for dim in (1, 0) for side in self.sides(dim)]  # left, right, top, bottom
        self.kernels: Tensor | None = None

    def sides(self, dim: int) -> Pair:
        """Pixels added before and after the rows (0) or the columns (1)."""
        k, d = self.kernel_size[dim], self.dilation[dim]
        if self.padding is None:
            return d * (k // 2), d * (k - 1 - k // 2)
        if self.padding == "same":
            return d * (k - 1) // 2, d * (k - 1) - d * (k - 1) // 2
        return (0, 0) if self.padding == "valid" else (pair(self.padding)[dim],) * 2

    def forward(self, x: Tensor) -> Tensor:
        x, padding = self.bordered(x)
        kernels = self.one_hot_kernels(x)
        return F.conv2d(x, kernels, None, self.stride, padding, self.dilation, groups=len(kernels))

    def bordered(self, x: Tensor) -> tuple[Tensor, Pair]:
        """The input with what `conv2d` cannot pad itself, and what it is to pad."""
        left, right, top, bottom = self.border
        if left == right and top == bottom and self.padding_mode == "zeros":
            return x, (top, left)
        return F.pad(x, self.border, mode="constant" if self.padding_mode == "zeros" else self.padding_mode), (0, 0)

    def one_hot_kernels(self, x: Tensor) -> Tensor:
        """(C, 1, kh, kw): a single one where each channel reads from. Kept from call to call."""
        kept = self.kernels
        if kept is not None and (len(kept), kept.dtype, kept.device) == (x.shape[-3], x.dtype, x.device):
            return kept
        rows, columns = self.kernel_size
        with torch.inference_mode(False):  # what is made while evaluating is used in training too
            taps = shift_taps(x.shape[-3], self.kernel_size, x.device)
            made = F.one_hot(taps, rows * columns).to(x.dtype).view(-1, 1, rows, columns)
        if type(made) is Tensor and not torch.compiler.is_compiling():  # no subclass, as tracers have
            self.kernels = made
        return made

    def extra_repr(self) -> str:
        return f"kernel_size={self.kernel_size}, dilation={self.dilation}, stride={self.stride}, border={self.border}"


def pair(value: int | Pair) -> Pair:
    return (value, value) if isinstance(value, int) else tuple(value)


def shift_taps(channels: int, kernel_size: Pair, device: torch.device) -> Tensor:
    """(C,): which entry of its kernel, row by row, each channel of a shift reads; the centre where it is copied."""
    rows, columns = kernel_size
    channel = torch.arange(channels, device=device)
    whole = channels // (rows * columns) * (rows * columns)
    return torch.where(channel < whole, channel % (rows * columns), rows // 2 * columns + columns // 2)


class CheapConv(nn.Sequential):
    """A spatial operator (C -> C), then a 1 x 1 convolution (C -> out_channels) with the stride."""

    def __init__(self, spatial: nn.Module, in_channels: int, out_channels: int, stride: int = 1, bias: bool = False):
        super().__init__()
        self.spatial = spatial
        self.pointwise = nn.Conv2d(in_channels, out_channels, 1, stride, bias=bias)


@dataclass(frozen=True)
class Shift:
    """Shift, then 1 x 1."""

    def __call__(self, in_channels: int, out_channels: int, stride: int = 1) -> nn.Module:
        return CheapConv(Shift2d(), in_channels, out_channels, stride)

    def refusal(self, channels: int, window: Window) -> str | None:
        few = channels < window.taps
        return f"a shift of {window.taps} taps moves none of {channels} channels" if few else None

    def spatial(self, channels: int, window: Window) -> nn.Module:
        return Shift2d(window.kernel_size, window.dilation, window.stride, window.padding, window.padding_mode)

    def fit(self, kernel: Tensor) -> tuple[None, Tensor]:
        return None, factorize.one_tap(kernel, shift_taps(kernel.shape[1], tuple(kernel.shape[2:]), kernel.device))


@dataclass(frozen=True)
class DW:
    """3 x 3 depth-wise convolution, then 1 x 1."""

    def __call__(self, in_channels: int, out_channels: int, stride: int = 1) -> nn.Module:
        return CheapConv(self.spatial(in_channels, Window()), in_channels, out_channels, stride)

    def refusal(self, channels: int, window: Window) -> str | None:
        return None

    def spatial(self, channels: int, window: Window) -> nn.Module:
        return window.conv(channels, groups=channels)

    def fit(self, kernel: Tensor) -> tuple[Tensor, Tensor]:
        return factorize.in_groups(kernel, groups=kernel.shape[1])


@dataclass(frozen=True)
class Group:
    """3 x 3 convolution in groups, then 1 x 1.

    As a backbone's block it raises `OptionError` where `groups` does not divide the channels; in a conversion such a
    layer gets the largest divisor below.
    """

    groups: int = 4

    def __post_init__(self):
        if not isinstance(self.groups, int) or self.groups < 1:
            raise OptionError("block_type.groups", self.groups, "must be a whole number, 1 or more")

    def __call__(self, in_channels: int, out_channels: int, stride: int = 1) -> nn.Module:
        if in_channels % self.groups:
            raise OptionError("block_type.groups", self.groups, f"must divide the layer's {in_channels} channels")
        return CheapConv(self.spatial(in_channels, Window()), in_channels, out_channels, stride)

    def refusal(self, channels: int, window: Window) -> str | None:
        dearer = self.groups > 1 and self.fitting(channels) == 1
        return f"no number of groups up to {self.groups} divides its {channels} channels" if dearer else None

    def fitting(self, channels: int) -> int:
        """The largest divisor of `channels` up to `groups`."""
        return next(g for g in range(min(self.groups, channels), 0, -1) if channels % g == 0)

    def spatial(self, channels: int, window: Window) -> nn.Module:
        return window.conv(channels, groups=self.fitting(channels))

    def fit(self, kernel: Tensor) -> tuple[Tensor, Tensor]:
        return factorize.in_groups(kernel, groups=self.fitting(kernel.shape[1]))


@dataclass(frozen=True)
class Standard:
    """The original convolution, for comparison."""

    def __call__(self, in_channels: int, out_channels: int, stride: int = 1) -> nn.Module:
        return conv3x3(in_channels, out_channels, stride)


Cheap = Shift | DW | Group


def conv3x3(in_channels: int, out_channels: int, stride: int = 1) -> nn.Conv2d:
    return nn.Conv2d(in_channels, out_channels, 3, stride, padding=1, bias=False)
