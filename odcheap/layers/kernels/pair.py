"""A `CheapConv` fused with the batch norm, ReLU and residual that follow it: two kernels forward, three backward."""

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from odcheap.layers.kernels import Pair, is_interpreted
from odcheap.layers.kernels.norm import ACT_ADD, NO_RESIDUAL, chunk_gradients, normalize, plan_norm, sum_types
from odcheap.layers.kernels.pair_kernels import pair_backward, pair_forward, spatial_backward
from odcheap.layers.kernels.spatial import LAUNCH, map_sizes, plan_elements

MAX_GROUP = 1  # channels of a group of the 3 x 3 convolution, which is depth-wise
MAX_CHANNELS = 64  # of the input and of the output: matrix products of more take too many registers
# The dtypes that `pair_norm_act` supports; float64 is for the tests, in Triton's interpreter.
PAIR_TYPES = (torch.bfloat16, torch.float32, *([torch.float64] if is_interpreted() else []))
MAX_CHUNKS = 512  # of one tile each in CIFAR's three stages: a loop over tiles takes many registers
TILE_ELEMENTS = 4096  # of a tile in bfloat16: 16 for each thread
FLOAT32_ROWS = 32  # of a tile in float32, for which matrix products do not use tensor cores
MIN_SIDE = 16  # rows and channels of a matrix product
PAIR_LAUNCH = {"num_warps": 8, "num_stages": 1}
MAX_REGISTERS = 128  # of a thread, so that two programs of the backward pass fit on a multiprocessor
INPUT_PROGRAMS = 512  # programs of the input's gradient, or more:
INPUT_ELEMENTS = 2048  # at most so many elements for such a program, 16 a thread: more take more registers
SUMMED_ELEMENTS = 8192  # chunks x columns, of a program that adds up the weights' gradients


class PairPlan(NamedTuple):
    """How the output of the 1 x 1 convolution is divided among programs, the thread blocks of a GPU kernel.

    A row is one pixel of one image. Each program works on a chunk of rows, which it reads in tiles.

    The fields after `chunks` are arguments of both the forward and the backward kernel, in the kernels' order.

    Attributes:
        rows: The number of rows: pixels of all images in the output.
        chunks: The number of chunks of rows; there is one program for each.
        is_shift: Whether the spatial operator is a shift; otherwise it is a depth-wise convolution.
        stride: The stride of the 1 x 1 convolution.
        height: The height of the input in pixels.
        width: The width of the input in pixels.
        in_channels: The number of input channels.
        out_channels: The number of output channels.
        padded_in: `in_channels`, rounded up to a power of two and to MIN_SIDE.
        padded_out: `out_channels`, rounded up in the same way.
        tile_rows: The number of rows of a tile.
        tiles: The number of tiles of a chunk.
    """

    rows: int
    chunks: int
    is_shift: bool
    stride: int
    height: int
    width: int
    in_channels: int
    out_channels: int
    padded_in: int
    padded_out: int
    tile_rows: int
    tiles: int


def plan_pair(x: Tensor, is_shift: bool, out_channels: int, stride: int) -> PairPlan:
    """Returns how the output of a `CheapConv` is divided among programs, the thread blocks of a GPU kernel.

    Args:
        x: The input, (N, C, H, W).
        is_shift: Whether the spatial operator is a shift; otherwise it is a depth-wise convolution.
        out_channels: The number of channels of the output.
        stride: The stride of the 1 x 1 convolution.
    """
    # Padded sizes are at least MIN_SIDE, the smallest side of a matrix product.
    images, channels, height, width = x.shape
    rows = images * triton.cdiv(height, stride) * triton.cdiv(width, stride)
    padded_in, padded_out = (max(triton.next_power_of_2(c), MIN_SIDE) for c in (channels, out_channels))
    tile_rows = TILE_ELEMENTS // max(padded_in, padded_out) if x.dtype == torch.bfloat16 else FLOAT32_ROWS
    tile_rows = min(tile_rows, max(triton.next_power_of_2(rows), MIN_SIDE))
    tiles = triton.cdiv(triton.cdiv(rows, tile_rows), MAX_CHUNKS)
    chunks = triton.cdiv(rows, tiles * tile_rows)
    sizes = (height, width, channels, out_channels, padded_in, padded_out)
    return PairPlan(rows, chunks, is_shift, stride, *sizes, tile_rows, tiles)


