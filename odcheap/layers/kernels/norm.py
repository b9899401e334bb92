"""Batch norm in training mode, fused with a ReLU and the sum with a residual: two Triton kernels forward, two backward.

In all kernels a row is one pixel of one image, and a tile is a block of rows x channels. A program works on one chunk,
which is TILES tiles of ROWS rows, and on BLOCK of the C channels. ACC is the dtype in which sums are computed. x_hat is
the normalized input, and the prefix d stands for the gradient of a tensor.
"""

from typing import Any, Literal, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

Order = Literal["act_add", "add_act"]

CHANNELS = 16  # channels of a program: 32 bytes in bfloat16, a GPU's smallest read; few, so that there are few chunks
PROGRAMS = 128  # about one for each of an H100's 132 multiprocessors; each reads its channels' sums of all chunks
MAX_ROWS = 1024  # rows of a tile
MIN_ROWS = 16
NO_RESIDUAL, ACT_ADD, ADD_ACT = 0, 1, 2  # relu(bn(x)); relu(bn(x)) + residual; relu(bn(x) + residual)


@triton.jit
def tile_mask(row, rows, channel, C: tl.constexpr, BLOCK: tl.constexpr):
    """Returns the mask of a tile, (ROWS, BLOCK) or (ROWS, 1): whether an element lies inside of the tensor.

    Args:
        row: The numbers of the tile's rows, (ROWS,).
        rows: The number of rows of the tensor.
        channel: The numbers of the tile's channels, (BLOCK,).
        C: The number of channels of the tensor.
        BLOCK: The number of channels of the tile.
    """
    # If BLOCK divides C, the mask is the same for all channels, and the compiler can load many channels at once.
    ok = (row < rows)[:, None]
    if C % BLOCK != 0:
        ok = ok & (channel < C)[None, :]
    return ok


@triton.jit
def merge_tile(x, ok, left, earlier, mean, squares, ROWS: tl.constexpr, ACC: tl.constexpr):
    """Returns the mean and the sum of squared deviations of each channel, with the rows of a tile added.

    Args:
        x: The tile, (ROWS, BLOCK); it is zero where the mask is false.
        ok: The mask of the tile.
        left: The number of rows from the tile's first row to the tensor's end; at most ROWS of them are in the tile.
        earlier: The number of rows that `mean` and `squares` already contain.
        mean: The mean of these rows, (BLOCK,).
        squares: Their sum of squared deviations from that mean, (BLOCK,).
        ROWS: The number of rows of a tile.
        ACC: The dtype of sums.
    """
    # The statistics of the tile alone, then those of both parts together (Chan, Golub, LeVeque, 1979).
    count = tl.minimum(tl.maximum(left, 0), ROWS).to(ACC)
    tile_mean = tl.sum(x, axis=0) / tl.maximum(count, 1.0)
    away = tl.where(ok, x - tile_mean[None, :], 0.0)
    distance = tile_mean - mean
    before = earlier.to(ACC)
    share = count / tl.maximum(before + count, 1.0)  # 0 for a tile beyond the last row
    squares += tl.sum(away * away, axis=0) + distance * distance * before * share
    return mean + distance * share, squares


@triton.jit
def chunk_statistics(
    x_ptr,
    partial_ptr,
    rows,
    chunks,
    C: tl.constexpr,
    BLOCK: tl.constexpr,
    ROWS: tl.constexpr,
    TILES: tl.constexpr,
    ACC: tl.constexpr,
):
    """Triton kernel that computes the mean and the sum of squared deviations of each channel, in each chunk of rows.

    It reads x, a matrix (rows, C) with one pixel of one image in each row, and writes partial (2, chunks, C): the
    means, then the sums. A program computes them for one chunk, which has TILES * ROWS rows, and for BLOCK channels.
    ACC is the dtype of the sums.
    """
    # One program for each chunk of rows and block of channels.
    chunk = tl.program_id(0)
    channel = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mean = tl.zeros([BLOCK], ACC)
    squares = tl.zeros([BLOCK], ACC)
    for tile in range(TILES):
        first = (chunk * TILES + tile) * ROWS
        row = first + tl.arange(0, ROWS)
        ok = tile_mask(row, rows, channel, C, BLOCK)
        x = tl.load(x_ptr + row[:, None] * C + channel[None, :], mask=ok, other=0.0).to(ACC)
        earlier = first - chunk * TILES * ROWS
        mean, squares = merge_tile(x, ok, rows - first, earlier, mean, squares, ROWS, ACC)
    tl.store(partial_ptr + chunk * C + channel, mean, mask=channel < C)
    tl.store(partial_ptr + (chunks + chunk) * C + channel, squares, mask=channel < C)


