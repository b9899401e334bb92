"""A cheap pair with the batch norm, ReLU and residual behind it: two kernels forward, three backward."""

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from odcheap.layers.kernels import is_interpreted
from odcheap.layers.kernels.norm import ACT_ADD, ALONE, accumulator, plan
from odcheap.layers.kernels.norm_kernels import chunk_gradients, normalise
from odcheap.layers.kernels.pair_gradient_kernels import pair_backward
from odcheap.layers.kernels.pair_input_kernels import spatial_backward
from odcheap.layers.kernels.pair_kernels import pair_forward
from odcheap.layers.kernels.spatial import WARPS, wide_plan

MOST_CHUNKS = 512  # of one tile each in CIFAR's three stages: a loop over tiles takes many registers
ELEMENTS = 4096  # of a tile in bfloat16: 16 a thread
EXACT_ROWS = 32  # of a tile in float32, where matrix products take no tensor cores
PAIR_WARPS = 8
REGISTERS = 128  # of a thread at most, such that two programs of the backward pass fit a multiprocessor
LEAST = 16  # rows and channels of a matrix product
GRADIENT_PROGRAMS = 512  # of the spatial operator's gradient, or more:
GRADIENT_ELEMENTS = 2048  # of such a program at most, 16 a thread: twice as many take twice the registers
SUMMED = 8192  # elements, chunks x columns, of a program that adds up the weights' gradients


class Cut(NamedTuple):
    """The sizes of z, and how its rows are cut: chunks of `tiles` * `per_tile` rows."""

    shape: tuple[int, int, int, int]
    rows: int
    chunks: int
    per_tile: int
    tiles: int
    padded: tuple[int, int]


def cut_rows(x: Tensor, features: int, stride: int) -> Cut:
    """The cut of a pair's output, for x (N, C, H, W) and so many channels of the output."""
    images, channels, height, width = x.shape
    shape = (images, features, triton.cdiv(height, stride), triton.cdiv(width, stride))
    rows = images * shape[2] * shape[3]
    padded = (max(triton.next_power_of_2(channels), LEAST), max(triton.next_power_of_2(features), LEAST))
    wished = ELEMENTS // max(padded) if x.dtype == torch.bfloat16 else EXACT_ROWS
    per_tile = min(wished, max(triton.next_power_of_2(rows), LEAST))
    tiles = triton.cdiv(triton.cdiv(rows, per_tile), MOST_CHUNKS)
    return Cut(shape, rows, triton.cdiv(rows, tiles * per_tile), per_tile, tiles, padded)


def multiplied(dtype: torch.dtype) -> tl.dtype:
    """The type of what matrix products multiply; the interpreter's know no bfloat16."""
    exact = accumulator(dtype)[1]
    return tl.bfloat16 if dtype == torch.bfloat16 and not is_interpreted() else exact


