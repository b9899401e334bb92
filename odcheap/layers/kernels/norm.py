"""Training batch norm with what follows it (ReLU, and a residual before or after it): two kernels each way."""

from typing import Any, Literal, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from odcheap.layers.kernels.norm_kernels import chunk_gradients, chunk_statistics, input_gradient, normalise

Order = Literal["act_add", "add_act"]

CHANNELS = 16  # of a program: 32 bytes in bfloat16, the least that a GPU reads; few, so that chunks are few as well
PROGRAMS = 128  # about one for each of an H100's 132 multiprocessors; each reads its channels' sums of all chunks
MOST_ROWS = 1024  # of a program at a time
LEAST_ROWS = 16
ALONE, ACT_ADD, ADD_ACT = 0, 1, 2  # no residual; relu(bn(x)) + residual; relu(bn(x) + residual)


class Plan(NamedTuple):
    """How (N, C, H, W) is cut: chunks of `tiles` * `per_tile` rows, blocks of `block` channels."""

    rows: int
    chunks: int
    block: int
    blocks: int
    per_tile: int
    tiles: int

    @property
    def warps(self) -> int:
        """32 elements a thread."""
        return min(max(self.per_tile * self.block // 1024, 4), 16)

    @property
    def parts(self) -> int:
        """The chunks' number as a power of two."""
        return triton.next_power_of_2(self.chunks)

    @property
    def chunk_rows(self) -> int:
        """The rows of a chunk."""
        return self.per_tile * self.tiles


def plan(x: Tensor) -> Plan:
    """Such that the programs are about PROGRAMS: few chunks where channels are many."""
    rows, channels = x.numel() // x.shape[1], x.shape[1]
    block = min(triton.next_power_of_2(channels), CHANNELS)
    blocks = triton.cdiv(channels, block)
    wished = triton.cdiv(rows * min(blocks, PROGRAMS), PROGRAMS)  # rows a program
    per_tile = min(max(triton.next_power_of_2(wished), LEAST_ROWS), MOST_ROWS)
    tiles = triton.cdiv(wished, per_tile)
    return Plan(rows, triton.cdiv(rows, per_tile * tiles), block, blocks, per_tile, tiles)


def accumulator(dtype: torch.dtype) -> tuple[torch.dtype, tl.dtype]:
    """The type of sums, for PyTorch and for Triton."""
    return (torch.float64, tl.float64) if dtype == torch.float64 else (torch.float32, tl.float32)


class BatchNormAct(torch.autograd.Function):
    """`batch_norm_act` for autograd; saves the input, the statistics and, for ADD_ACT, the output."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, residual: Tensor | None, norm: nn.BatchNorm2d, order: int
    ) -> Tensor:
        cut, (kept, acc), channels = plan(x), accumulator(x.dtype), x.shape[1]
        y = torch.empty_like(x)
        partial = torch.empty(2, cut.chunks, channels, dtype=kept, device=x.device)
        saved = torch.empty(2, channels, dtype=kept, device=x.device)
        grid, launch = (cut.chunks, cut.blocks), {"num_warps": cut.warps, "num_stages": 1}
        chunk_statistics[grid](
            x, partial, cut.rows, cut.chunks, channels, cut.block, cut.per_tile, cut.tiles, acc, **launch
        )
        buffers = (norm.running_mean, norm.running_var, norm.num_batches_tracked)
        pointers = (x, x if residual is None else residual, y, weight, bias, partial, saved, *buffers)
        sizes = (cut.rows, cut.chunks, channels, cut.block, cut.per_tile, cut.tiles, cut.parts, cut.chunk_rows)
        normalise[grid](*pointers, *sizes, float(norm.eps), float(norm.momentum), order, acc, **launch)
        torch.autograd.graph.increment_version(buffers)
        ctx.order = order
        ctx.save_for_backward(x, weight, bias, saved, *([y] if order == ADD_ACT else []))
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, bias, saved, *output = ctx.saved_tensors
        cut, (kept, acc), channels = plan(x), accumulator(x.dtype), x.shape[1]
        dy = dy.contiguous(memory_format=torch.channels_last)
        dx, dweight, dbias = torch.empty_like(x), torch.empty_like(weight), torch.empty_like(bias)
        after_sum = ctx.order == ADD_ACT
        y, dresidual = (output[0], torch.empty_like(x)) if after_sum else (x, dx)
        partial = torch.empty(2, cut.chunks, channels, dtype=kept, device=x.device)
        grid, launch = (cut.chunks, cut.blocks), {"num_warps": cut.warps, "num_stages": 1}
        pointers, sizes = (dy, x, y, weight, bias, saved, partial), (cut.rows, cut.chunks, channels, cut.block)
        chunk_gradients[grid](*pointers, *sizes, cut.per_tile, cut.tiles, ctx.order, acc, **launch)
        made = (dx, dresidual, dweight, dbias)
        input_gradient[grid](*pointers, *made, *sizes, cut.per_tile, cut.tiles, cut.parts, ctx.order, acc, **launch)
        through = {ALONE: None, ACT_ADD: dy, ADD_ACT: dresidual}[ctx.order]
        return dx, dweight, dbias, through, None, None


def batch_norm_act(x: Tensor, norm: nn.BatchNorm2d, residual: Tensor | None = None, order: Order = "act_add") -> Tensor:
    """Batch norm in training mode, ReLU and, where there is a residual, the sum with it.

    Updates the running statistics and `num_batches_tracked` as `norm` would. Sums are in float32 (float64 for float64).

    Args:
        x: (N, C, H, W), contiguous in channels-last memory format, with two pixels a channel or more; bfloat16, float32
            or float64.
        norm: affine, with running statistics and a momentum; its parameters are float32, or float64 for float64.
        residual: as `x` in shape, type and memory format.
        order: "act_add" for relu(norm(x)) + residual, "add_act" for relu(norm(x) + residual).

    Returns:
        (N, C, H, W), as `x` in type and memory format. It must not be changed in place where `order` is "add_act".

    Raises:
        RuntimeError: on a second derivative.
    """
    code = ALONE if residual is None else ACT_ADD if order == "act_add" else ADD_ACT
    return BatchNormAct.apply(x, norm.weight, norm.bias, residual, norm, code)
