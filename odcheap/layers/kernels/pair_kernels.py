"""Triton kernels of a `CheapConv` with its batch norm: spatial operator, 1 x 1 convolution, and their gradients.

Names: x is the input, s the output of the spatial operator (a 3 x 3 shift or depth-wise convolution), z that of the
1 x 1 convolution, y the result after batch norm and ReLU; the prefix d stands for the gradient of a tensor. A row is
one pixel of one image. Pixel (h, w) of s, z and y belongs to pixel (STRIDE * h, STRIDE * w) of x. A tile is a block of
ROWS rows x all channels, and a chunk is TILES tiles. The C_IN channels of x and the C_OUT channels of z are padded with
zeros to IN and OUT, powers of two. ACC is the dtype in which sums are computed, DOT the dtype of the factors of matrix
products. SHIFT is 1 if the spatial operator is a shift, and 0 if it is a depth-wise convolution. Arguments in capital
letters are compile-time constants.
"""

import triton
import triton.language as tl

from odcheap.layers.kernels.norm_kernels import combine_gradients, load_norm, merge_tile, norm_gradient, tile_mask
from odcheap.layers.kernels.spatial_kernels import load_neighbor, load_spatial, load_tap, shift_offsets, sum_weights


@triton.jit
def fix_layout(value, DOT: tl.constexpr):
    """Returns `value` unchanged, after an assembly instruction that the compiler does not optimize."""
    # A matrix product needs its factors in another layout among the threads. Without this instruction the compiler
    # changes the layout of each of the nine tiles of a window, and not only that of their sum.
    if DOT == tl.bfloat16:  # noqa: SIM300 - Triton compares its types in this order
        value = tl.inline_asm_elementwise("mov.b32 $0, $1;", "=r,r", [value], dtype=value.dtype, is_pure=False, pack=2)
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
    SHIFT: tl.constexpr,
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
    """Triton kernel that writes z, the output of a `CheapConv`, which is a 1 x 1 convolution of a spatial operator.

    It also writes partial (2, chunks, C_OUT): the mean and the sum of squared deviations of each channel of z, in each
    chunk of rows. A row is one pixel of one image in z. A program works on one chunk, which has TILES * ROWS rows, and
    on all channels. IN and OUT are powers of two that are at least C_IN and C_OUT, since Triton needs such sizes. DOT
    is the dtype of the factors in the matrix product, ACC that of the sums.
    """
    # The weights (IN, OUT), which all tiles use.
    chunk = tl.program_id(0)
    channel = tl.arange(0, IN)
    feature = tl.arange(0, OUT)
    known = (channel < C_IN)[:, None] & (feature < C_OUT)[None, :]
    weight = tl.load(weight_ptr + feature[None, :] * C_IN + channel[:, None], mask=known, other=0.0)
    weight = weight.to(x_ptr.dtype.element_ty).to(DOT)
    mean = tl.zeros([OUT], ACC)
    squares = tl.zeros([OUT], ACC)
    for tile in range(TILES):
        first = (chunk * TILES + tile) * ROWS
        row = first + tl.arange(0, ROWS)
        s = load_spatial(x_ptr, kernel_ptr, row, rows, channel, SHIFT, STRIDE, H, W, C_IN, IN, ROWS, ACC)
        z = tl.dot(fix_layout(s, DOT).to(DOT), weight, input_precision="ieee", out_dtype=ACC).to(z_ptr.dtype.element_ty)
        ok = tile_mask(row, rows, feature, C_OUT, OUT)
        tl.store(z_ptr + row[:, None] * C_OUT + feature[None, :], z, mask=ok)
        # The statistics are those of the rounded values, since the batch norm reads these.
        earlier = first - chunk * TILES * ROWS
        mean, squares = merge_tile(z.to(ACC), ok, rows - first, earlier, mean, squares, ROWS, ACC)
    tl.store(partial_ptr + chunk * C_OUT + feature, mean, mask=feature < C_OUT)
    tl.store(partial_ptr + (chunks + chunk) * C_OUT + feature, squares, mask=feature < C_OUT)