@triton.jit
def combine_statistics(partial_ptr, rows, chunks, channel, C: tl.constexpr, PARTS: tl.constexpr, CHUNK: tl.constexpr):
    """Returns mean and sum of squared deviations of each channel over all rows (Chan, Golub, LeVeque, 1979).

    They are computed from partial (2, chunks, C), in which `chunk_statistics` has written those of chunks of CHUNK
    rows. PARTS is the number of chunks, rounded up to a power of two, and `channel` has the numbers of the program's
    channels, of C in all.
    """
    # The last chunk may have fewer rows, so each chunk's mean counts with its number of rows.
    part = tl.arange(0, PARTS)
    ok = (part < chunks)[:, None] & (channel < C)[None, :]
    at = part[:, None] * C + channel[None, :]
    means = tl.load(partial_ptr + at, mask=ok, other=0.0)
    squares = tl.load(partial_ptr + chunks * C + at, mask=ok, other=0.0)
    counts = tl.minimum(tl.maximum(rows - part * CHUNK, 0), CHUNK).to(means.dtype)[:, None]
    mean = tl.sum(means * counts, axis=0) / rows
    away = tl.where(ok, means - mean[None, :], 0.0)
    return mean, tl.sum(squares + away * away * counts, axis=0)


@triton.jit
def update_running(running_ptr, value, channel, C: tl.constexpr, MOMENTUM: tl.constexpr):
    """Updates a running mean or variance (C,) in place with its value in this batch, as `nn.BatchNorm2d` does.

    `value` has the values of the channels whose numbers are in `channel`.
    """
    old = tl.load(running_ptr + channel, mask=channel < C, other=0.0)
    tl.store(running_ptr + channel, old * (1.0 - MOMENTUM) + value * MOMENTUM, mask=channel < C)


@triton.jit
def normalize(
    x_ptr,
    residual_ptr,
    y_ptr,
    weight_ptr,
    bias_ptr,
    partial_ptr,
    saved_ptr,
    running_mean_ptr,
    running_var_ptr,
    tracked_ptr,
    rows,
    chunks,
    C: tl.constexpr,
    BLOCK: tl.constexpr,
    ROWS: tl.constexpr,
    TILES: tl.constexpr,
    PARTS: tl.constexpr,
    CHUNK: tl.constexpr,
    EPS: tl.constexpr,
    MOMENTUM: tl.constexpr,
    ORDER: tl.constexpr,
    ACC: tl.constexpr,
):
    """Triton kernel that writes y: batch norm, ReLU, and the sum with the residual.

    x, residual and y are matrices (rows, C) with one pixel of one image in each row. ORDER is `NO_RESIDUAL`, `ACT_ADD`
    or `ADD_ACT`. A program writes one chunk, which has TILES * ROWS rows, and BLOCK channels. The statistics come from
    partial (2, chunks, C), in which `chunk_statistics` has written those of chunks of CHUNK rows. The programs of the
    first chunk also write saved (2, C), the mean and 1 / standard deviation of each channel, and update the running
    statistics.
    """
    # Each program combines the statistics of its channels itself, which needs no kernel in between.
    chunk = tl.program_id(0)
    channel = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    known = channel < C
    mean, squares = combine_statistics(partial_ptr, rows, chunks, channel, C, PARTS, CHUNK)
    rstd = 1.0 / tl.sqrt(squares / rows + EPS)
    if chunk == 0:
        tl.store(saved_ptr + channel, mean, mask=known)
        tl.store(saved_ptr + C + channel, rstd, mask=known)
        update_running(running_mean_ptr, mean, channel, C, MOMENTUM)
        update_running(running_var_ptr, squares / (rows - 1), channel, C, MOMENTUM)  # unbiased, as in nn.BatchNorm2d
        if tl.program_id(1) == 0:
            tl.store(tracked_ptr, tl.load(tracked_ptr) + 1)
    # The output, a tile after the other.
    weight = tl.load(weight_ptr + channel, mask=known, other=0.0).to(ACC)
    bias = tl.load(bias_ptr + channel, mask=known, other=0.0).to(ACC)
    for tile in range(TILES):
        row = (chunk * TILES + tile) * ROWS + tl.arange(0, ROWS)
        ok = tile_mask(row, rows, channel, C, BLOCK)
        at = row[:, None] * C + channel[None, :]
        x = tl.load(x_ptr + at, mask=ok, other=0.0).to(ACC)
        y = (x - mean[None, :]) * rstd[None, :] * weight[None, :] + bias[None, :]
        if ORDER == 2:  # ADD_ACT
            y += tl.load(residual_ptr + at, mask=ok, other=0.0).to(ACC)
        y = tl.where(y <= 0.0, 0.0, y)  # keeps NaN, as PyTorch's ReLU does
        if ORDER == 1:  # ACT_ADD
            y += tl.load(residual_ptr + at, mask=ok, other=0.0).to(ACC)
        tl.store(y_ptr + at, y.to(y_ptr.dtype.element_ty), mask=ok)


