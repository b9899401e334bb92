"""Triton kernel of the gradients up to a cheap pair's spatial operator; the terms are those of `pair_kernels`."""

import triton
import triton.language as tl

from odcheap.layers.kernels.norm_kernels import active_gradient, inside
from odcheap.layers.kernels.pair_kernels import settled, spatial_tile, strided_neighbour


@triton.jit
def gradient_sums(sums_ptr, dgamma_ptr, dbeta_ptr, parts, feature, C: tl.constexpr, PARTS: tl.constexpr):
    """The sums over all pixels of g and of g * z_hat, from the parts that `chunk_gradients` left.

    They are the gradients of the batch norm's bias and weight; the first program writes them.
    """
    part = tl.arange(0, PARTS)
    there = (part < parts)[:, None] & (feature < C)[None, :]
    place = part[:, None] * C + feature[None, :]
    total = tl.sum(tl.load(sums_ptr + place, mask=there, other=0.0), axis=0)
    total_hat = tl.sum(tl.load(sums_ptr + parts * C + place, mask=there, other=0.0), axis=0)
    if tl.program_id(0) == 0:
        tl.store(dbeta_ptr + feature, total.to(dbeta_ptr.dtype.element_ty), mask=feature < C)
        tl.store(dgamma_ptr + feature, total_hat.to(dgamma_ptr.dtype.element_ty), mask=feature < C)
    return total, total_hat


@triton.jit
def norm_gradient(
    dy_ptr,
    z_ptr,
    gamma_ptr,
    beta_ptr,
    saved_ptr,
    total,
    total_hat,
    row,
    rows,
    feature,
    C: tl.constexpr,
    BLOCK: tl.constexpr,
    ACC: tl.constexpr,
):
    """The gradient of the batch norm's input, rounded to the activations' type; zeros beyond the last row."""
    known = feature < C
    mean = tl.load(saved_ptr + feature, mask=known, other=0.0)
    rstd = tl.load(saved_ptr + C + feature, mask=known, other=0.0)
    gamma = tl.load(gamma_ptr + feature, mask=known, other=0.0).to(ACC)
    beta = tl.load(beta_ptr + feature, mask=known, other=0.0).to(ACC)
    ok = inside(row, rows, feature, C, BLOCK)
    at = row[:, None] * C + feature[None, :]
    z_hat = (tl.load(z_ptr + at, mask=ok, other=0.0).to(ACC) - mean[None, :]) * rstd[None, :]
    g = active_gradient(dy_ptr, z_ptr, at, ok, z_hat, gamma, beta, 1, ACC)
    dz = (gamma * rstd)[None, :] * (g - (total / rows)[None, :] - z_hat * (total_hat / rows)[None, :])
    return tl.where(ok, dz, 0.0).to(z_ptr.dtype.element_ty)


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
    """(16, BLOCK): a tile's part of the gradient of each channel's kernel, in the first nine rows.

    Nine vectors as one tile, each element of which is in one thread: a vector's would be in many.
    """
    taps = tl.arange(0, 16)
    total = tl.zeros([16, BLOCK], ACC)
    for k in tl.static_range(9):
        x = strided_neighbour(x_ptr, row, rows, channel, k, STRIDE, H, W, C, BLOCK, ACC)
        total += tl.where((taps == k)[:, None], tl.sum(x * ds, axis=0)[None, :], 0.0)
    return total


@triton.jit
def store_taps(at, dkernel, channel, C: tl.constexpr):
    """(16, BLOCK), of which nine rows count -> (9, C)."""
    taps = tl.arange(0, 16)
    real = (taps < 9)[:, None] & (channel < C)[None, :]
    tl.store(at + taps[:, None] * C + channel[None, :], dkernel, mask=real)


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
    PARTS: tl.constexpr,
    COLUMNS: tl.constexpr,
    DOT: tl.constexpr,
    ACC: tl.constexpr,
):
    """ds, the gradient of the spatial operator's output, and in the first chunk dgamma and dbeta.

    Also a chunk's part of the weights' gradients -> partial (chunks, COLUMNS): first the 1 x 1 convolution's
    (C_OUT, C_IN), then the kernels' (9, C_IN).
    """
    chunk = tl.program_id(0)
    channel = tl.arange(0, IN)
    feature = tl.arange(0, OUT)
    total, total_hat = gradient_sums(sums_ptr, dgamma_ptr, dbeta_ptr, parts, feature, C_OUT, PARTS)
    matrix = feature[:, None] * C_IN + channel[None, :]
    both = (feature < C_OUT)[:, None] & (channel < C_IN)[None, :]
    weight = tl.load(weight_ptr + matrix, mask=both, other=0.0).to(x_ptr.dtype.element_ty).to(DOT)
    dweight = tl.zeros([OUT, IN], ACC)
    dkernel = tl.zeros([16, IN], ACC)
    for tile in range(TILES):
        row = (chunk * TILES + tile) * ROWS + tl.arange(0, ROWS)
        dz = norm_gradient(
            dy_ptr, z_ptr, gamma_ptr, beta_ptr, saved_ptr, total, total_hat, row, rows, feature, C_OUT, OUT, ACC
        ).to(DOT)
        s = spatial_tile(x_ptr, kernel_ptr, row, rows, channel, SHIFTS, STRIDE, H, W, C_IN, IN, ROWS, ACC)
        dweight += tl.dot(tl.trans(dz), settled(s, 2, DOT).to(DOT), input_precision="ieee", out_dtype=ACC)
        ds = tl.dot(dz, weight, input_precision="ieee", out_dtype=ACC).to(ds_ptr.dtype.element_ty)
        at = row[:, None] * C_IN + channel[None, :]
        tl.store(ds_ptr + at, ds, mask=inside(row, rows, channel, C_IN, IN))
        if not SHIFTS:
            dkernel += kernel_gradient(x_ptr, ds.to(ACC), row, rows, channel, STRIDE, H, W, C_IN, IN, ACC)
    tl.store(partial_ptr + chunk * COLUMNS + matrix, dweight, mask=both)
    if not SHIFTS:
        store_taps(partial_ptr + chunk * COLUMNS + C_OUT * C_IN, dkernel, channel, C_IN)
