"""Triton kernels of the spatial operators with a 3 x 3 window and stride 1: depth-wise convolution and shift.

In all kernels a row is one pixel of one image, and a tile is a block of ROWS rows x BLOCK of the C channels. H and W
are the height and width of the images, ACC is the dtype in which sums are computed, and the prefix d stands for the
gradient of a tensor.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from odcheap.layers.kernels.norm import sum_types, tile_mask

# Programs that write each output by itself:
WIDE = 64  # channels: 128 bytes in bfloat16, a cache line
CONV_PROGRAMS = 256  # few, since each thread first reads its channels' kernels and then wants many pixels
SHIFT_PROGRAMS = 1024
MAX_ELEMENTS, MIN_ELEMENTS = 4096, 512  # elements of a program: 32 and 4 for each thread
# Programs that also sum over pixels:
CHANNELS = 16  # few, so that there are few chunks
SUM_ROWS = 64  # rows of a tile: the nine sums then have 8 elements each in a thread
SUM_PROGRAMS = 256

LAUNCH = {"num_warps": 4, "num_stages": 1}


@triton.jit
def load_neighbor(
    x_ptr,
    row,
    rows,
    channel,
    DOWN: tl.constexpr,
    RIGHT: tl.constexpr,
    H: tl.constexpr,
    W: tl.constexpr,
    C: tl.constexpr,
    BLOCK: tl.constexpr,
    ACC: tl.constexpr,
):
    """Loads the pixels that are DOWN lines below and RIGHT columns to the right of the given pixels, as a tile.

    `x_ptr` is a matrix (N H W, C) with one pixel in each row; `row` has the numbers of the given pixels, of `rows` in
    all, and `channel` those of the channels. Negative DOWN and RIGHT mean above and to the left. Pixels outside of the
    image are zero.
    """
    h = row // W % H + DOWN
    w = row % W + RIGHT
    ok = ((row < rows) & (h >= 0) & (h < H) & (w >= 0) & (w < W))[:, None]
    if C % BLOCK != 0:
        ok = ok & (channel < C)[None, :]
    source = row + (DOWN * W + RIGHT)
    return tl.load(x_ptr + source[:, None] * C + channel[None, :], mask=ok, other=0.0).to(ACC)


@triton.jit
def load_tap(weight_ptr, x_ptr, channel, TAP: tl.constexpr, C: tl.constexpr, ACC: tl.constexpr):
    """Returns entry TAP (0 to 8) of the 3 x 3 kernel of each channel, (1, BLOCK), rounded to the dtype of x.

    weight has the kernels (C, 9), and `channel` the numbers of the channels.
    """
    weight = tl.load(weight_ptr + channel * 9 + TAP, mask=channel < C, other=0.0)
    return weight.to(x_ptr.dtype.element_ty).to(ACC)[None, :]


@triton.jit
def depthwise_forward(
    x_ptr,
    weight_ptr,
    y_ptr,
    rows,
    H: tl.constexpr,
    W: tl.constexpr,
    C: tl.constexpr,
    BLOCK: tl.constexpr,
    ROWS: tl.constexpr,
    ACC: tl.constexpr,
):
    """Triton kernel that writes y, the depth-wise 3 x 3 convolution of x with padding 1.

    x and y are matrices (rows, C) with one pixel of one image in each row; the images have H x W pixels. weight has the
    kernels (C, 9). A program writes ROWS rows and BLOCK channels. ACC is the dtype of sums.
    """
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    channel = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    y = tl.zeros([ROWS, BLOCK], ACC)
    for i in tl.static_range(3):
        for j in tl.static_range(3):
            x = load_neighbor(x_ptr, row, rows, channel, i - 1, j - 1, H, W, C, BLOCK, ACC)
            y += x * load_tap(weight_ptr, x_ptr, channel, i * 3 + j, C, ACC)
    ok = tile_mask(row, rows, channel, C, BLOCK)
    tl.store(y_ptr + row[:, None] * C + channel[None, :], y.to(y_ptr.dtype.element_ty), mask=ok)


@triton.jit
def add_backward_tap(
    dy_ptr,
    row,
    rows,
    channel,
    x,
    weight,
    dx,
    dtap,
    TAP: tl.constexpr,
    H: tl.constexpr,
    W: tl.constexpr,
    C: tl.constexpr,
    BLOCK: tl.constexpr,
    ACC: tl.constexpr,
):
    """Returns the tiles `dx` and `dtap` with the contribution of entry TAP of the kernel added.

    `dtap` is the gradient of this entry, `weight` its value; `x` is the tile of the input.
    """
    # An output pixel reads x at the entry's offset, so an input pixel gets its gradient from the opposite offset.
    dy = load_neighbor(dy_ptr, row, rows, channel, 1 - TAP // 3, 1 - TAP % 3, H, W, C, BLOCK, ACC)
    return dx + dy * weight, dtap + dy * x


@triton.jit
def depthwise_backward(
    dy_ptr,
    x_ptr,
    weight_ptr,
    dx_ptr,
    partial_ptr,
    rows,
    H: tl.constexpr,
    W: tl.constexpr,
    C: tl.constexpr,
    BLOCK: tl.constexpr,
    ROWS: tl.constexpr,
    TILES: tl.constexpr,
    ACC: tl.constexpr,
):
    """Triton kernel of the backward pass of a depth-wise 3 x 3 convolution.

    It writes dx, the gradient of the input x, and partial (chunks, 9, C), the gradient of the weights summed over each
    chunk of rows. dy, x and dx are matrices (rows, C) with one pixel of one image in each row; the images have H x W
    pixels. A program works on one chunk, which has TILES * ROWS rows, and on BLOCK channels.
    """
    # The nine entries of the kernel are nine variables, since Triton has no lists.
    chunk = tl.program_id(0)
    channel = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    known = channel < C
    w0 = load_tap(weight_ptr, x_ptr, channel, 0, C, ACC)
    w1 = load_tap(weight_ptr, x_ptr, channel, 1, C, ACC)
    w2 = load_tap(weight_ptr, x_ptr, channel, 2, C, ACC)
    w3 = load_tap(weight_ptr, x_ptr, channel, 3, C, ACC)
    w4 = load_tap(weight_ptr, x_ptr, channel, 4, C, ACC)
    w5 = load_tap(weight_ptr, x_ptr, channel, 5, C, ACC)
    w6 = load_tap(weight_ptr, x_ptr, channel, 6, C, ACC)
    w7 = load_tap(weight_ptr, x_ptr, channel, 7, C, ACC)
    w8 = load_tap(weight_ptr, x_ptr, channel, 8, C, ACC)
    # The sums over the pixels are computed at the end only: until then each element of a tile has its own sum.
    zero = tl.zeros([ROWS, BLOCK], ACC)
    d0, d1, d2, d3, d4, d5, d6, d7, d8 = zero, zero, zero, zero, zero, zero, zero, zero, zero
    for tile in range(TILES):
        row = (chunk * TILES + tile) * ROWS + tl.arange(0, ROWS)
        x = load_neighbor(x_ptr, row, rows, channel, 0, 0, H, W, C, BLOCK, ACC)
        dx, d0 = add_backward_tap(dy_ptr, row, rows, channel, x, w0, zero, d0, 0, H, W, C, BLOCK, ACC)
        dx, d1 = add_backward_tap(dy_ptr, row, rows, channel, x, w1, dx, d1, 1, H, W, C, BLOCK, ACC)
        dx, d2 = add_backward_tap(dy_ptr, row, rows, channel, x, w2, dx, d2, 2, H, W, C, BLOCK, ACC)
        dx, d3 = add_backward_tap(dy_ptr, row, rows, channel, x, w3, dx, d3, 3, H, W, C, BLOCK, ACC)
        dx, d4 = add_backward_tap(dy_ptr, row, rows, channel, x, w4, dx, d4, 4, H, W, C, BLOCK, ACC)
        dx, d5 = add_backward_tap(dy_ptr, row, rows, channel, x, w5, dx, d5, 5, H, W, C, BLOCK, ACC)
        dx, d6 = add_backward_tap(dy_ptr, row, rows, channel, x, w6, dx, d6, 6, H, W, C, BLOCK, ACC)
        dx, d7 = add_backward_tap(dy_ptr, row, rows, channel, x, w7, dx, d7, 7, H, W, C, BLOCK, ACC)
        dx, d8 = add_backward_tap(dy_ptr, row, rows, channel, x, w8, dx, d8, 8, H, W, C, BLOCK, ACC)
        ok = tile_mask(row, rows, channel, C, BLOCK)
        tl.store(dx_ptr + row[:, None] * C + channel[None, :], dx.to(dx_ptr.dtype.element_ty), mask=ok)
    at = partial_ptr + chunk * (9 * C) + channel
    tl.store(at, tl.sum(d0, axis=0), mask=known)
    tl.store(at + C, tl.sum(d1, axis=0), mask=known)
    tl.store(at + 2 * C, tl.sum(d2, axis=0), mask=known)
    tl.store(at + 3 * C, tl.sum(d3, axis=0), mask=known)
    tl.store(at + 4 * C, tl.sum(d4, axis=0), mask=known)
    tl.store(at + 5 * C, tl.sum(d5, axis=0), mask=known)
    tl.store(at + 6 * C, tl.sum(d6, axis=0), mask=known)
    tl.store(at + 7 * C, tl.sum(d7, axis=0), mask=known)
    tl.store(at + 8 * C, tl.sum(d8, axis=0), mask=known)


@triton.jit
def sum_chunks(partial_ptr, dweight_ptr, chunks, C: tl.constexpr, BLOCK: tl.constexpr, PARTS: tl.constexpr):
    """Triton kernel that writes dweight (C, 9), the sum over the chunks of partial, which has the shape (chunks, 9, C).

    A program sums BLOCK of the 9 * C columns. PARTS is the number of chunks, rounded up to a power of two.
    """
    column = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    part = tl.arange(0, PARTS)
    ok = (part < chunks)[:, None] & (column < 9 * C)[None, :]
    total = tl.sum(tl.load(partial_ptr + part[:, None] * (9 * C) + column[None, :], mask=ok, other=0.0), axis=0)
    at = column % C * 9 + column // C
    tl.store(dweight_ptr + at, total.to(dweight_ptr.dtype.element_ty), mask=column < 9 * C)


@triton.jit
def shift_offsets(channel, SIGN: tl.constexpr, C: tl.constexpr):
    """Returns how many pixels below and to the right each channel of a 3 x 3 `Shift2d` reads, -1 to 1, times SIGN.

    `channel` has the numbers of the channels, of C in all.
    """
    entry = tl.where(channel < C // 9 * 9, channel % 9, 4)  # the remaining channels are copied
    return SIGN * (entry // 3 - 1), SIGN * (entry % 3 - 1)


@triton.jit
def shift_channels(
    x_ptr,
    y_ptr,
    rows,
    SIGN: tl.constexpr,
    H: tl.constexpr,
    W: tl.constexpr,
    C: tl.constexpr,
    BLOCK: tl.constexpr,
    ROWS: tl.constexpr,
):
    """Triton kernel that writes y: each channel of x shifted as in a 3 x 3 `Shift2d`, or if SIGN is -1 the other way.

    x and y are matrices (rows, C) with one pixel of one image in each row; the images have H x W pixels. Pixels from
    outside of the image are zero. A program writes ROWS rows and BLOCK channels.
    """
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    channel = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    down, right = shift_offsets(channel, SIGN, C)
    h = (row // W % H)[:, None] + down[None, :]
    w = (row % W)[:, None] + right[None, :]
    ok = tile_mask(row, rows, channel, C, BLOCK)
    inside = ok & (h >= 0) & (h < H) & (w >= 0) & (w < W)
    source = row[:, None] + (down * W + right)[None, :]
    x = tl.load(x_ptr + source * C + channel[None, :], mask=inside, other=0.0)
    tl.store(y_ptr + row[:, None] * C + channel[None, :], x, mask=ok)


def plan_elements(x: Tensor, programs: int) -> tuple[tuple[int, int], int, int]:
    """Returns how to divide a feature map among programs that compute each output element separately.

    A program is a thread block of a GPU kernel. It works on a chunk of rows (a row is one pixel of one image) and on a
    block of channels.

    Args:
        x: The feature map, (N, C, H, W).
        programs: The approximate number of programs.

    Returns:
        The grid (chunks of rows, blocks of channels), the number of channels and the number of rows of a program.
    """
    rows, channels = x.numel() // x.shape[1], x.shape[1]
    block = min(triton.next_power_of_2(channels), WIDE)
    elements = triton.next_power_of_2(triton.cdiv(x.numel(), programs))
    program_rows = min(max(elements, MIN_ELEMENTS), MAX_ELEMENTS) // block
    return (triton.cdiv(rows, program_rows), triton.cdiv(channels, block)), block, program_rows


def plan_sums(x: Tensor) -> tuple[tuple[int, int], int, int]:
    """Returns how to divide a feature map (N, C, H, W) among about 256 programs, each of which sums over some pixels.

    A program is a thread block of a GPU kernel. It works on a chunk of rows (a row is one pixel of one image), which it
    reads in tiles of 64 rows, and on a block of channels.

    Returns:
        The grid (chunks of rows, blocks of channels), the number of channels and the number of tiles of a program.
    """
    rows, channels = x.numel() // x.shape[1], x.shape[1]
    block = min(triton.next_power_of_2(channels), CHANNELS)
    blocks = triton.cdiv(channels, block)
    tiles = triton.cdiv(rows * min(blocks, SUM_PROGRAMS), SUM_PROGRAMS * SUM_ROWS)
    return (triton.cdiv(rows, tiles * SUM_ROWS), blocks), block, tiles


def map_sizes(x: Tensor) -> tuple[int, int, int, int]:
    """Returns the sizes of a feature map (N, C, H, W) in the order of the kernels' arguments: N * H * W, H, W and C."""
    images, channels, height, width = x.shape
    return images * height * width, height, width, channels


