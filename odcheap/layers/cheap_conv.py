"""Cheap convolutions: a spatial operator that keeps the number of channels, then a 1 x 1 convolution that mixes them.

`CheapConv` is the module with these two operators, called a pair. `BlockType` is the interface of a kind of cheap
convolution; a new kind is a subclass with one method, and a YAML file in `conf/block_type`.
"""

import copy
from dataclasses import dataclass
from typing import Annotated, Any

import torch
from pydantic import Field
from torch import Tensor, nn

from odcheap.layers.norm_act import fused_pair
from odcheap.layers.spatial import RepDepthwise, Shift2d, Window
from odcheap.utils.arguments import check_arguments
from odcheap.utils.errors import OptionError


class CheapConv(nn.Sequential):
    """A cheap convolution: a spatial operator (C -> C channels), then a 1 x 1 convolution (C -> O channels).

    Both are linear. Together they compute the same as one standard convolution with a certain kernel (O, C, kh, kw).
    The module has the attributes of such an `nn.Conv2d` (`in_channels`, `kernel_size`, `stride`, `bias` and so on)
    except `weight`.

    Args:
        spatial: The spatial operator, a module that already has the stride, padding and dilation of `window`.
        in_channels: The number of input channels, C.
        out_channels: The number of output channels, O.
        stride: The stride of the 1 x 1 convolution, which comes after the stride of `window`.
        bias: Whether the 1 x 1 convolution has a bias.
        window: The kernel size, stride, padding and dilation of the convolution that this module replaces; None for
            3 x 3 with stride 1 and padding 1.

    Shape:
        (N, C, H, W) -> (N, O, H', W'), in which H' and W' are those of the replaced convolution.
    """

    def __init__(
        self,
        spatial: nn.Module,
        in_channels: int,
        out_channels: int,
        stride: int = 1,
        bias: bool = False,
        window: Window | None = None,
    ):
        super().__init__()
        self.spatial = spatial
        self.pointwise = nn.Conv2d(in_channels, out_channels, 1, stride, bias=bias)
        # The attributes of the standard convolution that the module replaces.
        self.window = window = window or Window()
        self.in_channels, self.out_channels, self.groups = in_channels, out_channels, 1
        self.kernel_size, self.padding, self.dilation = window.kernel_size, window.padding, window.dilation
        self.stride = (window.stride[0] * stride, window.stride[1] * stride)
        self.padding_mode = window.padding_mode

    @property
    def fusible_parts(self) -> tuple[nn.Module, nn.Module, bool] | None:
        """The parts that a fused kernel, which computes several operators at once, may compute in place of this module.

        It is a tuple: the spatial operator, the 1 x 1 convolution, and True if the spatial operator is a 3 x 3
        `Shift2d` that the kernels can compute. It is None for a subclass of `CheapConv`, or if another module was
        appended, since the forward pass then does more.
        """
        is_shift = isinstance(self.spatial, Shift2d) and self.spatial.is_plain_3x3
        return (self.spatial, self.pointwise, is_shift) if len(self) == 2 and type(self) is CheapConv else None

    @property
    def bias(self) -> Tensor | None:
        return self.pointwise.bias

    def __getattr__(self, name: str) -> Any:
        if name == "weight":
            raise AttributeError(
                "a cheap pair has no `weight`: it has those of `spatial` and `pointwise`; `keep` of `cheapen` leaves "
                "a convolution as it is"
            )
        return super().__getattr__(name)

    def forward(self, input: Tensor) -> Tensor:  # the argument's name is that of `nn.Sequential`
        parts = self.fusible_parts
        fused = None if parts is None else fused_pair(input, *parts)
        return super().forward(input) if fused is None else fused


