"""Cheap convolutions: a spatial operator that keeps the channels, then a 1 x 1 convolution that mixes them.

`BlockType` is the interface of a kind of cheap convolution. A new one is a subclass with one method and a YAML file in
`conf/block_type`.
"""

from dataclasses import dataclass
from typing import Annotated, Literal

from pydantic import Field
from torch import Tensor, nn

from odcheap.layers import factorize
from odcheap.layers.pairs import fused_pair
from odcheap.layers.shift import Pair, Shift2d, shift_taps, to_pair
from odcheap.utils.arguments import check_arguments
from odcheap.utils.errors import OptionError


@dataclass(frozen=True)
class Window:
    """How a convolution slides over the image: all options of `nn.Conv2d` but channels, groups and bias."""

    kernel_size: Pair = (3, 3)
    stride: Pair = (1, 1)
    padding: Pair | str = (1, 1)
    dilation: Pair = (1, 1)
    padding_mode: Literal["zeros", "reflect", "replicate", "circular"] = "zeros"

    @classmethod
    def from_conv(cls, conv: nn.Conv2d) -> "Window":
        """Returns the window of a convolution."""
        padding = conv.padding if isinstance(conv.padding, str) else to_pair(conv.padding)
        size, stride, dilation = to_pair(conv.kernel_size), to_pair(conv.stride), to_pair(conv.dilation)
        return cls(size, stride, padding, dilation, conv.padding_mode)

    @property
    def taps(self) -> int:
        """Number of pixels that the kernel reads."""
        return self.kernel_size[0] * self.kernel_size[1]

    def make_conv(self, in_channels: int, out_channels: int, groups: int = 1, bias: bool = False) -> nn.Conv2d:
        """Returns a convolution with this window."""
        size, stride, padding, dilation = self.kernel_size, self.stride, self.padding, self.dilation
        shape = (in_channels, out_channels, size, stride, padding, dilation, groups, bias)
        return nn.Conv2d(*shape, padding_mode=self.padding_mode)


class CheapConv(nn.Sequential):
    """A spatial operator (C -> C), then a 1 x 1 convolution (C -> O); both are linear, so together they are one kernel.

    Args:
        spatial: The spatial operator, with the window's stride, padding and dilation.
        in_channels: C.
        out_channels: O.
        stride: Stride of the 1 x 1 convolution.
        bias: Whether the 1 x 1 convolution has a bias.
        window: The window of the convolution that the pair replaces, with the spatial operator's own stride.
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
        self.window = window or Window()

    @property
    def fusible_parts(self) -> tuple[nn.Module, nn.Module, bool] | None:
        """For GPU kernels: the spatial operator, the 1 x 1 convolution, and whether the first is a plain 3 x 3 shift.

        None where the forward pass is not these two alone: in a subclass, and where a module was appended.
        """
        is_shift = isinstance(self.spatial, Shift2d) and self.spatial.is_plain_3x3
        return (self.spatial, self.pointwise, is_shift) if len(self) == 2 and type(self) is CheapConv else None

    def forward(self, input: Tensor) -> Tensor:  # the argument's name is that of `nn.Sequential`
        parts = self.fusible_parts
        fused = None if parts is None else fused_pair(input, *parts)
        return super().forward(input) if fused is None else fused


class BlockType:
    """A kind of convolution that networks are built of. Called, it makes a 3 x 3 convolution without bias.

    A new cheap convolution is a subclass with `make_spatial` and a YAML file in `conf/block_type`. Training,
    `cheapen`, costs, export and report then work with it. The spatial operator must be linear and treat each channel
    by itself (or be an `nn.Conv2d`), give what a convolution with the same window would give in size, and have its
    stride in an attribute `stride`. An attribute `description` is its name in tables.

    Example:
        >>> class AvgPool(BlockType):
        ...     def make_spatial(self, channels, window):
        ...         return nn.AvgPool2d(window.kernel_size, window.stride, window.padding)
        >>> AvgPool()(16, 32, stride=2)(torch.zeros(1, 16, 8, 8)).shape
        torch.Size([1, 32, 4, 4])
    """

    is_cheap = True  # False: the standard convolution; networks are then built in their published form

    def make_spatial(self, channels: int, window: Window) -> nn.Module:
        """Returns the spatial operator: (N, C, H, W) -> (N, C, H', W') with the size of a convolution's output.

        Args:
            channels: C.
            window: Kernel size, stride, padding and dilation.
        """
        raise NotImplementedError

    def reason_to_keep(self, channels: int, window: Window) -> str | None:
        """Returns why `cheapen` should leave a convolution with this input and window as it is; None if it should not.

        Args:
            channels: Number of input channels.
            window: The convolution's window.
        """
        return None

    def factorize(self, kernel: Tensor, pair: CheapConv) -> tuple[Tensor | None, Tensor]:
        """Returns the weights with which a pair comes nearest to a given kernel, in least squares.

        Args:
            kernel: (O, C, kh, kw), of the convolution that is replaced.
            pair: The pair, with fresh weights.

        Returns:
            The weights of the spatial operator, shaped as its `weight`, with NaN where the fresh ones should stay (None
            if all should stay), and those of the 1 x 1 convolution, (O, C, 1, 1).
        """
        if isinstance(pair.spatial, nn.Conv2d):
            return factorize.factorize_grouped(kernel, pair.spatial.groups)
        return None, factorize.fit_pointwise(kernel, factorize.spatial_kernel(pair.spatial, kernel, pair.window))

    def make_pair(self, in_channels: int, out_channels: int, window: Window, bias: bool = False) -> CheapConv:
        """Returns a pair that stands for a convolution with this window; the spatial operator carries the stride."""
        spatial = self.make_spatial(in_channels, window)
        return CheapConv(spatial, in_channels, out_channels, bias=bias, window=window)

    def __call__(self, in_channels: int, out_channels: int, stride: int = 1) -> nn.Module:
        """Returns a 3 x 3 pair whose 1 x 1 convolution carries the stride, as in the 2019 code."""
        window = Window()
        return CheapConv(self.make_spatial(in_channels, window), in_channels, out_channels, stride, window=window)


@dataclass(frozen=True)
class Shift(BlockType):
    """Shift, then 1 x 1."""

    def make_spatial(self, channels: int, window: Window) -> nn.Module:
        return Shift2d(window.kernel_size, window.dilation, window.stride, window.padding, window.padding_mode)

    def reason_to_keep(self, channels: int, window: Window) -> str | None:
        too_few = channels < window.taps
        return f"a shift of {window.taps} taps moves none of {channels} channels" if too_few else None

    def factorize(self, kernel: Tensor, pair: CheapConv) -> tuple[None, Tensor]:
        """The same as the general way, but exact: of each channel's kernel the entry that the shift reads."""
        rows, columns = kernel.shape[2:]
        return None, factorize.select_taps(kernel, shift_taps(kernel.shape[1], (rows, columns), kernel.device))


