"""A depth-wise convolution that is trained as a sum of branches, and folded into one convolution afterwards.

X. Ding, X. Zhang, N. Ma, J. Han, G. Ding, J. Sun, "RepVGG: Making VGG-style ConvNets great again", CVPR 2021; for
depth-wise convolutions Z. Liu, Z. Hao, K. Han, Y. Tang, Y. Wang, "GhostNetV3: Exploring the training strategies for
compact models", arXiv 2404.11202, 2024.
"""

import contextlib
from collections.abc import Generator
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from odcheap.layers.shift import Pair

if TYPE_CHECKING:
    from odcheap.layers.cheap_conv import Window


class RepDepthwise(nn.Module):
    """A depth-wise convolution that is a sum of three branches in training.

    With batch norms N1, N2, N3 of their own, the branches are a depth-wise K x K convolution, a depth-wise 1 x 1
    convolution, and the identity:

        training: y = N1(K * x) + N2(k * x) + N3(x)

    In eval mode each batch norm is an affine function, so the sum is one depth-wise K x K convolution with a bias.
    That convolution is computed then, and `fold` returns it as a module. With a stride, the 1 x 1 convolution and the
    identity take every other pixel; RepVGG has no identity there.

    Args:
        channels: The number of channels, C.
        window: The kernel size, stride, padding, dilation and padding mode of the K x K convolution.

    Attributes:
        keeps_branches: Whether the branches are computed in eval mode too; see `keep_branches`.

    Shape:
        (N, C, H, W) -> (N, C, H', W') with the size of a convolution's output.

    Example:
        >>> from odcheap.layers.cheap_conv import Window
        >>> operator = RepDepthwise(16, Window()).eval()
        >>> images = torch.rand(1, 16, 8, 8)
        >>> folded = operator.fold()
        >>> folded
        Conv2d(16, 16, kernel_size=(3, 3), stride=(1, 1), padding=(1, 1), groups=16)
        >>> torch.allclose(folded(images), operator(images))
        True
    """

    description = "depth-wise in 3 branches"

    def __init__(self, channels: int, window: "Window"):
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
        """The number of parameters of the folded convolution: its kernel, and a bias for each channel."""
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
        """Returns the kernel (C, 1, kh, kw) and the bias (C,) of the equal convolution, for eval mode."""
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
        """Returns the weights of the K x K branch with which the folded kernel is the given one.

        Args:
            kernel: The folded kernel, (C, 1, kh, kw); NaN stays NaN.
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
    """Returns what a batch norm does in eval mode, as a * x + b in each channel.

    Returns:
        a and b, (C,) each, computed in 32 bits or more.
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
    """A context manager in which each `RepDepthwise` of a network sums its branches in eval mode too.

    Otherwise it computes one folded convolution in eval mode.
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