class PairNormAct(torch.autograd.Function):
    """`pair_norm_act` for autograd; saves its inputs, the 1 x 1 convolution's output and the statistics."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        kernel: Tensor | None,
        weight: Tensor,
        gamma: Tensor,
        beta: Tensor,
        residual: Tensor | None,
        norm: nn.BatchNorm2d,
        stride: int,
    ) -> tuple[Tensor, Tensor]:
        (kept, acc), (_, channels, height, width), features = accumulator(x.dtype), x.shape, len(weight)
        cut, is_shift = cut_rows(x, features, stride), kernel is None
        z = torch.empty(cut.shape, dtype=x.dtype, device=x.device, memory_format=torch.channels_last)
        y, saved = torch.empty_like(z), torch.empty(2, features, dtype=kept, device=x.device)
        partial = torch.empty(2, cut.chunks, features, dtype=kept, device=x.device)
        sizes = (is_shift, stride, height, width, channels, features, *cut.padded, cut.per_tile, cut.tiles)
        pair_forward[(cut.chunks,)](
            *(x, x if kernel is None else kernel, weight, z, partial, cut.rows, cut.chunks, *sizes),
            *(multiplied(x.dtype), acc),
            num_warps=PAIR_WARPS,
            num_stages=1,
        )
        wide, order = plan(z), ALONE if residual is None else ACT_ADD
        buffers = (norm.running_mean, norm.running_var, norm.num_batches_tracked)
        pointers = (z, z if residual is None else residual, y, gamma, beta, partial, saved, *buffers)
        normalise[(wide.chunks, wide.blocks)](
            *(*pointers, cut.rows, cut.chunks, features, wide.block, wide.per_tile, wide.tiles),
            *(triton.next_power_of_2(cut.chunks), cut.per_tile * cut.tiles),
            *(float(norm.eps), float(norm.momentum), order, acc),
            num_warps=wide.warps,
            num_stages=1,
        )
        torch.autograd.graph.increment_version(buffers)
        ctx.set_materialize_grads(False)
        ctx.stride, ctx.residual = stride, residual is not None
        ctx.save_for_backward(x, kernel, weight, gamma, beta, z, saved)
        return y, x.view_as(x)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor | None, extra: Tensor | None) -> tuple[Tensor | None, ...]:
        if dy is None:
            return extra, *(None,) * 7
        x, kernel, weight, gamma, beta, z, saved = ctx.saved_tensors
        (kept, acc), (_, channels, height, width), features = accumulator(x.dtype), x.shape, len(weight)
        cut, wide, is_shift, launch = cut_rows(x, features, ctx.stride), plan(z), kernel is None, {"num_stages": 1}
        dy = dy.contiguous(memory_format=torch.channels_last)
        sums = torch.empty(2, wide.chunks, features, dtype=kept, device=x.device)
        behind = (dy, z, z, gamma, beta, saved, sums, cut.rows, wide.chunks, features, wide.block, wide.per_tile)
        chunk_gradients[(wide.chunks, wide.blocks)](*behind, wide.tiles, ALONE, acc, num_warps=wide.warps, **launch)

        columns = (features + (0 if is_shift else 9)) * channels
        partial = torch.empty(cut.chunks, columns, dtype=kept, device=x.device)
        ds = torch.empty((*x.shape[:1], channels, *cut.shape[2:]), dtype=x.dtype, device=x.device)
        ds = torch.empty_like(ds, memory_format=torch.channels_last)
        dgamma, dbeta, dx, dweight = (torch.empty_like(t) for t in (gamma, beta, x, weight))
        dkernel = None if kernel is None else torch.empty_like(kernel)
        stands_in = x if kernel is None else kernel
        sizes = (is_shift, ctx.stride, height, width, channels, features, *cut.padded, cut.per_tile, cut.tiles)
        pair_backward[(cut.chunks,)](
            *(dy, z, gamma, beta, saved, sums, x, stands_in, weight, ds, partial, dgamma, dbeta),
            *(cut.rows, wide.chunks, *sizes, wide.parts, columns, multiplied(x.dtype), acc),
            num_warps=PAIR_WARPS,
            maxnreg=REGISTERS if x.dtype == torch.bfloat16 else None,
            **launch,
        )
        parts = triton.next_power_of_2(cut.chunks)
        group = min(max(SUMMED // parts, 16), 64)
        (programs, _), block, per_program = wide_plan(x, max(GRADIENT_PROGRAMS, x.numel() // GRADIENT_ELEMENTS))
        added = None if extra is None else extra.contiguous(memory_format=torch.channels_last)
        spatial_backward[(programs + triton.cdiv(columns, group),)](
            *(ds, stands_in, dx if added is None else added, dx, partial, dweight, dweight if is_shift else dkernel),
            *(x.numel() // channels, cut.chunks, programs, is_shift, added is not None, ctx.stride, height, width),
            *(channels, block, per_program, features * channels, columns, parts, group, acc),
            num_warps=WARPS,
            **launch,
        )
        return dx, dkernel, dweight, dgamma, dbeta, dy if ctx.residual else None, None, None


def pair_norm_act(
    x: Tensor, kernel: Tensor | None, weight: Tensor, norm: nn.BatchNorm2d, residual: Tensor | None, stride: int
) -> tuple[Tensor, Tensor]:
    """relu(norm(conv1x1(spatial(x)))) + residual in training mode. Sums are in float32 (float64 for float64).

    Where the plain modules store a map, values are rounded to the type of `x`: the spatial operator's output, the 1 x 1
    convolution's, and both gradients of these. Weights are rounded as autocast does, their gradients are not.

    Args:
        x: (N, C, H, W), contiguous in channels-last memory format; bfloat16 or float32, interpreted also float64.
        kernel: (C, 1, 3, 3) of the depth-wise convolution with stride 1 and padding 1; None for `Shift2d` with a
            3 x 3 window.
        weight: (O, C, 1, 1) of the 1 x 1 convolution; C and O are at most 64.
        norm: as for `batch_norm_act`.
        residual: (N, O, ceil(H / stride), ceil(W / stride)), channels-last and of the type of `x`, or None.
        stride: 1 or 2, of the 1 x 1 convolution.

    Returns:
        (N, O, ceil(H / stride), ceil(W / stride)), and `x` again: what also reads the input should read this one, whose
        gradient is added to the pair's own without a kernel.

    Raises:
        RuntimeError: on a second derivative.
    """
    return PairNormAct.apply(x, kernel, weight, norm.weight, norm.bias, residual, norm, stride)