@dataclass(frozen=True)
class DW(BlockType):
    """Depth-wise convolution, then 1 x 1."""

    def make_spatial(self, channels: int, window: Window) -> nn.Module:
        return window.make_conv(channels, channels, groups=channels)


@check_arguments("block_type")
@dataclass(frozen=True)
class Group(BlockType):
    """Convolution in groups, then 1 x 1.

    Args:
        groups: Number of groups. As a network's block it must divide the channels; `cheapen` and networks from other
            libraries take the largest divisor up to it.
    """

    groups: Annotated[int, Field(ge=1)] = 4

    def make_spatial(self, channels: int, window: Window) -> nn.Module:
        return window.make_conv(channels, channels, groups=self.largest_divisor(channels))

    def reason_to_keep(self, channels: int, window: Window) -> str | None:
        indivisible = self.groups > 1 and self.largest_divisor(channels) == 1
        return f"no number of groups up to {self.groups} divides its {channels} channels" if indivisible else None

    def largest_divisor(self, channels: int) -> int:
        """Returns the largest divisor of `channels` up to `groups`."""
        return next(g for g in range(min(self.groups, channels), 0, -1) if channels % g == 0)

    def __call__(self, in_channels: int, out_channels: int, stride: int = 1) -> nn.Module:
        if in_channels % self.groups:
            raise OptionError("block_type.groups", self.groups, f"must divide the layer's {in_channels} channels")
        return super().__call__(in_channels, out_channels, stride)


@dataclass(frozen=True)
class Standard(BlockType):
    """The standard convolution, for comparison."""

    is_cheap = False

    def make_spatial(self, channels: int, window: Window) -> nn.Module:
        """A depth-wise convolution, for networks whose spatial operators are depth-wise in their published form."""
        return window.make_conv(channels, channels, groups=channels)

    def __call__(self, in_channels: int, out_channels: int, stride: int = 1) -> nn.Module:
        return conv3x3(in_channels, out_channels, stride)


def conv3x3(in_channels: int, out_channels: int, stride: int = 1) -> nn.Conv2d:
    """Returns a standard 3 x 3 convolution with padding 1 and without bias."""
    return Window(stride=(stride, stride)).make_conv(in_channels, out_channels)