def empty_output(x: Tensor, channels: int, stride: int) -> Tensor:
    """Returns a new channels-last tensor for the output of a convolution; its values are not set.

    Args:
        x: The input (N, C, H, W), whose dtype and device the output has.
        channels: The number of channels of the output.
        stride: The stride of the convolution.

    Returns:
        (N, channels, ceil(H / stride), ceil(W / stride)).
    """
    shape = (len(x), channels, triton.cdiv(x.shape[2], stride), triton.cdiv(x.shape[3], stride))
    return torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=torch.channels_last)


def factor_type(dtype: torch.dtype) -> tl.dtype:
    """Returns the Triton dtype to which the factors of matrix products are cast, for feature maps of a dtype."""
    # Triton's interpreter has no matrix products of bfloat16.
    return tl.bfloat16 if dtype == torch.bfloat16 and not is_interpreted() else sum_types(dtype)[1]


class PairNormAct(torch.autograd.Function):
    """The autograd function of `pair_norm_act`.

    It saves its inputs, the output of the 1 x 1 convolution, and the statistics of the batch norm.
    """

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
        # First kernel: z, the output of the 1 x 1 convolution, and its statistics in each chunk. The kernels do not
        # read the pointer of a depth-wise kernel or of a residual that is None, so any tensor can be given.
        plan, (dtype, acc), features = (
            plan_pair(x, kernel is None, len(weight), stride),
            sum_types(x.dtype),
            len(weight),
        )
        z = empty_output(x, features, stride)
        y, saved = torch.empty_like(z), torch.empty(2, features, dtype=dtype, device=x.device)
        partial = torch.empty(2, plan.chunks, features, dtype=dtype, device=x.device)
        pointers = (x, x if kernel is None else kernel, weight, z, partial)
        pair_forward[(plan.chunks,)](*pointers, *plan, factor_type(x.dtype), acc, **PAIR_LAUNCH)

        # Second kernel: batch norm, ReLU and residual. It divides z in its own way, but reads the statistics of the
        # first kernel's chunks.
        norm_plan, order = plan_norm(z), NO_RESIDUAL if residual is None else ACT_ADD
        buffers = (norm.running_mean, norm.running_var, norm.num_batches_tracked)
        pointers = (z, z if residual is None else residual, y, gamma, beta, partial, saved, *buffers)
        sizes = (*norm_plan._replace(chunks=plan.chunks), triton.next_power_of_2(plan.chunks))
        options = (plan.tile_rows * plan.tiles, float(norm.eps), float(norm.momentum), order, acc)
        normalize[norm_plan.grid](*pointers, *sizes, *options, **norm_plan.launch)
        torch.autograd.graph.increment_version(buffers)

        # The second output is the input again, so that its gradient arrives here and can be added to dx. It is None,
        # not zeros, if nothing reads that output.
        ctx.set_materialize_grads(False)
        ctx.stride, ctx.has_residual = stride, residual is not None
        ctx.save_for_backward(x, kernel, weight, gamma, beta, z, saved)
        return y, x.view_as(x)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor | None, dinput: Tensor | None) -> tuple[Tensor | None, ...]:
        if dy is None:
            return dinput, *(None,) * 7
        x, kernel, weight, gamma, beta, z, saved = ctx.saved_tensors
        is_shift, channels, features = kernel is None, x.shape[1], len(weight)
        plan, norm_plan, (dtype, acc) = plan_pair(x, is_shift, features, ctx.stride), plan_norm(z), sum_types(x.dtype)
        dy = dy.contiguous(memory_format=torch.channels_last)
        dgamma, dbeta, dx, dweight = (torch.empty_like(t) for t in (gamma, beta, x, weight))
        dkernel = None if kernel is None else torch.empty_like(kernel)
        kernel = x if kernel is None else kernel  # not read for a shift

        # First kernel: the sums over all rows that the batch norm's gradient needs.
        sums = torch.empty(2, norm_plan.chunks, features, dtype=dtype, device=x.device)
        pointers = (dy, z, z, gamma, beta, saved, sums)
        chunk_gradients[norm_plan.grid](*pointers, *norm_plan, NO_RESIDUAL, acc, **norm_plan.launch)

        # Second kernel: the gradient through the batch norm and the 1 x 1 convolution. Each chunk writes the sums of
        # the weights' gradients over its own rows.
        columns = (features + (0 if is_shift else 9)) * channels
        partial = torch.empty(plan.chunks, columns, dtype=dtype, device=x.device)
        ds = empty_output(x, channels, ctx.stride)
        pair_backward[(plan.chunks,)](
            *(dy, z, gamma, beta, saved, sums, x, kernel, weight, ds, partial, dgamma, dbeta),
            *(plan.rows, norm_plan.chunks, *plan[2:], norm_plan.parts, columns, factor_type(x.dtype), acc),
            maxnreg=MAX_REGISTERS if x.dtype == torch.bfloat16 else None,
            **PAIR_LAUNCH,
        )

        # Third kernel: the gradient through the spatial operator; further programs of it add up the chunks' sums of the
        # weights' gradients.
        parts = triton.next_power_of_2(plan.chunks)
        group = min(max(SUMMED_ELEMENTS // parts, 16), 64)
        (programs, _), block, rows = plan_elements(x, max(INPUT_PROGRAMS, x.numel() // INPUT_ELEMENTS))
        added = None if dinput is None else dinput.contiguous(memory_format=torch.channels_last)
        pixels, height, width, _ = map_sizes(x)
        spatial_backward[(programs + triton.cdiv(columns, group),)](
            *(ds, kernel, dx if added is None else added, dx, partial, dweight, dweight if is_shift else dkernel),
            *(pixels, plan.chunks, programs, is_shift, added is not None, ctx.stride, height, width),
            *(channels, block, rows, features * channels, columns, parts, group, acc),
            **LAUNCH,
        )
        return dx, dkernel, dweight, dgamma, dbeta, dy if ctx.has_residual else None, None, None


def pair_norm_act(x: Tensor, pair: Pair, residual: Tensor | None) -> tuple[Tensor, Tensor]:
    """Returns relu(norm(conv1x1(spatial(x)))) + residual in training mode, and x.

    Sums are computed in float32, or in float64 if `x` is float64. The outputs of the spatial operator and of the 1 x 1
    convolution, and the gradients of both, are rounded to the dtype of `x`, as PyTorch's modules do. The weights are
    rounded as autocast rounds them; their gradients are not rounded.

    Args:
        x: (N, C, H, W), contiguous in channels-last memory format; bfloat16 or float32 (float64 only if Triton's
            interpreter runs the kernels).
        pair: The layers, with a depth-wise convolution or a shift; C and O are 64 or less.
        residual: (N, O, H', W') with the size of the result, and the dtype and memory format of `x`; None to add
            nothing.

    Returns:
        The result (N, O, H', W'), and `x`. Other layers that read `x` should read this returned tensor: its gradient is
        then added without another kernel.

    Raises:
        RuntimeError: In the backward pass, if a second derivative is computed.
    """
    norm = pair.norm
    return PairNormAct.apply(x, pair.kernel, pair.weight, norm.weight, norm.bias, residual, norm, pair.stride)
