"""The fused operators of training steps on channels-last feature maps, for GPUs; `*_kernels.py` has the Triton kernels.

A row is one pixel of one image with all its channels. A program is a thread block; it works on a chunk of rows, which
it may read in several tiles. Sums over pixels have two stages: each program writes the sums of its own chunk, and the
next kernel adds up these sums in a fixed order. No kernel uses atomics, so the results do not depend on the order in
which programs run.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from odcheap.layers.kernels import ACT_ADD, NO_RESIDUAL, Pair, empty_output, is_interpreted
from odcheap.layers.kernels.norm_kernels import chunk_gradients, chunk_statistics, input_gradient, normalize
from odcheap.layers.kernels.pair_kernels import pair_backward, pair_forward, spatial_backward
from odcheap.layers.kernels.spatial_kernels import depthwise_backward, spatial_forward, sum_chunks

# What `pairs_norm_act` supports.
MAX_PAIRS = 1  # successive pairs in one operator
MAX_GROUP = 1  # channels of a group of the 3 x 3 convolution, which is depth-wise
MAX_CHANNELS = 64  # of the input and of the output: matrix products of more take too many registers
# float64 is for the tests, in Triton's interpreter.
PAIR_TYPES = (torch.bfloat16, torch.float32, *([torch.float64] if is_interpreted() else []))

# Programs of a batch norm, and those of a depth-wise convolution that also sum over pixels:
CHANNELS = 16  # channels of a program: 32 bytes in bfloat16, a GPU's smallest read; few, so that there are few chunks
NORM_PROGRAMS = 128  # about one for each of an H100's 132 multiprocessors; each reads its channels' sums of all chunks
MIN_NORM_ROWS, MAX_NORM_ROWS = 16, 1024  # rows of a tile
SUM_PROGRAMS = 256
SUM_ROWS = 64  # rows of a tile: the nine sums of a depth-wise kernel then have 8 elements each in a thread
# Programs that write each output by itself:
WIDE = 64  # channels: 128 bytes in bfloat16, a cache line
CONV_PROGRAMS = 256  # few, since each thread first reads its channels' kernels and then wants many pixels
SHIFT_PROGRAMS = 1024
MAX_ELEMENTS, MIN_ELEMENTS = 4096, 512  # elements of a program: 32 and 4 for each thread
LAUNCH = {"num_warps": 4, "num_stages": 1}
# Programs of a pair:
MAX_CHUNKS = 512  # of one tile each in CIFAR's three stages: a loop over tiles takes many registers
TILE_ELEMENTS = 4096  # of a tile in bfloat16: 16 for each thread
FLOAT32_ROWS = 32  # of a tile in float32, for which matrix products do not use tensor cores
MIN_SIDE = 16  # rows and channels of a matrix product
PAIR_LAUNCH = {"num_warps": 8, "num_stages": 1}
MAX_REGISTERS = 128  # of a thread, so that two programs of the backward pass fit on a multiprocessor
INPUT_PROGRAMS = 512  # programs of the input's gradient, or more:
INPUT_ELEMENTS = 2048  # at most so many elements for such a program, 16 a thread: more take more registers
SUMMED_ELEMENTS = 8192  # chunks x columns, of a program that adds up the weights' gradients


def sum_types(dtype: torch.dtype) -> tuple[torch.dtype, tl.dtype]:
    """Returns the dtype of sums over a feature map: float64 if the map is float64, otherwise float32.

    Returns:
        A tuple: the dtype of PyTorch, and the equal dtype of Triton.
    """
    return (torch.float64, tl.float64) if dtype == torch.float64 else (torch.float32, tl.float32)


def factor_type(dtype: torch.dtype) -> tl.dtype:
    """Returns the Triton dtype to which the factors of matrix products are cast, for feature maps of a dtype."""
    # Triton's interpreter has no matrix products of bfloat16.
    return tl.bfloat16 if dtype == torch.bfloat16 and not is_interpreted() else sum_types(dtype)[1]


class NormPlan(NamedTuple):
    """How a feature map is divided among the programs of a batch norm.

    The fields are arguments of all kernels of a batch norm, in the kernels' order.

    Attributes:
        rows: The number of rows: pixels of all images.
        chunks: The number of chunks of rows.
        channels: The number of channels.
        block: The number of channels of a program.
        tile_rows: The number of rows of a tile.
        tiles: The number of tiles of a chunk.
    """

    rows: int
    chunks: int
    channels: int
    block: int
    tile_rows: int
    tiles: int

    @property
    def grid(self) -> tuple[int, int]:
        """The number of chunks and of blocks of channels; there is one program for each combination."""
        return self.chunks, triton.cdiv(self.channels, self.block)

    @property
    def launch(self) -> dict[str, int]:
        """The options `num_warps` and `num_stages` with which Triton launches the kernel.

        There is one warp for each 1024 elements of a tile, so that each thread has 32 elements. There are at least 4
        warps and at most 16.
        """
        return {"num_warps": min(max(self.tile_rows * self.block // 1024, 4), 16), "num_stages": 1}

    @property
    def parts(self) -> int:
        """The number of chunks, rounded up to a power of two."""
        return triton.next_power_of_2(self.chunks)


def plan_norm(x: Tensor) -> NormPlan:
    """Divides a feature map (N, C, H, W) among about 128 programs, each for a chunk of rows and a block of channels."""
    # The more blocks of channels there are, the fewer are the chunks of rows.
    rows, channels = x.numel() // x.shape[1], x.shape[1]
    block = min(triton.next_power_of_2(channels), CHANNELS)
    blocks = triton.cdiv(channels, block)
    chunk_rows = triton.cdiv(rows * min(blocks, NORM_PROGRAMS), NORM_PROGRAMS)
    tile_rows = min(max(triton.next_power_of_2(chunk_rows), MIN_NORM_ROWS), MAX_NORM_ROWS)
    tiles = triton.cdiv(chunk_rows, tile_rows)
    return NormPlan(rows, triton.cdiv(rows, tile_rows * tiles), channels, block, tile_rows, tiles)


def norm_forward(
    x: Tensor, residual: Tensor | None, y: Tensor, norm: nn.BatchNorm2d, saved: Tensor, order: int
) -> None:
    """Writes batch norm, ReLU and the sum with a residual to `y`, and updates the running statistics.

    Args:
        x: The input, (N, C, H, W).
        residual: The feature map that is added, or None.
        y: The tensor to which the output is written.
        norm: The batch norm.
        saved: (2, C), to which mean and 1 / standard deviation of each channel are written.
        order: `NO_RESIDUAL`, `ACT_ADD` (the residual is added after the ReLU) or `ADD_ACT` (before it).
    """
    # First kernel: the statistics of each chunk.
    plan, (dtype, acc) = plan_norm(x), sum_types(x.dtype)
    partial = torch.empty(2, plan.chunks, plan.channels, dtype=dtype, device=x.device)
    chunk_statistics[plan.grid](x, partial, *plan, acc, **plan.launch)
    # Second kernel: the output. Without a residual it does not read that pointer, so any tensor can be given.
    pointers = (x, x if residual is None else residual, y, norm.weight, norm.bias, partial, saved, *norm.buffers())
    sizes = (*plan, plan.parts, plan.tile_rows * plan.tiles)
    normalize[plan.grid](*pointers, *sizes, float(norm.eps), float(norm.momentum), order, acc, **plan.launch)


def norm_backward(
    dy: Tensor, y: Tensor | None, inputs: Sequence[Tensor], gradients: Sequence[Tensor | None], order: int
) -> None:
    """Writes the gradients of batch norm, ReLU and the sum with a residual, which `norm_forward` computed.

    Args:
        dy: The gradient of the output.
        y: The output; None unless the order is `ADD_ACT`.
        inputs: Four tensors: the input, the weight and the bias of the batch norm, and `saved` of `norm_forward`.
        gradients: Four tensors to which the gradients are written: those of the input, of the residual (None unless the
            order is `ADD_ACT`), of the weight and of the bias.
        order: `NO_RESIDUAL`, `ACT_ADD` (the residual is added after the ReLU) or `ADD_ACT` (before it).
    """
    x, *others = inputs
    plan, (dtype, acc) = plan_norm(x), sum_types(x.dtype)
    partial = torch.empty(2, plan.chunks, plan.channels, dtype=dtype, device=x.device)
    # Pointers that a kernel does not read or write may be those of any tensor.
    pointers = (dy, x, x if y is None else y, *others, partial)
    gradients = [x if gradient is None else gradient for gradient in gradients]
    chunk_gradients[plan.grid](*pointers, *plan, order, acc, **plan.launch)
    input_gradient[plan.grid](*pointers, *gradients, *plan, plan.parts, order, acc, **plan.launch)


def plan_elements(x: Tensor, programs: int) -> tuple[tuple[int, int], int, int]:
    """Returns how to divide a feature map among programs that compute each output element separately.

    Args:
        x: The feature map, (N, C, H, W).
        programs: The approximate number of programs.

    Returns:
        A tuple: the grid, which is (number of chunks of rows, number of blocks of channels); the number of channels of
        a program; and the number of rows of a program.
    """
    rows, channels = x.numel() // x.shape[1], x.shape[1]
    block = min(triton.next_power_of_2(channels), WIDE)
    elements = triton.next_power_of_2(triton.cdiv(x.numel(), programs))
    program_rows = min(max(elements, MIN_ELEMENTS), MAX_ELEMENTS) // block
    return (triton.cdiv(rows, program_rows), triton.cdiv(channels, block)), block, program_rows


def plan_sums(x: Tensor) -> tuple[tuple[int, int], int, int]:
    """Returns how to divide a feature map (N, C, H, W) among about 256 programs, each of which sums over some pixels.

    Returns:
        A tuple: the grid, which is (number of chunks of rows, number of blocks of channels); the number of channels of
        a program; and the number of tiles of a program. A tile has 64 rows.
    """
    rows, channels = x.numel() // x.shape[1], x.shape[1]
    block = min(triton.next_power_of_2(channels), CHANNELS)
    blocks = triton.cdiv(channels, block)
    tiles = triton.cdiv(rows * min(blocks, SUM_PROGRAMS), SUM_PROGRAMS * SUM_ROWS)
    return (triton.cdiv(rows, tiles * SUM_ROWS), blocks), block, tiles


def map_sizes(x: Tensor) -> tuple[int, int, int, int]:
    """Returns the sizes of a feature map (N, C, H, W) in the order of the kernels' arguments: N * H * W, H, W and C."""
    images, channels, height, width = x.shape
    return images * height * width, height, width, channels