class Depthwise(torch.autograd.Function):
    """The autograd function of `depthwise3x3`; it saves its inputs."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        y = torch.empty_like(x)
        grid, block, rows = plan_elements(x, CONV_PROGRAMS)
        depthwise_forward[grid](x, weight, y, *map_sizes(x), block, rows, sum_types(x.dtype)[1], **LAUNCH)
        ctx.save_for_backward(x, weight)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        channels, (dtype, acc) = x.shape[1], sum_types(x.dtype)
        dy = dy.contiguous(memory_format=torch.channels_last)
        dx, dweight = torch.empty_like(x), torch.empty_like(weight)
        grid, block, tiles = plan_sums(x)
        chunks = grid[0]
        partial = torch.empty(chunks, 9, channels, dtype=dtype, device=x.device)
        depthwise_backward[grid](dy, x, weight, dx, partial, *map_sizes(x), block, SUM_ROWS, tiles, acc, **LAUNCH)
        # The second kernel adds up the chunks' sums of the weights' gradient.
        programs, parts = triton.cdiv(9 * channels, CHANNELS), triton.next_power_of_2(chunks)
        sum_chunks[(programs,)](partial, dweight, chunks, channels, CHANNELS, parts, **LAUNCH)
        return dx, dweight


class ShiftFunction(torch.autograd.Function):
    """The autograd function of `shift3x3`; the gradient is the opposite shift."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return run_shift(x, 1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> Tensor:
        return run_shift(dy.contiguous(memory_format=torch.channels_last), -1)