@triton.jit
def kernel_gradient(
    x_ptr,
    ds,
    row,
    rows,
    channel,
    STRIDE: tl.constexpr,
    H: tl.constexpr,
    W: tl.constexpr,
    C: tl.constexpr,
    BLOCK: tl.constexpr,
    ACC: tl.constexpr,
):
    """Returns the gradient of the depth-wise weights, summed over the pixels of a tile.

    It is in the first nine rows of the result (16, BLOCK), one row for each entry of the 3 x 3 kernel. ds is the tile
    of the gradient of the depth-wise convolution's output, and `row` has the numbers of its pixels.
    """
    # Nine vectors would need more registers: a vector has copies in many threads, but each element of a tile is in one.
    taps = tl.arange(0, 16)
    total = tl.zeros([16, BLOCK], ACC)
    for k in tl.static_range(9):
        x = load_neighbor(x_ptr, row, rows, channel, k, STRIDE, H, W, C, BLOCK, ACC)
        total += tl.where((taps == k)[:, None], tl.sum(x * ds, axis=0)[None, :], 0.0)
    return total


@triton.jit
def pair_backward(
    dy_ptr,
    z_ptr,
    gamma_ptr,
    beta_ptr,
    saved_ptr,
    sums_ptr,
    x_ptr,
    kernel_ptr,
    weight_ptr,
    ds_ptr,
    partial_ptr,
    dgamma_ptr,
    dbeta_ptr,
    rows,
    parts,
    SHIFT: tl.constexpr,
    STRIDE: tl.constexpr,
    H: tl.constexpr,
    W: tl.constexpr,
    C_IN: tl.constexpr,
    C_OUT: tl.constexpr,
    IN: tl.constexpr,
    OUT: tl.constexpr,
    ROWS: tl.constexpr,
    TILES: tl.constexpr,
    PARTS: tl.constexpr,
    COLUMNS: tl.constexpr,
    DOT: tl.constexpr,
    ACC: tl.constexpr,
):
    """Triton kernel of the backward pass of a `CheapConv` with batch norm and ReLU, up to its spatial operator.

    It writes ds, the gradient of the output s of the spatial operator, and the gradients of the weights, summed over
    each chunk of rows, to partial (chunks, COLUMNS). A row is one pixel of one image in the output.

    A row of partial has first the gradient of the 1 x 1 weights (C_OUT, C_IN), then that of the depth-wise weights
    (9, C_IN) if there are any. The program of the first chunk also writes dgamma and dbeta, the gradients of the batch
    norm's weight and bias.
    """
    # The sums that the batch norm's gradient needs, and the 1 x 1 weights (OUT, IN), which all tiles use.
    chunk = tl.program_id(0)
    channel = tl.arange(0, IN)
    feature = tl.arange(0, OUT)
    total, total_hat = combine_gradients(sums_ptr, dgamma_ptr, dbeta_ptr, parts, feature, C_OUT, PARTS)
    matrix = feature[:, None] * C_IN + channel[None, :]
    known = (feature < C_OUT)[:, None] & (channel < C_IN)[None, :]
    weight = tl.load(weight_ptr + matrix, mask=known, other=0.0).to(x_ptr.dtype.element_ty).to(DOT)
    dweight = tl.zeros([OUT, IN], ACC)
    dkernel = tl.zeros([16, IN], ACC)
    for tile in range(TILES):
        row = (chunk * TILES + tile) * ROWS + tl.arange(0, ROWS)
        mean, rstd, gamma, beta = load_norm(saved_ptr, gamma_ptr, beta_ptr, feature, C_OUT, ACC)
        ok = tile_mask(row, rows, feature, C_OUT, OUT)
        at = row[:, None] * C_OUT + feature[None, :]
        dz, _ = norm_gradient(dy_ptr, z_ptr, z_ptr, at, ok, rows, mean, rstd, gamma, beta, total, total_hat, 1, ACC)
        dz = tl.where(ok, dz, 0.0).to(z_ptr.dtype.element_ty).to(DOT)
        # s is computed again from x, since the forward pass does not save it.
        s = load_spatial(x_ptr, kernel_ptr, row, rows, channel, SHIFT, STRIDE, H, W, C_IN, IN, ROWS, ACC)
        dweight += tl.dot(tl.trans(dz), fix_layout(s, DOT).to(DOT), input_precision="ieee", out_dtype=ACC)
        ds = tl.dot(dz, weight, input_precision="ieee", out_dtype=ACC).to(ds_ptr.dtype.element_ty)
        at = row[:, None] * C_IN + channel[None, :]
        tl.store(ds_ptr + at, ds, mask=tile_mask(row, rows, channel, C_IN, IN))
        if not SHIFT:
            dkernel += kernel_gradient(x_ptr, ds.to(ACC), row, rows, channel, STRIDE, H, W, C_IN, IN, ACC)
    tl.store(partial_ptr + chunk * COLUMNS + matrix, dweight, mask=known)
    if not SHIFT:
        taps = tl.arange(0, 16)
        at = partial_ptr + chunk * COLUMNS + C_OUT * C_IN + taps[:, None] * C_IN + channel[None, :]
        tl.store(at, dkernel, mask=(taps < 9)[:, None] & (channel < C_IN)[None, :])