def run_spatial(x: Tensor, kernel: Tensor | None, programs: int, sign: int = 1) -> Tensor:
    """Returns x (N, C, H, W) after a 3 x 3 shift or depth-wise convolution with stride 1 and padding 1.

    Args:
        x: The input, contiguous in channels-last memory format.
        kernel: The weights (C, 1, 3, 3) of the depth-wise convolution; None for a shift.
        programs: The approximate number of programs.
        sign: 1 for the offsets of `Shift2d`, -1 for the opposite ones, which are those of a shift's gradient.
    """
    (rows, *sizes), y = map_sizes(x), torch.empty_like(x)
    grid, *block = plan_elements(x, programs)
    pointers, shift = (x, x if kernel is None else kernel, y), sign if kernel is None else 0
    spatial_forward[grid](*pointers, rows, shift, *sizes, *block, sum_types(x.dtype)[1], **LAUNCH)
    return y


class Depthwise(torch.autograd.Function):
    """The autograd function of `depthwise3x3`; it saves its inputs."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        return run_spatial(x, weight, CONV_PROGRAMS)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        channels, (dtype, acc) = x.shape[1], sum_types(x.dtype)
        dy = dy.contiguous(memory_format=torch.channels_last)
        dx, dweight = torch.empty_like(x), torch.empty_like(weight)
        grid, block, tiles = plan_sums(x)
        chunks = grid[0]
        partial = torch.empty(chunks, 9, channels, dtype=dtype, device=x.device)
        depthwise_backward[grid](dy, x, weight, dx, partial, *map_sizes(x), block, SUM_ROWS, tiles, acc, **LAUNCH)
        # The second kernel adds up the chunks' sums of the weights' gradient.
        programs, parts = triton.cdiv(9 * channels, CHANNELS), triton.next_power_of_2(chunks)
        sum_chunks[(programs,)](partial, dweight, chunks, channels, CHANNELS, parts, **LAUNCH)
        return dx, dweight


class ShiftFunction(torch.autograd.Function):
    """The autograd function of `shift3x3`; the gradient is the opposite shift."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return run_spatial(x, None, SHIFT_PROGRAMS)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> Tensor:
        return run_spatial(dy.contiguous(memory_format=torch.channels_last), None, SHIFT_PROGRAMS, sign=-1)


