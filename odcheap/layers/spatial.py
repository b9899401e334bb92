"""Spatial operators that keep the number of channels: a shift, and a depth-wise convolution trained as three branches.

`Window` has the options of a convolution that say how it moves over an image.
"""

import contextlib
from collections.abc import Generator
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

Pair = tuple[int, int]  # rows, columns


def to_pair(value: int | tuple[int, ...]) -> Pair:
    """Returns (rows, columns) for an option of a convolution, such as its stride, which may be one number for both."""
    if isinstance(value, int):
        return value, value
    rows, columns = value
    return rows, columns


@dataclass(frozen=True)
class Window:
    """The options of an `nn.Conv2d` except channels, groups and bias: they say how it moves over an image.

    Each pair of numbers is (rows, columns).
    """

    kernel_size: Pair = (3, 3)
    stride: Pair = (1, 1)
    padding: Pair | str = (1, 1)
    dilation: Pair = (1, 1)
    padding_mode: Literal["zeros", "reflect", "replicate", "circular"] = "zeros"

    @classmethod
    def from_conv(cls, conv: nn.Conv2d) -> "Window":
        """Returns a `Window` with the kernel size, stride, padding, dilation and padding mode of a convolution."""
        padding = conv.padding if isinstance(conv.padding, str) else to_pair(conv.padding)
        size, stride, dilation = to_pair(conv.kernel_size), to_pair(conv.stride), to_pair(conv.dilation)
        return cls(size, stride, padding, dilation, conv.padding_mode)

    @property
    def taps(self) -> int:
        """The number of entries of the kernel in one channel, such as 9 for 3 x 3."""
        return self.kernel_size[0] * self.kernel_size[1]

    def make_conv(self, in_channels: int, out_channels: int, groups: int = 1, bias: bool = False) -> nn.Conv2d:
        """Returns a new convolution with this kernel size, stride, padding, dilation and padding mode."""
        size, stride, padding, dilation = self.kernel_size, self.stride, self.padding, self.dilation
        shape = (in_channels, out_channels, size, stride, padding, dilation, groups, bias)
        return nn.Conv2d(*shape, padding_mode=self.padding_mode)


