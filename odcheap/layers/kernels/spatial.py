"""The spatial operators of cheap pairs with a 3 x 3 window, stride 1: depth-wise convolution and shift."""

from typing import Any

import torch
import triton
from torch import Tensor
from torch.autograd.function import once_differentiable

from odcheap.layers.kernels.norm import accumulator
from odcheap.layers.kernels.spatial_kernels import depthwise_backward, depthwise_forward, gather, sum_chunks

WIDE = 64  # channels of a program without sums: 128 bytes in bfloat16, a cache line
PROGRAMS = 256  # of a convolution: each thread reads its channels' kernels first, which wants many pixels a thread
GATHER_PROGRAMS = 1024
MOST_ELEMENTS, LEAST_ELEMENTS = 4096, 512  # of a program: 32 and 4 a thread
CHANNELS = 16  # of a program with sums, so that chunks are few
SUM_ROWS = 64  # of such a program at a time: its nine sums have 8 elements a thread each
SUM_PROGRAMS = 256
WARPS = 4


def wide_plan(x: Tensor, programs: int) -> tuple[tuple[int, int], int, int]:
    """The grid, channels and rows of a program without sums, for about so many programs."""
    rows, channels = x.numel() // x.shape[1], x.shape[1]
    block = min(triton.next_power_of_2(channels), WIDE)
    wished = triton.next_power_of_2(triton.cdiv(x.numel(), programs))
    per_program = min(max(wished, LEAST_ELEMENTS), MOST_ELEMENTS) // block
    return (triton.cdiv(rows, per_program), triton.cdiv(channels, block)), block, per_program


def sum_plan(x: Tensor) -> tuple[tuple[int, int], int, int]:
    """The grid, channels and tiles of a program with sums."""
    rows, channels = x.numel() // x.shape[1], x.shape[1]
    block = min(triton.next_power_of_2(channels), CHANNELS)
    blocks = triton.cdiv(channels, block)
    tiles = triton.cdiv(rows * min(blocks, SUM_PROGRAMS), SUM_PROGRAMS * SUM_ROWS)
    return (triton.cdiv(rows, tiles * SUM_ROWS), blocks), block, tiles


class Depthwise(torch.autograd.Function):
    """`depthwise3x3` for autograd; saves its inputs."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        (rows, (height, width)), y = (x.numel() // x.shape[1], x.shape[2:]), torch.empty_like(x)
        grid, block, per_program = wide_plan(x, PROGRAMS)
        sizes = (rows, height, width, x.shape[1], block, per_program)
        depthwise_forward[grid](x, weight, y, *sizes, accumulator(x.dtype)[1], num_warps=WARPS, num_stages=1)
        ctx.save_for_backward(x, weight)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        (_, channels, height, width), (kept, acc) = x.shape, accumulator(x.dtype)
        dy = dy.contiguous(memory_format=torch.channels_last)
        dx, dweight = torch.empty_like(x), torch.empty_like(weight)
        grid, block, tiles = sum_plan(x)
        partial = torch.empty(grid[0], 9, channels, dtype=kept, device=x.device)
        pointers, launch = (dy, x, weight, dx, partial), {"num_warps": WARPS, "num_stages": 1}
        sizes = (x.numel() // channels, height, width, channels, block, SUM_ROWS, tiles)
        depthwise_backward[grid](*pointers, *sizes, acc, **launch)
        parts, columns = triton.next_power_of_2(grid[0]), triton.cdiv(9 * channels, CHANNELS)
        sum_chunks[(columns,)](partial, dweight, grid[0], channels, CHANNELS, parts, **launch)
        return dx, dweight


class Shifted(torch.autograd.Function):
    """`shift3x3` for autograd; its gradient is the opposite shift."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return shifted(x, 1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> Tensor:
        return shifted(dy.contiguous(memory_format=torch.channels_last), -1)


def shifted(x: Tensor, sign: int) -> Tensor:
    """(N, C, H, W), channels-last: each channel moved by its offset, or for -1 by the opposite."""
    (_, channels, height, width), y = x.shape, torch.empty_like(x)
    grid, block, per_program = wide_plan(x, GATHER_PROGRAMS)
    sizes = (x.numel() // channels, sign, height, width, channels, block, per_program)
    gather[grid](x, y, *sizes, num_warps=WARPS, num_stages=1)
    return y


def depthwise3x3(x: Tensor, weight: Tensor) -> Tensor:
    """Depth-wise 3 x 3 convolution with stride 1 and padding 1. Sums are in float32 (float64 for float64).

    Args:
        x: (N, C, H, W), contiguous in channels-last memory format; bfloat16, float32 or float64.
        weight: (C, 1, 3, 3), contiguous; it is rounded to `x`'s type, and its gradient has its own.

    Returns:
        (N, C, H, W), as `x` in type and memory format.

    Raises:
        RuntimeError: on a second derivative.
    """
    return Depthwise.apply(x, weight)


def shift3x3(x: Tensor) -> Tensor:
    """`Shift2d` with a 3 x 3 window, stride 1, dilation 1 and zeros from outside the image.

    Args:
        x: (N, C, H, W), contiguous in channels-last memory format.

    Returns:
        (N, C, H, W), as `x` in type and memory format.

    Raises:
        RuntimeError: on a second derivative.
    """
    return Shifted.apply(x)