@triton.jit
def load_input_gradient(
    ds_ptr,
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
    """Returns a tile of dx, the gradient of the input of a 3 x 3 shift or depth-wise convolution.

    For each input pixel it is the sum over all output pixels that read this pixel. `row` has the numbers of the input
    pixels, and ds is the gradient of the output.
    """
    # Output pixels exist only at multiples of STRIDE.
    out_w: tl.constexpr = (W + STRIDE - 1) // STRIDE
    image = row // (H * W) * ((H + STRIDE - 1) // STRIDE * out_w)
    h = row // W % H
    w = row % W
    ok = tile_mask(row, rows, channel, C, BLOCK)
    # The gradient of a shift is the opposite shift.
    if SHIFT:
        down, right = shift_offsets(channel, -1, C)
        h2 = h[:, None] + down[None, :]
        w2 = w[:, None] + right[None, :]
        inside = ok & (h2 >= 0) & (h2 < H) & (w2 >= 0) & (w2 < W) & (h2 % STRIDE == 0) & (w2 % STRIDE == 0)
        source = image[:, None] + h2 // STRIDE * out_w + w2 // STRIDE
        dx = tl.load(ds_ptr + source * C + channel[None, :], mask=inside, other=0.0).to(ACC)
    else:
        dx = tl.zeros([ROWS, BLOCK], ACC)
        for k in tl.static_range(9):
            h1 = h + (1 - k // 3)
            w1 = w + (1 - k % 3)
            kept = (h1 >= 0) & (h1 < H) & (w1 >= 0) & (w1 < W) & (h1 % STRIDE == 0) & (w1 % STRIDE == 0)
            source1 = (image + h1 // STRIDE * out_w + w1 // STRIDE)[:, None] * C + channel[None, :]
            ds = tl.load(ds_ptr + source1, mask=ok & kept[:, None], other=0.0).to(ACC)
            dx += ds * load_tap(kernel_ptr, ds_ptr, channel, k, C, ACC)
    return dx


@triton.jit
def spatial_backward(
    ds_ptr,
    kernel_ptr,
    extra_ptr,
    dx_ptr,
    partial_ptr,
    dweight_ptr,
    dkernel_ptr,
    rows,
    chunks,
    programs,
    SHIFT: tl.constexpr,
    EXTRA: tl.constexpr,
    STRIDE: tl.constexpr,
    H: tl.constexpr,
    W: tl.constexpr,
    C: tl.constexpr,
    BLOCK: tl.constexpr,
    ROWS: tl.constexpr,
    WEIGHTS: tl.constexpr,
    COLUMNS: tl.constexpr,
    PARTS: tl.constexpr,
    GROUP: tl.constexpr,
    ACC: tl.constexpr,
):
    """Triton kernel that writes the gradients of a `CheapConv`'s input (dx), 1 x 1 weights and depth-wise weights.

    The first `programs` programs write dx; if EXTRA, they add another gradient of the input to it. Each of the other
    programs adds up GROUP columns of partial (chunks, COLUMNS), see `sum_weights`.
    """
    program = tl.program_id(0)
    if program < programs:
        row = program * ROWS + tl.arange(0, ROWS)
        channel = tl.arange(0, BLOCK)
        dx = load_input_gradient(ds_ptr, kernel_ptr, row, rows, channel, SHIFT, STRIDE, H, W, C, BLOCK, ROWS, ACC)
        ok = tile_mask(row, rows, channel, C, BLOCK)
        at = row[:, None] * C + channel[None, :]
        if EXTRA:
            dx += tl.load(extra_ptr + at, mask=ok, other=0.0).to(ACC)
        tl.store(dx_ptr + at, dx.to(dx_ptr.dtype.element_ty), mask=ok)
    else:
        column = (program - programs) * GROUP + tl.arange(0, GROUP)
        sum_weights(partial_ptr, dweight_ptr, dkernel_ptr, column, chunks, C, WEIGHTS, COLUMNS, PARTS)