@triton.jit
def load_norm(saved_ptr, weight_ptr, bias_ptr, channel, C: tl.constexpr, ACC: tl.constexpr):
    """Returns mean, 1 / standard deviation, weight and bias of a batch norm, (BLOCK,) each, in the dtype ACC.

    The first two come from saved (2, C), which `normalize` has written. `channel` has the numbers of the channels.
    """
    known = channel < C
    mean = tl.load(saved_ptr + channel, mask=known, other=0.0)
    rstd = tl.load(saved_ptr + C + channel, mask=known, other=0.0)
    weight = tl.load(weight_ptr + channel, mask=known, other=0.0).to(ACC)
    bias = tl.load(bias_ptr + channel, mask=known, other=0.0).to(ACC)
    return mean, rstd, weight, bias


@triton.jit
def relu_gradient(dy_ptr, y_ptr, at, ok, x_hat, weight, bias, ORDER: tl.constexpr, ACC: tl.constexpr):
    """Returns a tile of the gradient of the ReLU's input: dy where that input is positive, otherwise zero.

    `at` has the positions of the tile's elements in dy and y, and `ok` is the tile's mask. Whether the input is
    positive is read from the output y if ORDER is `ADD_ACT`, otherwise computed from the normalized input x_hat, the
    weight and the bias.
    """
    # relu(bn(x) + residual) has the sign of the output y; otherwise the ReLU's input is computed again from x_hat.
    dy = tl.load(dy_ptr + at, mask=ok, other=0.0).to(ACC)
    if ORDER == 2:  # noqa: SIM108 - Triton prunes an untaken branch, not an untaken operand
        sign = tl.load(y_ptr + at, mask=ok, other=0.0).to(ACC)
    else:
        sign = x_hat * weight[None, :] + bias[None, :]
    return tl.where(sign <= 0.0, 0.0, dy)


@triton.jit
def chunk_gradients(
    dy_ptr,
    x_ptr,
    y_ptr,
    weight_ptr,
    bias_ptr,
    saved_ptr,
    partial_ptr,
    rows,
    chunks,
    C: tl.constexpr,
    BLOCK: tl.constexpr,
    ROWS: tl.constexpr,
    TILES: tl.constexpr,
    ORDER: tl.constexpr,
    ACC: tl.constexpr,
):
    """Triton kernel that sums g and g * x_hat over each chunk of rows: g is the gradient of the ReLU's input.

    x_hat is the normalized input. The sums are written to partial (2, chunks, C). dy, x and y are matrices (rows, C)
    with one pixel of one image in each row. A program sums over one chunk, which has TILES * ROWS rows, in BLOCK
    channels. ORDER is `NO_RESIDUAL`, `ACT_ADD` or `ADD_ACT`; y is read only with the last one.
    """
    # The gradient of the batch norm's input needs both sums over all rows, so they take a kernel of their own.
    chunk = tl.program_id(0)
    channel = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mean, rstd, weight, bias = load_norm(saved_ptr, weight_ptr, bias_ptr, channel, C, ACC)
    total = tl.zeros([BLOCK], ACC)
    total_hat = tl.zeros([BLOCK], ACC)
    for tile in range(TILES):
        row = (chunk * TILES + tile) * ROWS + tl.arange(0, ROWS)
        ok = tile_mask(row, rows, channel, C, BLOCK)
        at = row[:, None] * C + channel[None, :]
        x_hat = (tl.load(x_ptr + at, mask=ok, other=0.0).to(ACC) - mean[None, :]) * rstd[None, :]
        g = relu_gradient(dy_ptr, y_ptr, at, ok, x_hat, weight, bias, ORDER, ACC)
        total += tl.sum(g, axis=0)
        total_hat += tl.sum(g * x_hat, axis=0)
    tl.store(partial_ptr + chunk * C + channel, total, mask=channel < C)
    tl.store(partial_ptr + (chunks + chunk) * C + channel, total_hat, mask=channel < C)


