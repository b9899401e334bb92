"""Triton kernels of batch norm in training mode with ReLU and the sum with a residual: two forward, two backward.

In all kernels a row is one pixel of one image, and a tile is a block of ROWS rows x channels. A program works on one
chunk, which is TILES tiles, and on BLOCK of the C channels. ACC is the dtype in which sums are computed. x_hat is the
normalized input, and the prefix d stands for the gradient of a tensor. Arguments in capital letters are compile-time
constants.
"""

import triton
import triton.language as tl


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
    """Adds the rows of a tile to the mean and the sum of squared deviations of each channel, and returns both.

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

    They are computed from partial (2, chunks, C), to which `chunk_statistics` has written those of chunks of CHUNK
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
    """Updates a running mean or variance in place, as `nn.BatchNorm2d` does: a part MOMENTUM of the new value is taken.

    Args:
        running_ptr: The running mean or variance, (C,).
        value: A block with the mean, or the unbiased variance, that each channel has in this batch.
        channel: A block with the numbers of these channels. Numbers from C on are left out.
        C: The number of channels.
        MOMENTUM: The fraction of the new value.
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
def norm_gradient(
    dy_ptr,
    x_ptr,
    y_ptr,
    at,
    ok,
    rows,
    mean,
    rstd,
    weight,
    bias,
    total,
    total_hat,
    ORDER: tl.constexpr,
    ACC: tl.constexpr,
):
    """Returns tiles of the gradients of the batch norm's input and of the ReLU's input.

    `at` has the positions of the tile's elements in dy, x and y, and `ok` is the tile's mask. `mean`, `rstd`, `weight`
    and `bias` are those of `load_norm`, and `total` and `total_hat` the sums of `combine_gradients`.
    """
    x_hat = (tl.load(x_ptr + at, mask=ok, other=0.0).to(ACC) - mean[None, :]) * rstd[None, :]
    g = relu_gradient(dy_ptr, y_ptr, at, ok, x_hat, weight, bias, ORDER, ACC)
    # The mean and the variance depend on x too; their gradients are the two terms that are subtracted.
    dx = (weight * rstd)[None, :] * (g - (total / rows)[None, :] - x_hat * (total_hat / rows)[None, :])
    return dx, g


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
        dx, g = norm_gradient(
            dy_ptr, x_ptr, y_ptr, at, ok, rows, mean, rstd, weight, bias, total, total_hat, ORDER, ACC
        )
        tl.store(dx_ptr + at, dx.to(dx_ptr.dtype.element_ty), mask=ok)
        if ORDER == 2:  # ADD_ACT
            tl.store(dresidual_ptr + at, g.to(dresidual_ptr.dtype.element_ty), mask=ok)