def run_shift(x: Tensor, sign: int) -> Tensor:
    """Returns a feature map in which each channel is shifted as in a 3 x 3 `Shift2d`, or in the opposite direction.

    Args:
        x: (N, C, H, W), contiguous in channels-last memory format.
        sign: 1 for the offsets of `Shift2d`, -1 for the opposite ones, which are those of the gradient.

    Returns:
        (N, C, H, W).
    """
    (rows, *sizes), y = map_sizes(x), torch.empty_like(x)
    grid, block, program_rows = plan_elements(x, SHIFT_PROGRAMS)
    shift_channels[grid](x, y, rows, sign, *sizes, block, program_rows, **LAUNCH)
    return y


def depthwise3x3(x: Tensor, weight: Tensor) -> Tensor:
    """Returns the depth-wise 3 x 3 convolution of x with stride 1 and padding 1.

    Sums are computed in float32, or in float64 if `x` is float64.

    Args:
        x: (N, C, H, W), contiguous in channels-last memory format; bfloat16, float32 or float64.
        weight: (C, 1, 3, 3), contiguous. Its values are rounded to the dtype of `x`; its gradient is not.

    Returns:
        (N, C, H, W), with the dtype and memory format of `x`.

    Raises:
        RuntimeError: In the backward pass, if a second derivative is computed.
    """
    return Depthwise.apply(x, weight)


def shift3x3(x: Tensor) -> Tensor:
    """Computes the same as `Shift2d` with a 3 x 3 window, stride 1, dilation 1 and zero padding of 1.

    Args:
        x: (N, C, H, W), contiguous in channels-last memory format.

    Returns:
        (N, C, H, W), with the dtype and memory format of `x`.

    Raises:
        RuntimeError: In the backward pass, if a second derivative is computed.
    """
    return ShiftFunction.apply(x)