@triton.jit
def combine_gradients(partial_ptr, dweight_ptr, dbias_ptr, chunks, channel, C: tl.constexpr, PARTS: tl.constexpr):
    """Returns the sums of g and of g * x_hat over all rows, from the sums that `chunk_gradients` wrote to partial.

    g is the gradient of the ReLU's input, and x_hat the normalized input of the batch norm. These sums are the
    gradients of the batch norm's bias and weight; the programs of the first chunk write them to dbias and dweight.
    """
    part = tl.arange(0, PARTS)
    ok = (part < chunks)[:, None] & (channel < C)[None, :]
    at = part[:, None] * C + channel[None, :]
    total = tl.sum(tl.load(partial_ptr + at, mask=ok, other=0.0), axis=0)
    total_hat = tl.sum(tl.load(partial_ptr + chunks * C + at, mask=ok, other=0.0), axis=0)
    if tl.program_id(0) == 0:
        tl.store(dbias_ptr + channel, total.to(dbias_ptr.dtype.element_ty), mask=channel < C)
        tl.store(dweight_ptr + channel, total_hat.to(dweight_ptr.dtype.element_ty), mask=channel < C)
    return total, total_hat


@triton.jit
def input_gradient(
    dy_ptr,
    x_ptr,
    y_ptr,
    weight_ptr,
    bias_ptr,
    saved_ptr,
    partial_ptr,
    dx_ptr,
    dresidual_ptr,
    dweight_ptr,
    dbias_ptr,
    rows,
    chunks,
    C: tl.constexpr,
    BLOCK: tl.constexpr,
    ROWS: tl.constexpr,
    TILES: tl.constexpr,
    PARTS: tl.constexpr,
    ORDER: tl.constexpr,
    ACC: tl.constexpr,
):
    """Triton kernel that writes dx, the gradient of the input, from the sums that `chunk_gradients` wrote to partial.

    If ORDER is `ADD_ACT`, it also writes dresidual, the gradient of the residual. The programs of the first chunk of
    rows also write dweight and dbias (C,), the gradients of the batch norm's weight and bias. The other arguments are
    those of `chunk_gradients`; PARTS is the number of chunks, rounded up to a power of two.
    """
    chunk = tl.program_id(0)
    channel = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    total, total_hat = combine_gradients(partial_ptr, dweight_ptr, dbias_ptr, chunks, channel, C, PARTS)
    mean, rstd, weight, bias = load_norm(saved_ptr, weight_ptr, bias_ptr, channel, C, ACC)
    for tile in range(TILES):
        row = (chunk * TILES + tile) * ROWS + tl.arange(0, ROWS)
        ok = tile_mask(row, rows, channel, C, BLOCK)
        at = row[:, None] * C + channel[None, :]
        x_hat = (tl.load(x_ptr + at, mask=ok, other=0.0).to(ACC) - mean[None, :]) * rstd[None, :]
        g = relu_gradient(dy_ptr, y_ptr, at, ok, x_hat, weight, bias, ORDER, ACC)
        # The mean and the variance depend on x too; their gradients are the two terms that are subtracted.
        dx = (weight * rstd)[None, :] * (g - (total / rows)[None, :] - x_hat * (total_hat / rows)[None, :])
        tl.store(dx_ptr + at, dx.to(dx_ptr.dtype.element_ty), mask=ok)
        if ORDER == 2:  # ADD_ACT
            tl.store(dresidual_ptr + at, g.to(dresidual_ptr.dtype.element_ty), mask=ok)


