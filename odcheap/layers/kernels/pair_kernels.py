"""Triton kernel of a cheap pair before its batch norm: spatial operator, 1 x 1 convolution, statistics.

Tiles are rows (pixels) x channels: IN of the input and OUT of the 1 x 1 convolution, both filled up with zeros to a
power of two. A row of the output is a pixel that the stride keeps: at STRIDE times its row and column in the input.
ACC is the type of the sums, DOT that of what matrix products multiply.
"""

import triton
import triton.language as tl

from odcheap.layers.kernels.norm_kernels import add_tile, inside
from odcheap.layers.kernels.spatial_kernels import shift_offsets, tap


@triton.jit
def strided_pixel(row, H: tl.constexpr, W: tl.constexpr, STRIDE: tl.constexpr):
    """Of an output pixel: its row and column in the input's image, and its place among all pixels of the input."""
    out_h: tl.constexpr = (H + STRIDE - 1) // STRIDE
    out_w: tl.constexpr = (W + STRIDE - 1) // STRIDE
    h = row // out_w % out_h * STRIDE
    w = row % out_w * STRIDE
    return h, w, (row // (out_h * out_w) * H + h) * W + w


@triton.jit
def strided_neighbour(
    x_ptr,
    row,
    rows,
    channel,
    TAP: tl.constexpr,
    STRIDE: tl.constexpr,
    H: tl.constexpr,
    W: tl.constexpr,
    C: tl.constexpr,
    BLOCK: tl.constexpr,
    ACC: tl.constexpr,
):
    """What the window's entry TAP covers in the input at each output pixel; zeros outside of the image."""
    down: tl.constexpr = TAP // 3 - 1
    right: tl.constexpr = TAP % 3 - 1
    h, w, source = strided_pixel(row, H, W, STRIDE)
    ok = ((row < rows) & (h + down >= 0) & (h + down < H) & (w + right >= 0) & (w + right < W))[:, None]
    if C % BLOCK != 0:
        ok = ok & (channel < C)[None, :]
    source += down * W + right
    return tl.load(x_ptr + source[:, None] * C + channel[None, :], mask=ok, other=0.0).to(ACC)


@triton.jit
def spatial_tile(
    x_ptr,
    kernel_ptr,
    row,
    rows,
    channel,
    SHIFTS: tl.constexpr,
    STRIDE: tl.constexpr,
    H: tl.constexpr,
    W: tl.constexpr,
    C: tl.constexpr,
    BLOCK: tl.constexpr,
    ROWS: tl.constexpr,
    ACC: tl.constexpr,
):
    """The spatial operator at the output's pixels, rounded to the activations' type."""
    if SHIFTS:
        down, right = shift_offsets(channel, 1, C)
        h, w, source = strided_pixel(row, H, W, STRIDE)
        h2 = h[:, None] + down[None, :]
        w2 = w[:, None] + right[None, :]
        ok = inside(row, rows, channel, C, BLOCK) & (h2 >= 0) & (h2 < H) & (w2 >= 0) & (w2 < W)
        place = (source[:, None] + (down * W + right)[None, :]) * C + channel[None, :]
        moved = tl.load(x_ptr + place, mask=ok, other=0.0)
    else:
        total = tl.zeros([ROWS, BLOCK], ACC)
        for k in tl.static_range(9):
            x = strided_neighbour(x_ptr, row, rows, channel, k, STRIDE, H, W, C, BLOCK, ACC)
            total += x * tap(kernel_ptr, x_ptr, channel, k, C, ACC)
        moved = total.to(x_ptr.dtype.element_ty)
    return moved


@triton.jit
def settled(value, PACK: tl.constexpr, DOT: tl.constexpr):
    """`value`, whose layout among the threads the compiler does not pass on to what it was made from.

    It sees through no assembly: else it would move each of the nine tiles of a window to the layout that their sum is
    needed in, instead of the sum. PACK values of it take 32 bits.
    """
    if DOT == tl.bfloat16:  # noqa: SIM300 - Triton compares its types in this order
        value = tl.inline_asm_elementwise(
            "mov.b32 $0, $1;", "=r,r", [value], dtype=value.dtype, is_pure=False, pack=PACK
        )
    return value


@triton.jit
def pair_forward(
    x_ptr,
    kernel_ptr,
    weight_ptr,
    z_ptr,
    partial_ptr,
    rows,
    chunks,
    SHIFTS: tl.constexpr,
    STRIDE: tl.constexpr,
    H: tl.constexpr,
    W: tl.constexpr,
    C_IN: tl.constexpr,
    C_OUT: tl.constexpr,
    IN: tl.constexpr,
    OUT: tl.constexpr,
    ROWS: tl.constexpr,
    TILES: tl.constexpr,
    DOT: tl.constexpr,
    ACC: tl.constexpr,
):
    """z, the 1 x 1 convolution of the spatial operator; a chunk's mean and squared deviations -> partial (2, .., C)."""
    chunk = tl.program_id(0)
    channel = tl.arange(0, IN)
    feature = tl.arange(0, OUT)
    there = (channel < C_IN)[:, None] & (feature < C_OUT)[None, :]
    weight = tl.load(weight_ptr + feature[None, :] * C_IN + channel[:, None], mask=there, other=0.0)
    weight = weight.to(x_ptr.dtype.element_ty).to(DOT)
    mean = tl.zeros([OUT], ACC)
    squares = tl.zeros([OUT], ACC)
    for tile in range(TILES):
        first = (chunk * TILES + tile) * ROWS
        row = first + tl.arange(0, ROWS)
        s = spatial_tile(x_ptr, kernel_ptr, row, rows, channel, SHIFTS, STRIDE, H, W, C_IN, IN, ROWS, ACC)
        z = tl.dot(settled(s, 2, DOT).to(DOT), weight, input_precision="ieee", out_dtype=ACC).to(z_ptr.dtype.element_ty)
        ok = inside(row, rows, feature, C_OUT, OUT)
        tl.store(z_ptr + row[:, None] * C_OUT + feature[None, :], z, mask=ok)
        earlier = first - chunk * TILES * ROWS
        mean, squares = add_tile(z.to(ACC), ok, rows - first, earlier, mean, squares, ROWS, ACC)
    tl.store(partial_ptr + chunk * C_OUT + feature, mean, mask=feature < C_OUT)
    tl.store(partial_ptr + (chunks + chunk) * C_OUT + feature, squares, mask=feature < C_OUT)
