"""Triton kernels of the spatial operators with a 3 x 3 window: depth-wise convolution and shift, with padding 1.

In all kernels a row is one pixel of one image, and a tile is a block of ROWS rows x BLOCK of the C channels. H and W
are the height and width of the input's images, and STRIDE is the stride of the operator. ACC is the dtype in which sums
are computed, and the prefix d stands for the gradient of a tensor. Arguments in capital letters are compile-time
constants.
"""

import triton
import triton.language as tl

from odcheap.layers.kernels.norm_kernels import tile_mask


@triton.jit
def locate_pixel(row, H: tl.constexpr, W: tl.constexpr, STRIDE: tl.constexpr):
    """Returns where the output pixels with the numbers `row` lie in the input of a convolution with a stride.

    These are the row and the column in the image of H x W pixels, and the number of the pixel among all input pixels.
    """
    out_h: tl.constexpr = (H + STRIDE - 1) // STRIDE
    out_w: tl.constexpr = (W + STRIDE - 1) // STRIDE
    h = row // out_w % out_h * STRIDE
    w = row % out_w * STRIDE
    source = row
    if STRIDE != 1:
        source = (row // (out_h * out_w) * H + h) * W + w
    return h, w, source


@triton.jit
def load_neighbor(
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
    """Returns the input pixels, as a tile, that entry TAP (0 to 8) of a 3 x 3 window reads for some output pixels.

    `x_ptr` is a matrix with one pixel in each row and C channels. `row` has the numbers of the output pixels, of `rows`
    in all, and `channel` those of the channels. Pixels outside of the image of H x W pixels are zero.
    """
    down: tl.constexpr = TAP // 3 - 1
    right: tl.constexpr = TAP % 3 - 1
    h, w, source = locate_pixel(row, H, W, STRIDE)
    ok = ((row < rows) & (h + down >= 0) & (h + down < H) & (w + right >= 0) & (w + right < W))[:, None]
    if C % BLOCK != 0:
        ok = ok & (channel < C)[None, :]
    source += down * W + right
    return tl.load(x_ptr + source[:, None] * C + channel[None, :], mask=ok, other=0.0).to(ACC)


@triton.jit
def load_tap(weight_ptr, x_ptr, channel, TAP: tl.constexpr, C: tl.constexpr, ACC: tl.constexpr):
    """Returns entry TAP (0 to 8) of the 3 x 3 kernel of each channel, (1, BLOCK), rounded to the dtype of x.

    weight has the kernels (C, 9), and `channel` the numbers of the channels.
    """
    weight = tl.load(weight_ptr + channel * 9 + TAP, mask=channel < C, other=0.0)
    return weight.to(x_ptr.dtype.element_ty).to(ACC)[None, :]


@triton.jit
def shift_offsets(channel, SIGN: tl.constexpr, C: tl.constexpr):
    """Returns the offsets of channels in a 3 x 3 `Shift2d`, as two blocks with values from -1 to 1: down, right.

    An output pixel of a channel is the input pixel that lies so many pixels below it and to the right of it.

    Args:
        channel: A block of numbers of channels, from 0.
        SIGN: 1 in the forward pass. -1 in the backward pass, where gradients move the other way.
        C: The number of all channels.
    """
    entry = tl.where(channel < C // 9 * 9, channel % 9, 4)  # the remaining channels are copied
    return SIGN * (entry // 3 - 1), SIGN * (entry % 3 - 1)


@triton.jit
def load_spatial(
    x_ptr,
    kernel_ptr,
    row,
    rows,
    channel,
    SHIFT: tl.constexpr,
    STRIDE: tl.constexpr,
    H: tl.constexpr,
    W: tl.constexpr,
    C: tl.constexpr,
    BLOCK: tl.constexpr,
    ROWS: tl.constexpr,
    ACC: tl.constexpr,
):
    """Returns a tile of the output of a 3 x 3 shift or depth-wise convolution of x, rounded to the dtype of x.

    It has the output pixels with the numbers `row` (of `rows` in all) and the channels with the numbers `channel`.
    SHIFT is 1 for a shift, -1 for the opposite shift, and 0 for a depth-wise convolution with the weights at
    `kernel_ptr`, which are not read for a shift.
    """
    # A shift reads one pixel in each channel; a depth-wise convolution sums over nine pixels.
    if SHIFT != 0:
        down, right = shift_offsets(channel, SHIFT, C)
        h, w, source = locate_pixel(row, H, W, STRIDE)
        h2 = h[:, None] + down[None, :]
        w2 = w[:, None] + right[None, :]
        ok = tile_mask(row, rows, channel, C, BLOCK) & (h2 >= 0) & (h2 < H) & (w2 >= 0) & (w2 < W)
        at = (source[:, None] + (down * W + right)[None, :]) * C + channel[None, :]
        moved = tl.load(x_ptr + at, mask=ok, other=0.0)
    else:
        total = tl.zeros([ROWS, BLOCK], ACC)
        for k in tl.static_range(9):
            x = load_neighbor(x_ptr, row, rows, channel, k, STRIDE, H, W, C, BLOCK, ACC)
            total += x * load_tap(kernel_ptr, x_ptr, channel, k, C, ACC)
        moved = total.to(x_ptr.dtype.element_ty)
    return moved


@triton.jit
def spatial_forward(
    x_ptr,
    kernel_ptr,
    y_ptr,
    rows,
    SHIFT: tl.constexpr,
    H: tl.constexpr,
    W: tl.constexpr,
    C: tl.constexpr,
    BLOCK: tl.constexpr,
    ROWS: tl.constexpr,
    ACC: tl.constexpr,
):
    """Triton kernel that writes y: x after a 3 x 3 shift or depth-wise convolution with stride 1; see `load_spatial`.

    x and y are matrices (rows, C) with one pixel of one image in each row. A program writes ROWS rows and BLOCK
    channels.
    """
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    channel = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    y = load_spatial(x_ptr, kernel_ptr, row, rows, channel, SHIFT, 1, H, W, C, BLOCK, ROWS, ACC)
    ok = tile_mask(row, rows, channel, C, BLOCK)
    tl.store(y_ptr + row[:, None] * C + channel[None, :], y, mask=ok)


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
    """Returns the tiles `dx` and `dtap` with the contribution of entry TAP of a depth-wise kernel added.

    `dtap` is the gradient of this entry, `weight` its value; `x` is the tile of the input.
    """
    # An output pixel reads x at the entry's offset, so an input pixel gets its gradient from the opposite offset.
    dy = load_neighbor(dy_ptr, row, rows, channel, 8 - TAP, 1, H, W, C, BLOCK, ACC)
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
        x = load_neighbor(x_ptr, row, rows, channel, 4, 1, H, W, C, BLOCK, ACC)
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
def sum_weights(
    partial_ptr,
    dweight_ptr,
    dkernel_ptr,
    column,
    chunks,
    C: tl.constexpr,
    WEIGHTS: tl.constexpr,
    COLUMNS: tl.constexpr,
    PARTS: tl.constexpr,
):
    """Sums the gradients of weights, which another kernel wrote to partial (chunks, COLUMNS), over the chunks.

    It writes the sums of the columns with the numbers `column`: those of the first WEIGHTS columns to dweight, the
    gradient of 1 x 1 weights; those of the others, (9, C), to dkernel (C, 9). PARTS is the number of chunks, rounded up
    to a power of two.
    """
    part = tl.arange(0, PARTS)
    ok = (part < chunks)[:, None] & (column < COLUMNS)[None, :]
    total = tl.sum(tl.load(partial_ptr + part[:, None] * COLUMNS + column[None, :], mask=ok, other=0.0), axis=0)
    if WEIGHTS != 0:
        tl.store(dweight_ptr + column, total.to(dweight_ptr.dtype.element_ty), mask=column < WEIGHTS)
    rest = column - WEIGHTS
    is_kernel = (rest >= 0) & (column < COLUMNS)
    tl.store(dkernel_ptr + rest % C * 9 + rest // C, total.to(dkernel_ptr.dtype.element_ty), mask=is_kernel)


@triton.jit
def sum_chunks(partial_ptr, dkernel_ptr, chunks, C: tl.constexpr, BLOCK: tl.constexpr, PARTS: tl.constexpr):
    """Triton kernel that writes dkernel (C, 9), the sum over the chunks of partial, which has the shape (chunks, 9, C).

    A program sums BLOCK of the 9 * C columns. PARTS is the number of chunks, rounded up to a power of two.
    """
    column = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    sum_weights(partial_ptr, dkernel_ptr, dkernel_ptr, column, chunks, C, 0, 9 * C, PARTS)