class NormPlan(NamedTuple):
    """How a feature map is divided among programs, the thread blocks of a GPU kernel.

    A row is one pixel of one image. Each program works on a chunk of rows, which it reads in tiles, and on a block of
    channels.

    The fields are arguments of all kernels of this module, in the kernels' order.

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
        """The launch options: as many warps as give each thread 32 elements of a tile, from 4 to 16."""
        return {"num_warps": min(max(self.tile_rows * self.block // 1024, 4), 16), "num_stages": 1}

    @property
    def parts(self) -> int:
        """The number of chunks, rounded up to a power of two."""
        return triton.next_power_of_2(self.chunks)


def plan_norm(x: Tensor) -> NormPlan:
    """Divides a feature map (N, C, H, W) among about 128 programs, the thread blocks of a GPU kernel.

    Each program works on a chunk of rows (a row is one pixel of one image) and on a block of channels.
    """
    # The more blocks of channels there are, the fewer are the chunks of rows.
    rows, channels = x.numel() // x.shape[1], x.shape[1]
    block = min(triton.next_power_of_2(channels), CHANNELS)
    blocks = triton.cdiv(channels, block)
    chunk_rows = triton.cdiv(rows * min(blocks, PROGRAMS), PROGRAMS)
    tile_rows = min(max(triton.next_power_of_2(chunk_rows), MIN_ROWS), MAX_ROWS)
    tiles = triton.cdiv(chunk_rows, tile_rows)
    return NormPlan(rows, triton.cdiv(rows, tile_rows * tiles), channels, block, tile_rows, tiles)


def sum_types(dtype: torch.dtype) -> tuple[torch.dtype, tl.dtype]:
    """Returns the dtype in which sums over a feature map of a dtype are computed: float64 for float64, else float32.

    Returns:
        The dtype as PyTorch's and as Triton's.
    """
    return (torch.float64, tl.float64) if dtype == torch.float64 else (torch.float32, tl.float32)


class BatchNormAct(torch.autograd.Function):
    """The autograd function of `batch_norm_act`.

    It saves the input and the statistics of the batch norm; with the order "add_act" also the output.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, residual: Tensor | None, norm: nn.BatchNorm2d, order: int
    ) -> Tensor:
        # First kernel: the statistics of each chunk.
        plan, (dtype, acc) = plan_norm(x), sum_types(x.dtype)
        y = torch.empty_like(x)
        partial = torch.empty(2, plan.chunks, plan.channels, dtype=dtype, device=x.device)
        saved = torch.empty(2, plan.channels, dtype=dtype, device=x.device)
        chunk_statistics[plan.grid](x, partial, *plan, acc, **plan.launch)

        # Second kernel: the output. Without a residual it does not read that pointer, so any tensor can be given.
        buffers = (norm.running_mean, norm.running_var, norm.num_batches_tracked)
        pointers = (x, x if residual is None else residual, y, weight, bias, partial, saved, *buffers)
        sizes = (*plan, plan.parts, plan.tile_rows * plan.tiles)
        normalize[plan.grid](*pointers, *sizes, float(norm.eps), float(norm.momentum), order, acc, **plan.launch)
        # Autograd does not see that the kernel has changed the buffers.
        torch.autograd.graph.increment_version(buffers)
        ctx.order = order
        ctx.save_for_backward(x, weight, bias, saved, *([y] if order == ADD_ACT else []))
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, bias, saved, *output = ctx.saved_tensors
        plan, (dtype, acc) = plan_norm(x), sum_types(x.dtype)
        dy = dy.contiguous(memory_format=torch.channels_last)
        dx, dweight, dbias = torch.empty_like(x), torch.empty_like(weight), torch.empty_like(bias)
        # The kernels read `y` and write `dresidual` only with ADD_ACT, so otherwise any tensors can be given.
        y, dresidual = (output[0], torch.empty_like(x)) if ctx.order == ADD_ACT else (x, dx)
        partial = torch.empty(2, plan.chunks, plan.channels, dtype=dtype, device=x.device)
        pointers, gradients = (dy, x, y, weight, bias, saved, partial), (dx, dresidual, dweight, dbias)
        chunk_gradients[plan.grid](*pointers, *plan, ctx.order, acc, **plan.launch)
        input_gradient[plan.grid](*pointers, *gradients, *plan, plan.parts, ctx.order, acc, **plan.launch)
        # The gradient of the residual: with ACT_ADD it is added last, so its gradient is `dy` itself.
        through = {NO_RESIDUAL: None, ACT_ADD: dy, ADD_ACT: dresidual}[ctx.order]
        return dx, dweight, dbias, through, None, None


def batch_norm_act(x: Tensor, norm: nn.BatchNorm2d, residual: Tensor | None = None, order: Order = "act_add") -> Tensor:
    """Computes batch norm in training mode, ReLU, and the sum with a residual if there is one.

    The running statistics and `num_batches_tracked` of `norm` are updated. Sums are computed in float32, or in float64
    if `x` is float64.

    Args:
        x: (N, C, H, W), contiguous in channels-last memory format, with two or more values in each channel; bfloat16,
            float32 or float64.
        norm: The batch norm, with weight, bias, running statistics and a momentum; these tensors are float64 if `x` is,
            otherwise float32.
        residual: A tensor with the shape, dtype and memory format of `x`; None to compute relu(norm(x)).
        order: "act_add" for relu(norm(x)) + residual, "add_act" for relu(norm(x) + residual).

    Returns:
        (N, C, H, W), with the dtype and memory format of `x`. With "add_act" it must not be changed in place before the
        backward pass.

    Raises:
        RuntimeError: In the backward pass, if a second derivative is computed.
    """
    code = NO_RESIDUAL if residual is None else ACT_ADD if order == "act_add" else ADD_ACT
    return BatchNormAct.apply(x, norm.weight, norm.bias, residual, norm, code)
