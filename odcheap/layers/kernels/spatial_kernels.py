"""Triton kernels of the spatial operators. Tiles are rows (pixels) x channels; ACC is the type of the sums."""

import triton
import triton.language as tl

from odcheap.layers.kernels.norm_kernels import inside


@triton.jit
def neighbour(
    p,
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
    """The tile of `p` that lies DOWN rows and RIGHT columns further in each image; zeros outside of it."""
    h = row // W % H + DOWN
    w = row % W + RIGHT
    ok = ((row < rows) & (h >= 0) & (h < H) & (w >= 0) & (w < W))[:, None]
    if C % BLOCK != 0:
        ok = ok & (channel < C)[None, :]
    source = row + (DOWN * W + RIGHT)
    return tl.load(p + source[:, None] * C + channel[None, :], mask=ok, other=0.0).to(ACC)


@triton.jit
def tap(weight_ptr, x_ptr, channel, TAP: tl.constexpr, C: tl.constexpr, ACC: tl.constexpr):
    """(1, BLOCK): entry TAP of each channel's kernel, rounded to the activations' type as autocast would."""
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
    """y at each pixel: the sum over the window of x times the channel's kernel (C, 3, 3)."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    channel = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    y = tl.zeros([ROWS, BLOCK], ACC)
    for i in tl.static_range(3):
        for j in tl.static_range(3):
            x = neighbour(x_ptr, row, rows, channel, i - 1, j - 1, H, W, C, BLOCK, ACC)
            y += x * tap(weight_ptr, x_ptr, channel, i * 3 + j, C, ACC)
    ok = inside(row, rows, channel, C, BLOCK)
    tl.store(y_ptr + row[:, None] * C + channel[None, :], y.to(y_ptr.dtype.element_ty), mask=ok)


@triton.jit
def opposite(
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
    """dy at the offset opposite to TAP's, for both sums that need it: dx's, and that of the tap's own gradient."""
    dy = neighbour(dy_ptr, row, rows, channel, 1 - TAP // 3, 1 - TAP % 3, H, W, C, BLOCK, ACC)
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
    """dx, and a chunk's part of the weights' gradient -> partial (chunks, 9, C)."""
    chunk = tl.program_id(0)
    channel = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    known = channel < C
    w0 = tap(weight_ptr, x_ptr, channel, 0, C, ACC)
    w1 = tap(weight_ptr, x_ptr, channel, 1, C, ACC)
    w2 = tap(weight_ptr, x_ptr, channel, 2, C, ACC)
    w3 = tap(weight_ptr, x_ptr, channel, 3, C, ACC)
    w4 = tap(weight_ptr, x_ptr, channel, 4, C, ACC)
    w5 = tap(weight_ptr, x_ptr, channel, 5, C, ACC)
    w6 = tap(weight_ptr, x_ptr, channel, 6, C, ACC)
    w7 = tap(weight_ptr, x_ptr, channel, 7, C, ACC)
    w8 = tap(weight_ptr, x_ptr, channel, 8, C, ACC)
    zero = tl.zeros([ROWS, BLOCK], ACC)
    d0, d1, d2, d3, d4, d5, d6, d7, d8 = zero, zero, zero, zero, zero, zero, zero, zero, zero
    for tile in range(TILES):
        row = (chunk * TILES + tile) * ROWS + tl.arange(0, ROWS)
        x = neighbour(x_ptr, row, rows, channel, 0, 0, H, W, C, BLOCK, ACC)
        dx, d0 = opposite(dy_ptr, row, rows, channel, x, w0, zero, d0, 0, H, W, C, BLOCK, ACC)
        dx, d1 = opposite(dy_ptr, row, rows, channel, x, w1, dx, d1, 1, H, W, C, BLOCK, ACC)
        dx, d2 = opposite(dy_ptr, row, rows, channel, x, w2, dx, d2, 2, H, W, C, BLOCK, ACC)
        dx, d3 = opposite(dy_ptr, row, rows, channel, x, w3, dx, d3, 3, H, W, C, BLOCK, ACC)
        dx, d4 = opposite(dy_ptr, row, rows, channel, x, w4, dx, d4, 4, H, W, C, BLOCK, ACC)
        dx, d5 = opposite(dy_ptr, row, rows, channel, x, w5, dx, d5, 5, H, W, C, BLOCK, ACC)
        dx, d6 = opposite(dy_ptr, row, rows, channel, x, w6, dx, d6, 6, H, W, C, BLOCK, ACC)
        dx, d7 = opposite(dy_ptr, row, rows, channel, x, w7, dx, d7, 7, H, W, C, BLOCK, ACC)
        dx, d8 = opposite(dy_ptr, row, rows, channel, x, w8, dx, d8, 8, H, W, C, BLOCK, ACC)
        ok = inside(row, rows, channel, C, BLOCK)
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
    """partial (chunks, 9, C) -> dweight (C, 9)."""
    column = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    part = tl.arange(0, PARTS)
    ok = (part < chunks)[:, None] & (column < 9 * C)[None, :]
    total = tl.sum(tl.load(partial_ptr + part[:, None] * (9 * C) + column[None, :], mask=ok, other=0.0), axis=0)
    place = column % C * 9 + column // C
    tl.store(dweight_ptr + place, total.to(dweight_ptr.dtype.element_ty), mask=column < 9 * C)


@triton.jit
def shift_offsets(channel, SIGN: tl.constexpr, C: tl.constexpr):
    """SIGN times the rows and columns by which each channel of a shift moves."""
    entry = tl.where(channel < C // 9 * 9, channel % 9, 4)  # the channels beyond are copied
    return SIGN * (entry // 3 - 1), SIGN * (entry % 3 - 1)


@triton.jit
def gather(
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
    """y at each pixel: x at SIGN times the channel's offset from there, zero outside the image."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    channel = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    down, right = shift_offsets(channel, SIGN, C)
    h = (row // W % H)[:, None] + down[None, :]
    w = (row % W)[:, None] + right[None, :]
    ok = inside(row, rows, channel, C, BLOCK)
    there = ok & (h >= 0) & (h < H) & (w >= 0) & (w < W)
    source = row[:, None] + (down * W + right)[None, :]
    x = tl.load(x_ptr + source * C + channel[None, :], mask=there, other=0.0)
    tl.store(y_ptr + row[:, None] * C + channel[None, :], x, mask=ok)