def depthwise3x3(x: Tensor, weight: Tensor) -> Tensor:
    """Returns the depth-wise 3 x 3 convolution of x with stride 1 and padding 1.

    Sums are computed in float32, or in float64 if `x` is float64.

    Args:
        x: (N, C, H, W), contiguous in channels-last memory format; bfloat16, float32 or float64.
        weight: (C, 1, 3, 3), contiguous. Its values are rounded to the dtype of `x`; its gradient is not.

    Returns:
        (N, C, H, W), with the dtype and memory format of `x`.

    Raises:
        RuntimeError: In the backward pass, if a second derivative is computed.
    """
    return Depthwise.apply(x, weight)


def shift3x3(x: Tensor) -> Tensor:
    """Computes the same as `Shift2d` with a 3 x 3 window, stride 1, dilation 1 and zero padding of 1.

    Args:
        x: (N, C, H, W), contiguous in channels-last memory format.

    Returns:
        (N, C, H, W), with the dtype and memory format of `x`.

    Raises:
        RuntimeError: In the backward pass, if a second derivative is computed.
    """
    return ShiftFunction.apply(x)


class PairPlan(NamedTuple):
    """How the output of the 1 x 1 convolution of a pair is divided among programs, each for a chunk of rows.

    The fields after `chunks` are arguments of both the forward and the backward kernel, in the kernels' order.

    Attributes:
        rows: The number of rows: pixels of all images in the output.
        chunks: The number of chunks of rows; there is one program for each.
        shift: 1 if the spatial operator is a shift, 0 if it is a depth-wise convolution.
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
    shift: int
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
    """Returns how the output of a pair is divided among programs.

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
    return PairPlan(rows, chunks, int(is_shift), stride, *sizes, tile_rows, tiles)