class BlockType:
    """A kind of convolution; block_type(in_channels, out_channels, stride) makes a 3 x 3 convolution without bias.

    A new kind of cheap convolution is a subclass with the method `make_spatial`, and a YAML file in `conf/block_type`.
    `make_spatial` returns a spatial operator, which must have these properties:

    - It is linear.
    - It computes each output channel from the same input channel only, or it is an `nn.Conv2d`.
    - Its outputs have the size of those of a convolution with the same window (kernel size, stride, padding, dilation).
    - It has its stride in an attribute `stride`. It may have an attribute `description`, which is its name in tables.

    Example:
        >>> class AvgPool(BlockType):
        ...     def make_spatial(self, channels, window):
        ...         return nn.AvgPool2d(window.kernel_size, window.stride, window.padding)
        >>> AvgPool()(16, 32, stride=2)(torch.zeros(1, 16, 8, 8)).shape
        torch.Size([1, 32, 4, 4])
    """

    is_cheap = True  # False for the standard convolution: networks then have their published form

    def make_spatial(self, channels: int, window: Window) -> nn.Module:
        """Returns a new spatial operator: (N, C, H, W) -> (N, C, H', W'), with the output size of a convolution.

        Args:
            channels: The number of channels, C.
            window: The kernel size, stride, padding, dilation and padding mode of the operator.
        """
        raise NotImplementedError

    def reason_to_keep(self, channels: int, window: Window) -> str | None:
        """Returns a reason, a text for the user, why `cheapen` should not replace a convolution; None to replace it.

        Args:
            channels: The number of input channels of the convolution.
            window: The kernel size, stride, padding, dilation and padding mode of the convolution.
        """
        return None

    def factorize(self, kernel: Tensor, pair: CheapConv) -> tuple[Tensor | None, Tensor]:
        """Returns the weights with which a cheap convolution is the least-squares approximation of a given kernel.

        A cheap convolution consists of a spatial operator, which keeps the number of channels, and a 1 x 1 convolution.

        Args:
            kernel: The kernel (O, C, kh, kw) of the convolution that is replaced.
            pair: The cheap convolution that replaces it, with its initial weights; it is not changed.

        Returns:
            A tuple of two tensors: the weights of the spatial operator, with the shape of its `weight`, and the weights
            (O, C, 1, 1) of the 1 x 1 convolution. The first tensor is None if the spatial operator has no weights to
            set. If an element of the first tensor is NaN, the caller must leave this weight at its initial value.
        """
        if isinstance(pair.spatial, nn.Conv2d):
            return factorize_grouped(kernel, pair.spatial.groups)
        return None, fit_pointwise(kernel, spatial_kernel(pair.spatial, kernel, pair.window))

    def make_pair(self, in_channels: int, out_channels: int, window: Window, bias: bool = False) -> CheapConv:
        """Returns a cheap convolution that can replace a convolution; its spatial operator has the stride.

        Args:
            in_channels: The number of input channels.
            out_channels: The number of output channels.
            window: The kernel size, stride, padding, dilation and padding mode of the replaced convolution.
            bias: Whether the 1 x 1 convolution has a bias.
        """
        spatial = self.make_spatial(in_channels, window)
        return CheapConv(spatial, in_channels, out_channels, bias=bias, window=window)

    def __call__(self, in_channels: int, out_channels: int, stride: int = 1) -> nn.Module:
        """Returns a 3 x 3 cheap convolution with padding 1 and without bias; its 1 x 1 convolution has the stride."""
        window = Window()
        return CheapConv(self.make_spatial(in_channels, window), in_channels, out_channels, stride, window=window)


def check_block_type(block_type: Any) -> None:
    """Raises `OptionError` if an object is no `BlockType`, such as a function of the user."""
    if not isinstance(block_type, BlockType):
        own = getattr(block_type, "func", block_type)  # of a `functools.partial`
        name = getattr(own, "__name__", type(own).__name__)
        allowed = "is no subclass of odcheap.BlockType; a convolution is a class with the method make_spatial"
        raise OptionError("block_type", name, allowed)


@dataclass(frozen=True)
class Shift(BlockType):
    """Replaces a convolution by a shift of the channels (`Shift2d`), followed by a 1 x 1 convolution."""

    def make_spatial(self, channels: int, window: Window) -> nn.Module:
        return Shift2d(window.kernel_size, window.dilation, window.stride, window.padding, window.padding_mode)

    def reason_to_keep(self, channels: int, window: Window) -> str | None:
        too_few = channels < window.taps
        return f"a shift of {window.taps} taps moves none of {channels} channels" if too_few else None


@dataclass(frozen=True)
class DW(BlockType):
    """Replaces a convolution by a depth-wise convolution with the same kernel size, followed by a 1 x 1 convolution."""

    def make_spatial(self, channels: int, window: Window) -> nn.Module:
        return window.make_conv(channels, channels, groups=channels)