class Shift2d(nn.Module):
    """Moves each channel by a fixed offset; pixels from outside the image are zero. It has no parameters.

    With k x k offsets, dilation d and C channels, output pixel (h, w) of channel `c < k*k*floor(C / (k*k))` is the
    input pixel in row `h + d*(floor(c/k) mod k - floor(k/2))` and column `w + d*(c mod k - floor(k/2))`. The remaining
    channels are copied. Source: Wu et al., "Shift: a zero FLOP, zero parameter alternative to spatial convolutions",
    2018; the order of the offsets is that of the 2019 code of "Training convolutional neural networks with cheap
    convolutions and online distillation".

    It is computed as a depth-wise convolution with one-hot kernels, which on a CPU is faster than copying slices. The
    result is exact in every dtype, and the gradient is the opposite shift.

    Args:
        kernel_size: The side k of the window of offsets, or (rows, columns).
        dilation: The distance d between neighboring offsets in pixels, or (rows, columns).
        stride: The distance between neighboring outputs in pixels, or (rows, columns).
        padding: The same as in `nn.Conv2d`. None pads so much that the size of the image stays the same with stride 1.
        padding_mode: The same as in `nn.Conv2d`.

    Shape:
        (N, C, H, W) or (C, H, W) -> the same number of channels, with H / stride rows and W / stride columns (rounded
        up) if `padding` is None.

    Example:
        >>> x = torch.arange(9.0).view(1, 1, 3, 3).expand(1, 9, 3, 3)
        >>> Shift2d()(x)[0, 0]  # the first channel reads from above on the left
        tensor([[0., 0., 0.],
                [0., 0., 1.],
                [0., 3., 4.]])
    """

    zero_macs = True  # it runs as a convolution but only moves data: MAC counters leave it out
    description = "shift"

    def __init__(
        self,
        kernel_size: int | Pair = 3,
        dilation: int | Pair = 1,
        stride: int | Pair = 1,
        padding: int | Pair | str | None = None,
        padding_mode: str = "zeros",
    ):
        super().__init__()
        self.kernel_size, self.dilation, self.stride = to_pair(kernel_size), to_pair(dilation), to_pair(stride)
        self.padding, self.padding_mode = padding, padding_mode
        self.border = [side for dim in (1, 0) for side in self._padding_sides(dim)]  # left, right, top, bottom
        self.kernels: Tensor | None = None

    def _padding_sides(self, dim: int) -> Pair:
        """Returns the number of pixels added before and after the rows (dim 0) or the columns (dim 1)."""
        k, d = self.kernel_size[dim], self.dilation[dim]
        if self.padding is None:
            return d * (k // 2), d * (k - 1 - k // 2)
        if isinstance(self.padding, str):
            total = d * (k - 1) if self.padding == "same" else 0
            return total // 2, total - total // 2
        side = to_pair(self.padding)[dim]
        return side, side

    def forward(self, x: Tensor) -> Tensor:
        x, padding = self._pad(x)
        kernels = self._one_hot_kernels(x)
        return F.conv2d(x, kernels, None, self.stride, padding, self.dilation, groups=len(kernels))

    def _pad(self, x: Tensor) -> tuple[Tensor, Pair]:
        """Returns the input, padded if `conv2d` cannot pad it itself, and the padding that `conv2d` still has to do."""
        # `conv2d` pads with zeros only, and the same number of pixels on opposite sides.
        left, right, top, bottom = self.border
        if left == right and top == bottom and self.padding_mode == "zeros":
            return x, (top, left)
        return F.pad(x, self.border, mode="constant" if self.padding_mode == "zeros" else self.padding_mode), (0, 0)

    def _one_hot_kernels(self, x: Tensor) -> Tensor:
        """Returns kernels (C, 1, kh, kw): 1 at the entry that a channel reads, otherwise 0; kept for the next call."""
        kept = self.kernels
        if kept is not None and (len(kept), kept.dtype, kept.device) == (x.shape[-3], x.dtype, x.device):
            return kept
        (rows, columns), channels = self.kernel_size, x.shape[-3]
        entries = rows * columns
        with torch.inference_mode(False):  # kernels of a call in evaluation are used in training too
            channel = torch.arange(channels, device=x.device)
            center = rows // 2 * columns + columns // 2  # for the remaining channels, which are copied
            taps = torch.where(channel < channels // entries * entries, channel % entries, center)
            kernels = F.one_hot(taps, entries).to(x.dtype).view(-1, 1, rows, columns)
        if type(kernels) is Tensor and not torch.compiler.is_compiling():  # tracers use subclasses of Tensor
            self.kernels = kernels
        return kernels

    @property
    def is_plain_3x3(self) -> bool:
        """Whether the GPU kernels can compute this shift: 3 x 3, stride 1, dilation 1, zero padding of 1."""
        options = (self.kernel_size, self.stride, self.dilation, self.border, self.padding_mode)
        return type(self) is Shift2d and options == ((3, 3), (1, 1), (1, 1), [1, 1, 1, 1], "zeros")

    def extra_repr(self) -> str:
        return f"kernel_size={self.kernel_size}, dilation={self.dilation}, stride={self.stride}, border={self.border}"


class RepDepthwise(nn.Module):
    """A depth-wise convolution that is a sum of three branches in training, and one convolution in eval mode.

    The branches are a depth-wise K x K convolution, a depth-wise 1 x 1 convolution, and the identity. Each of them has
    its own batch norm (N1, N2, N3):

        training: y = N1(conv_KxK(x)) + N2(conv_1x1(x)) + N3(x)

    In eval mode each batch norm is an affine function, so that the sum is equal to one depth-wise K x K convolution
    with a bias. The module then computes this convolution, and `fold` returns it. With stride s, the 1 x 1 convolution
    and the identity take every s-th pixel; RepVGG has no identity branch in this case.

    Sources: X. Ding, X. Zhang, N. Ma, J. Han, G. Ding, J. Sun, "RepVGG: Making VGG-style ConvNets great again", CVPR
    2021; for depth-wise convolutions Z. Liu, Z. Hao, K. Han, Y. Tang, Y. Wang, "GhostNetV3: Exploring the training
    strategies for compact models", arXiv 2404.11202, 2024.

    Args:
        channels: The number of channels, C.
        window: The kernel size, stride, padding, dilation and padding mode of the K x K convolution.

    Attributes:
        keeps_branches: False by default. If it is True, the sum of the branches is computed in eval mode too.

    Shape:
        (N, C, H, W) -> (N, C, H', W'), in which H' and W' are those of the K x K convolution.

    Example:
        >>> operator = RepDepthwise(16, Window()).eval()
        >>> images = torch.rand(1, 16, 8, 8)
        >>> folded = operator.fold()
        >>> folded
        Conv2d(16, 16, kernel_size=(3, 3), stride=(1, 1), padding=(1, 1), groups=16)
        >>> torch.allclose(folded(images), operator(images))
        True
    """

    description = "depth-wise in 3 branches"

    def __init__(self, channels: int, window: Window):
        super().__init__()
        self.window, self.keeps_branches = window, False
        self.conv = window.make_conv(channels, channels, groups=channels)
        self.conv_norm = nn.BatchNorm2d(channels)
        self.scale = nn.Conv2d(channels, channels, 1, groups=channels, bias=False)
        self.scale_norm = nn.BatchNorm2d(channels)
        self.identity_norm = nn.BatchNorm2d(channels)

    @property
    def weight(self) -> Tensor:
        """The weights of the K x K branch, (C, 1, kh, kw)."""
        return self.conv.weight

    @property
    def stride(self) -> Pair:
        rows, columns = self.conv.stride
        return rows, columns

    @stride.setter
    def stride(self, value: Pair) -> None:
        self.conv.stride = value

    @property
    def folded_params(self) -> int:
        """The number of parameters of the convolution that `fold` returns: its kernel, and a bias for each channel."""
        return self.conv.weight.numel() + self.conv.out_channels

    def forward(self, x: Tensor) -> Tensor:
        if self.training or self.keeps_branches:
            return self.sum_branches(x)
        return self.conv._conv_forward(x, *self.fold_weights())

    def sum_branches(self, x: Tensor) -> Tensor:
        """Returns the sum (N, C, H', W') of the three branches for an input (N, C, H, W), each with its batch norm."""
        y = self.conv_norm(self.conv(x))
        center = self.select_centers(x, y.shape[-2], y.shape[-1])
        return y + self.scale_norm(self.scale(center)) + self.identity_norm(center)

    def select_centers(self, x: Tensor, rows: int, columns: int) -> Tensor:
        """Returns the input pixels under the center of the kernel, one for each output pixel.

        Args:
            x: The input, (N, C, H, W).
            rows: The height of the output in pixels.
            columns: The width of the output in pixels.

        Returns:
            (N, C, rows, columns).
        """
        # The usual window: an odd kernel whose padding keeps the size.
        (down, right), (size, dilation) = self.stride, (self.window.kernel_size, self.window.dilation)
        padding = self.window.padding
        centered = [d * (k // 2) for k, d in zip(size, dilation, strict=True)]
        is_odd = size[0] % 2 == size[1] % 2 == 1
        if is_odd and (padding == "same" or list(padding) == centered):
            return x if down == right == 1 else x[:, :, ::down, ::right]
        # Any other window: pad as the convolution does, and start at the center of the first kernel.
        mode = "constant" if self.window.padding_mode == "zeros" else self.window.padding_mode
        x = F.pad(x, self.conv._reversed_padding_repeated_twice, mode)
        return x[:, :, centered[0] :: down, centered[1] :: right][:, :, :rows, :columns]

    def fold_weights(self) -> tuple[Tensor, Tensor]:
        """Returns the kernel (C, 1, kh, kw) and the bias (C,) of the convolution that is equal to it in eval mode."""
        scale, bias = affine_of(self.conv_norm)
        point, point_bias = affine_of(self.scale_norm)
        identity, identity_bias = affine_of(self.identity_norm)
        center = self.scale.weight.to(point) * point.view(-1, 1, 1, 1) + identity.view(-1, 1, 1, 1)
        kernel = self.conv.weight.to(scale) * scale.view(-1, 1, 1, 1) + self.pad_center(center)
        bias = bias + point_bias + identity_bias
        return kernel.to(self.conv.weight.dtype), bias.to(self.conv.weight.dtype)

    def pad_center(self, center: Tensor) -> Tensor:
        """Returns kernels (C, 1, kh, kw) that are zero except for their center, which is given as (C, 1, 1, 1)."""
        rows, columns = self.window.kernel_size
        left, top = columns // 2, rows // 2
        return F.pad(center, (left, columns - 1 - left, top, rows - 1 - top))

    def unfold_kernel(self, kernel: Tensor) -> Tensor:
        """Returns the weights (C, 1, kh, kw) of the K x K branch with which `fold` would return the given kernel.

        Args:
            kernel: The kernel of the folded convolution, (C, 1, kh, kw); NaN in it stays NaN.
        """
        scale, _ = affine_of(self.conv_norm)
        others = self.fold_weights()[0].to(scale) - self.conv.weight.to(scale) * scale.view(-1, 1, 1, 1)
        return ((kernel.to(scale) - others) / scale.view(-1, 1, 1, 1)).to(kernel)

    @torch.no_grad()
    def fold(self) -> nn.Conv2d:
        """Returns the depth-wise K x K convolution, with a bias, that computes the same as this module in eval mode."""
        kernel, bias = self.fold_weights()
        conv = self.window.make_conv(self.conv.in_channels, self.conv.out_channels, self.conv.groups, bias=True)
        conv = conv.to(kernel)
        conv.stride = self.conv.stride
        conv.weight.copy_(kernel)
        assert conv.bias is not None
        conv.bias.copy_(bias)
        return conv.train(self.training).requires_grad_(self.conv.weight.requires_grad)


def affine_of(norm: nn.BatchNorm2d) -> tuple[Tensor, Tensor]:
    """Returns the factor and the offset, (C,) each, with which a batch norm in eval mode computes factor * x + offset.

    They are computed in 32 bits or more.
    """
    mean, var = norm.running_mean, norm.running_var
    assert mean is not None
    assert var is not None
    dtype = torch.promote_types(var.dtype, torch.float32)
    mean, var, weight, bias = (t.to(dtype) for t in (mean, var, norm.weight, norm.bias))
    factor = weight * (var + norm.eps).rsqrt()
    return factor, bias - mean * factor


@contextlib.contextmanager
def keep_branches(network: nn.Module) -> Generator[None]:
    """A context manager in which each `RepDepthwise` of a network sums its three branches in eval mode too.

    Outside of it, a `RepDepthwise` computes one equal convolution in eval mode.
    """
    operators = [module for module in network.modules() if isinstance(module, RepDepthwise)]
    before = [operator.keeps_branches for operator in operators]
    for operator in operators:
        operator.keeps_branches = True
    try:
        yield
    finally:
        for operator, value in zip(operators, before, strict=True):
            operator.keeps_branches = value
