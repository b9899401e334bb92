"""The shift operator: moves each channel of a feature map by a fixed offset."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

Pair = tuple[int, int]  # rows, columns


class Shift2d(nn.Module):
    """Moves each channel by a fixed offset; pixels from outside the image are zero. It has no parameters.

    With k x k offsets and C channels, output pixel (h, w) of channel `c < k*k*floor(C / (k*k))` is the input pixel in
    row `h + d*(floor(c/k) mod k - floor(k/2))` and column `w + d*(c mod k - floor(k/2))`; the remaining channels are
    copied. Source: Wu et al., "Shift: a zero FLOP, zero parameter alternative to spatial convolutions", 2018; the order
    of the offsets is that of the method's 2019 reference code.

    It is computed as a depth-wise convolution with one-hot kernels. The result is exact in every dtype, and the
    gradient is the opposite shift. On two CPU cores (channels-last, forward and backward) this is 2 to 8 times as fast
    as copying slices.

    Args:
        kernel_size: The side k of the window of offsets, or (rows, columns).
        dilation: The distance d between neighboring offsets in pixels, or (rows, columns).
        stride: The distance between neighboring outputs in pixels, or (rows, columns).
        padding: The same as in `nn.Conv2d`; None pads so that the size of the image stays the same with stride 1.
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


def to_pair(value: int | tuple[int, ...]) -> Pair:
    """Returns (rows, columns) for an option of a convolution, such as its stride, which may be one number for both."""
    if isinstance(value, int):
        return value, value
    rows, columns = value
    return rows, columns