@dataclass(frozen=True)
class RepDW(BlockType):
    """Replaces a convolution by a `RepDepthwise`, followed by a 1 x 1 convolution.

    A `RepDepthwise` is a depth-wise convolution that is a sum of three branches in training. In eval mode it is one
    depth-wise convolution with a bias. Parameters and multiply-accumulates are counted for this second form, which
    exports contain.
    """

    def make_spatial(self, channels: int, window: Window) -> nn.Module:
        return RepDepthwise(channels, window)

    def factorize(self, kernel: Tensor, pair: CheapConv) -> tuple[Tensor | None, Tensor]:
        """Returns weights with which a cheap convolution, in eval mode and with new batch norms, approximates a kernel.

        Args:
            kernel: The kernel (O, C, kh, kw) of the convolution that is replaced.
            pair: The cheap convolution that replaces it, with its initial weights; it is not changed.

        Returns:
            A tuple of two tensors, neither of which is None: the weights (C, 1, kh, kw) of the K x K branch, and the
            weights (O, C, 1, 1) of the 1 x 1 convolution. If an element of the first tensor is NaN, the caller must
            leave this weight at its initial value.
        """
        assert isinstance(pair.spatial, RepDepthwise)
        spatial, pointwise = factorize_grouped(kernel, pair.in_channels)
        return pair.spatial.unfold_kernel(spatial), pointwise


@check_arguments("block_type")
@dataclass(frozen=True)
class Group(BlockType):
    """Replaces a convolution by a grouped convolution with the same kernel size, followed by a 1 x 1 convolution.

    The object is no layer itself: it makes the layers that replace convolutions.

    Args:
        groups: The number of groups of the grouped convolution. In the CIFAR ResNets it must divide the number of
            channels of each layer. In networks that `cheapen` converts, a layer whose number of channels it does not
            divide gets the largest divisor of the number of channels below `groups`.
    """

    groups: Annotated[int, Field(ge=1)] = 4

    def make_spatial(self, channels: int, window: Window) -> nn.Module:
        return window.make_conv(channels, channels, groups=self.largest_divisor(channels))

    def reason_to_keep(self, channels: int, window: Window) -> str | None:
        indivisible = self.groups > 1 and self.largest_divisor(channels) == 1
        return f"no number of groups up to {self.groups} divides its {channels} channels" if indivisible else None

    def largest_divisor(self, channels: int) -> int:
        """Returns the largest divisor of `channels` that is not larger than `groups`."""
        return next(g for g in range(min(self.groups, channels), 0, -1) if channels % g == 0)

    def __call__(self, in_channels: int, out_channels: int, stride: int = 1) -> nn.Module:
        if in_channels % self.groups:
            raise OptionError("block_type.groups", self.groups, f"must divide the layer's {in_channels} channels")
        return super().__call__(in_channels, out_channels, stride)


@dataclass(frozen=True)
class Standard(BlockType):
    """The standard 3 x 3 convolution, for comparison with cheap convolutions."""

    is_cheap = False

    def make_spatial(self, channels: int, window: Window) -> nn.Module:
        """Returns a depth-wise convolution; only networks whose published form has such layers call this method."""
        return window.make_conv(channels, channels, groups=channels)

    def __call__(self, in_channels: int, out_channels: int, stride: int = 1) -> nn.Module:
        return conv3x3(in_channels, out_channels, stride)


def conv3x3(in_channels: int, out_channels: int, stride: int = 1) -> nn.Conv2d:
    """Returns a standard 3 x 3 convolution with padding 1 and without bias."""
    return Window(stride=(stride, stride)).make_conv(in_channels, out_channels)


