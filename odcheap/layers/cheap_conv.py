"""Cheap convolutions: a spatial operator that keeps the channels, then a 1 x 1 convolution that mixes them.

`BlockType` is the interface of a kind of cheap convolution. A new one is a subclass with one method and a YAML file in
`conf/block_type`.
"""

from dataclasses import dataclass
from typing import Annotated, Any, Literal

from pydantic import Field
from torch import Tensor, nn

from odcheap.layers import factorize
from odcheap.layers.pairs import fused_pair
from odcheap.layers.shift import Pair, Shift2d, to_pair
from odcheap.utils.arguments import check_arguments
from odcheap.utils.errors import OptionError


@dataclass(frozen=True)
class Window:
    """The options of an `nn.Conv2d` except channels, groups and bias."""

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
        """Number of entries of the kernel."""
        return self.kernel_size[0] * self.kernel_size[1]

    def make_conv(self, in_channels: int, out_channels: int, groups: int = 1, bias: bool = False) -> nn.Conv2d:
        """Returns a convolution with this window."""
        size, stride, padding, dilation = self.kernel_size, self.stride, self.padding, self.dilation
        shape = (in_channels, out_channels, size, stride, padding, dilation, groups, bias)
        return nn.Conv2d(*shape, padding_mode=self.padding_mode)


class CheapConv(nn.Sequential):
    """A pair of a spatial operator (C -> C) and a 1 x 1 convolution (C -> O).

    Both are linear, so together they compute a convolution with one dense kernel. The pair has the attributes of that
    `nn.Conv2d` (`in_channels`, `kernel_size`, `stride`, `bias` and so on) except `weight`.

    Args:
        spatial: The spatial operator, with the window's stride, padding and dilation.
        in_channels: C.
        out_channels: O.
        stride: Stride of the 1 x 1 convolution.
        bias: Whether the 1 x 1 convolution has a bias.
        window: The window of the convolution that the pair replaces; its stride is the spatial operator's.
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
        """The spatial operator, the 1 x 1 convolution, and whether the first is a plain 3 x 3 shift, for GPU kernels.

        None if the forward pass may be more than these two: in a subclass, and if a module was appended.
        """
        is_shift = isinstance(self.spatial, Shift2d) and self.spatial.is_plain_3x3
        return (self.spatial, self.pointwise, is_shift) if len(self) == 2 and type(self) is CheapConv else None

    @property
    def in_channels(self) -> int:
        return self.pointwise.in_channels

    @property
    def out_channels(self) -> int:
        return self.pointwise.out_channels

    @property
    def kernel_size(self) -> Pair:
        return self.window.kernel_size

    @property
    def stride(self) -> Pair:
        rows, columns = to_pair(self.pointwise.stride)
        return self.window.stride[0] * rows, self.window.stride[1] * columns

    @property
    def padding(self) -> Pair | str:
        return self.window.padding

    @property
    def dilation(self) -> Pair:
        return self.window.dilation

    @property
    def padding_mode(self) -> str:
        return self.window.padding_mode

    @property
    def groups(self) -> int:
        return 1  # of the dense kernel

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
    """A kind of convolution of which networks are built; calling it returns a 3 x 3 convolution without bias.

    A new cheap convolution is a subclass with `make_spatial` and a YAML file in `conf/block_type`. Training,
    `cheapen`, costs, export and report then work with it. The spatial operator must be linear, treat each channel by
    itself (or be an `nn.Conv2d`), have outputs of the same size as a convolution with the same window, and keep its
    stride in an attribute `stride`. An attribute `description` is its name in tables.

    Example:
        >>> class AvgPool(BlockType):
        ...     def make_spatial(self, channels, window):
        ...         return nn.AvgPool2d(window.kernel_size, window.stride, window.padding)
        >>> AvgPool()(16, 32, stride=2)(torch.zeros(1, 16, 8, 8)).shape
        torch.Size([1, 32, 4, 4])
    """

    is_cheap = True  # False for the standard convolution, with which networks are built in their published form

    def make_spatial(self, channels: int, window: Window) -> nn.Module:
        """Returns the spatial operator: (N, C, H, W) -> (N, C, H', W') with the size of a convolution's output.

        Args:
            channels: C.
            window: Kernel size, stride, padding and dilation.
        """
        raise NotImplementedError

    def reason_to_keep(self, channels: int, window: Window) -> str | None:
        """Returns why `cheapen` should not replace a convolution with this input and window; None if it should.

        Args:
            channels: Number of input channels.
            window: The convolution's window.
        """
        return None

    def factorize(self, kernel: Tensor, pair: CheapConv) -> tuple[Tensor | None, Tensor]:
        """Returns the weights with which a pair comes nearest to a given kernel, in least squares.

        Args:
            kernel: The kernel (O, C, kh, kw) of the convolution that is replaced.
            pair: The pair with its initial weights.

        Returns:
            The weights of the spatial operator, with the shape of its `weight`, and those of the 1 x 1 convolution,
            (O, C, 1, 1). NaN stands for a weight that keeps its initial value; None if all of them do.
        """
        if isinstance(pair.spatial, nn.Conv2d):
            return factorize.factorize_grouped(kernel, pair.spatial.groups)
        return None, factorize.fit_pointwise(kernel, factorize.spatial_kernel(pair.spatial, kernel, pair.window))

    def make_pair(self, in_channels: int, out_channels: int, window: Window, bias: bool = False) -> CheapConv:
        """Returns a pair in place of a convolution with this window; the spatial operator has the stride."""
        spatial = self.make_spatial(in_channels, window)
        return CheapConv(spatial, in_channels, out_channels, bias=bias, window=window)

    def __call__(self, in_channels: int, out_channels: int, stride: int = 1) -> nn.Module:
        """Returns a 3 x 3 pair whose 1 x 1 convolution has the stride, as in the 2019 code."""
        window = Window()
        return CheapConv(self.make_spatial(in_channels, window), in_channels, out_channels, stride, window=window)


@dataclass(frozen=True)
class Shift(BlockType):
    """A shift, then a 1 x 1 convolution."""

    def make_spatial(self, channels: int, window: Window) -> nn.Module:
        return Shift2d(window.kernel_size, window.dilation, window.stride, window.padding, window.padding_mode)

    def reason_to_keep(self, channels: int, window: Window) -> str | None:
        too_few = channels < window.taps
        return f"a shift of {window.taps} taps moves none of {channels} channels" if too_few else None


@dataclass(frozen=True)
class DW(BlockType):
    """A depth-wise convolution, then a 1 x 1 convolution."""

    def make_spatial(self, channels: int, window: Window) -> nn.Module:
        return window.make_conv(channels, channels, groups=channels)


@check_arguments("block_type")
@dataclass(frozen=True)
class Group(BlockType):
    """A convolution in groups, then a 1 x 1 convolution.

    Args:
        groups: Number of groups. In the CIFAR ResNets it must divide the channels; `cheapen` and networks from other
            libraries use the largest divisor of the channels up to it.
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
        """Returns a depth-wise convolution, for networks that have depth-wise layers in their published form."""
        return window.make_conv(channels, channels, groups=channels)

    def __call__(self, in_channels: int, out_channels: int, stride: int = 1) -> nn.Module:
        return conv3x3(in_channels, out_channels, stride)


def conv3x3(in_channels: int, out_channels: int, stride: int = 1) -> nn.Conv2d:
    """Returns a standard 3 x 3 convolution with padding 1 and without bias."""
    return Window(stride=(stride, stride)).make_conv(in_channels, out_channels)