class PairNormAct(torch.autograd.Function):
    """A spatial operator, a 1 x 1 convolution, a batch norm and a ReLU in one autograd function, with Triton kernels.

    `pairs_norm_act` calls it. For the backward pass it saves its inputs, the output of the 1 x 1 convolution, and the
    statistics of the batch norm.
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
        features, (dtype, acc) = len(weight), sum_types(x.dtype)
        plan = plan_pair(x, kernel is None, features, stride)
        z = empty_output(x, features, stride)
        y, saved = torch.empty_like(z), torch.empty(2, features, dtype=dtype, device=x.device)
        partial = torch.empty(2, plan.chunks, features, dtype=dtype, device=x.device)
        pointers = (x, x if kernel is None else kernel, weight, z, partial)
        pair_forward[(plan.chunks,)](*pointers, *plan, factor_type(x.dtype), acc, **PAIR_LAUNCH)

        # Second kernel: batch norm, ReLU and residual. It divides z in its own way, but reads the statistics of the
        # first kernel's chunks.
        norm_plan, order = plan_norm(z), NO_RESIDUAL if residual is None else ACT_ADD
        buffers = tuple(norm.buffers())
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
            *(pixels, plan.chunks, programs, plan.shift, added is not None, ctx.stride, height, width),
            *(channels, block, rows, features * channels, columns, parts, group, acc),
            **LAUNCH,
        )
        return dx, dkernel, dweight, dgamma, dbeta, dy if ctx.has_residual else None, None, None


def pairs_norm_act(x: Tensor, pairs: Sequence[Pair], residual: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Computes relu(norm(conv1x1(spatial(x)))) + residual in training mode by fused kernels.

    Sums are computed in float32, or in float64 if `x` is float64. The outputs of the spatial operator and of the 1 x 1
    convolution, and the gradients of both, are rounded to the dtype of `x`, as PyTorch's modules do. The weights are
    rounded as autocast rounds them; their gradients are not rounded.

    Args:
        x: (N, C, H, W), contiguous in channels-last memory format; bfloat16 or float32 (float64 only if Triton's
            interpreter runs the kernels).
        pairs: One pair, with a depth-wise convolution or a shift; C and O are 64 or less.
        residual: (N, O, H', W') with the size of the result, and the dtype and memory format of `x`; None to add
            nothing.

    Returns:
        A tuple: the result (N, O, H', W'), and `x`. Other layers that read `x` should read this returned tensor: its
        gradient is then added without another kernel.

    Raises:
        RuntimeError: In the backward pass, if a second derivative is computed.
    """
    ((kernel, weight, norm, stride),) = pairs
    return PairNormAct.apply(x, kernel, weight, norm.weight, norm.bias, residual, norm, stride)