def factorize_grouped(kernel: Tensor, groups: int) -> tuple[Tensor, Tensor]:
    """Approximates a kernel, in least squares, by a grouped convolution followed by a 1 x 1 convolution.

    For the input channels of one group the kernel is a matrix O x (C/groups * kh * kw). The two convolutions together
    can compute any such matrix with a rank of C/groups or less. The nearest one is the truncated singular value
    decomposition (Eckart and Young, 1936). Each of the two convolutions gets the square roots of the singular values
    as factors, so that weight decay has the same effect on both.

    Args:
        kernel: The kernel, (O, C, kh, kw).
        groups: The number of groups; C for a depth-wise convolution.

    Returns:
        A tuple: the weights of the grouped convolution, (C, C/groups, kh, kw), and those of the 1 x 1 convolution,
        (O, C, 1, 1). If the rank of a group's matrix is less than C/groups, the remaining channels have 1 x 1 weights
        of 0 and grouped weights of NaN. The caller must replace NaN by numbers other than 0: if both weights were 0,
        their gradients would always be 0 too.
    """
    # The decomposition of each group's matrix, all at once: (groups, O, C/groups * kh * kw).
    out, channels, *size = kernel.shape
    width = channels // groups
    matrices = kernel.double().reshape(out, groups, width, *size).transpose(0, 1).flatten(2)
    u, s, v = torch.linalg.svd(matrices, full_matrices=False)
    rank = min(width, s.shape[1])
    u, s, v = u[:, :, :rank], s[:, :rank], v[:, :rank]
    s = torch.where(s > 1e-9 * s[:, :1], s, 0)

    # Both factors are multiplied by the square roots. Channels beyond the rank, or with a singular value of zero, keep
    # NaN and 0.
    spatial = kernel.new_full((groups, width, v.shape[2]), torch.nan, dtype=torch.double)
    spatial[:, :rank] = torch.where(s[:, :, None] > 0, s.sqrt()[:, :, None] * v, torch.nan)
    pointwise = kernel.new_zeros((out, groups, width), dtype=torch.double)
    pointwise[:, :, :rank] = (u * s.sqrt()[:, None]).transpose(0, 1)
    return spatial.view(channels, width, *size).to(kernel), pointwise.view(out, channels, 1, 1).to(kernel)


def fit_pointwise(kernel: Tensor, spatial: Tensor) -> Tensor:
    """Returns the 1 x 1 weights (O, C, 1, 1) with which a fixed spatial operator best approximates a kernel.

    Args:
        kernel: The kernel to approximate in least squares, (O, C, kh, kw).
        spatial: The kernel of the fixed spatial operator in each channel, (C, 1, kh, kw).
    """
    # Each weight is the projection of the kernel's window on the channel's fixed window; 0 if that one is zero.
    fixed = spatial.double().squeeze(1)
    squares = fixed.square().sum((1, 2))
    products = torch.einsum("ochw,chw->oc", kernel.double(), fixed)
    return torch.where(squares > 0, products / squares, 0)[..., None, None].to(kernel)


@torch.no_grad()
def spatial_kernel(spatial: nn.Module, like: Tensor, window: Window) -> Tensor:
    """Returns the kernel of the convolution that a spatial operator computes.

    The kernel of an `nn.Conv2d` is its weight. For any other operator, the kernel is read from its output for an image
    in which one pixel is 1 and all other pixels are 0.

    Args:
        spatial: An `nn.Conv2d`, or a linear operator that computes each output channel from the same input channel.
        like: A tensor (O, C, ...) with the number of channels, the dtype and the device of the kernel.
        window: The kernel size, padding and dilation of the operator.

    Returns:
        (C, C/groups, kh, kw) for an `nn.Conv2d`, otherwise (C, 1, kh, kw).
    """
    if isinstance(spatial, nn.Conv2d):
        return spatial.weight

    # An image with one pixel in the center, so far from the border that no padding mode copies it.
    probe: Any = copy.deepcopy(spatial)
    if hasattr(probe, "stride"):
        probe.stride = (1, 1)
    reach = [d * (k - 1) for k, d in zip(window.kernel_size, window.dilation, strict=True)]
    if isinstance(window.padding, str):
        padding = [r // 2 if window.padding == "same" else 0 for r in reach]
    else:
        padding = list(window.padding)
    center = [r + p + 1 for r, p in zip(reach, padding, strict=True)]
    image = like.new_zeros(1, like.shape[1], *(2 * c + 1 for c in center))
    image[:, :, center[0], center[1]] = 1
    response = probe(image)[0]

    # Output y sums kernel[k] * image[y + dilation * k - padding]: entry k is at y = center + padding - dilation * k.
    rows, columns = (
        [c + p - d * k for k in range(size)]
        for c, p, d, size in zip(center, padding, window.dilation, window.kernel_size, strict=True)
    )
    return response[:, rows][:, :, columns][:, None]
