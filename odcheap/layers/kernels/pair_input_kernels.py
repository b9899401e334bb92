"""Triton kernel of a cheap pair's input gradient and the weights' final sums; the terms are `pair_kernels`'."""

import triton
import triton.language as tl

from odcheap.layers.kernels.norm_kernels import inside
from odcheap.layers.kernels.spatial_kernels import shift_offsets, tap


@triton.jit
def spatial_gradient(
    ds_ptr,
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
    """dx at rows of the input: what each got into, where the stride keeps that pixel."""
    out_w: tl.constexpr = (W + STRIDE - 1) // STRIDE
    image = row // (H * W) * ((H + STRIDE - 1) // STRIDE * out_w)
    h = row // W % H
    w = row % W
    ok = inside(row, rows, channel, C, BLOCK)
    if SHIFTS:
        down, right = shift_offsets(channel, -1, C)
        h2 = h[:, None] + down[None, :]
        w2 = w[:, None] + right[None, :]
        there = ok & (h2 >= 0) & (h2 < H) & (w2 >= 0) & (w2 < W) & (h2 % STRIDE == 0) & (w2 % STRIDE == 0)
        source = image[:, None] + h2 // STRIDE * out_w + w2 // STRIDE
        dx = tl.load(ds_ptr + source * C + channel[None, :], mask=there, other=0.0).to(ACC)
    else:
        dx = tl.zeros([ROWS, BLOCK], ACC)
        for k in tl.static_range(9):
            h1 = h + (1 - k // 3)
            w1 = w + (1 - k % 3)
            kept = (h1 >= 0) & (h1 < H) & (w1 >= 0) & (w1 < W) & (h1 % STRIDE == 0) & (w1 % STRIDE == 0)
            source1 = (image + h1 // STRIDE * out_w + w1 // STRIDE)[:, None] * C + channel[None, :]
            ds = tl.load(ds_ptr + source1, mask=ok & kept[:, None], other=0.0).to(ACC)
            dx += ds * tap(kernel_ptr, ds_ptr, channel, k, C, ACC)
    return dx


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
    """partial (chunks, COLUMNS) -> dweight from the first WEIGHTS columns, dkernel (C, 9) from the rest (9, C)."""
    part = tl.arange(0, PARTS)
    ok = (part < chunks)[:, None] & (column < COLUMNS)[None, :]
    total = tl.sum(tl.load(partial_ptr + part[:, None] * COLUMNS + column[None, :], mask=ok, other=0.0), axis=0)
    tl.store(dweight_ptr + column, total.to(dweight_ptr.dtype.element_ty), mask=column < WEIGHTS)
    rest = column - WEIGHTS
    mine = (rest >= 0) & (column < COLUMNS)
    tl.store(dkernel_ptr + rest % C * 9 + rest // C, total.to(dkernel_ptr.dtype.element_ty), mask=mine)


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
    SHIFTS: tl.constexpr,
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
    """In the first `programs` programs dx, for EXTRA with another gradient added; the others sum GROUP columns each."""
    program = tl.program_id(0)
    if program < programs:
        row = program * ROWS + tl.arange(0, ROWS)
        channel = tl.arange(0, BLOCK)
        dx = spatial_gradient(ds_ptr, kernel_ptr, row, rows, channel, SHIFTS, STRIDE, H, W, C, BLOCK, ROWS, ACC)
        ok = inside(row, rows, channel, C, BLOCK)
        at = row[:, None] * C + channel[None, :]
        if EXTRA:
            dx += tl.load(extra_ptr + at, mask=ok, other=0.0).to(ACC)
        tl.store(dx_ptr + at, dx.to(dx_ptr.dtype.element_ty), mask=ok)
    else:
        column = (program - programs) * GROUP + tl.arange(0, GROUP)
        sum_weights(partial_ptr, dweight_ptr, dkernel_ptr, column, chunks, C, WEIGHTS, COLUMNS, PARTS)
