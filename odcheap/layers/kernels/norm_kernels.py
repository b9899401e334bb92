"""Triton kernels of the training batch norm. Tiles are rows (pixels) x channels; ACC is the type of the sums."""

import triton
import triton.language as tl


@triton.jit
def inside(row, rows, channel, C: tl.constexpr, BLOCK: tl.constexpr):
    """The mask of a tile; constant along the channels where they fill their blocks, so that loads are wide."""
    ok = (row < rows)[:, None]
    if C % BLOCK != 0:
        ok = ok & (channel < C)[None, :]
    return ok


@triton.jit
def add_tile(x, ok, left, earlier, mean, squares, ROWS: tl.constexpr, ACC: tl.constexpr):
    """Mean and squared deviations of `earlier` rows with a tile added: `left` rows or all, zeros where not `ok`."""
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
    """Mean and sum of squared deviations of each channel in a chunk of TILES * ROWS rows -> partial (2, chunks, C)."""
    chunk = tl.program_id(0)
    channel = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mean = tl.zeros([BLOCK], ACC)
    squares = tl.zeros([BLOCK], ACC)
    for tile in range(TILES):
        first = (chunk * TILES + tile) * ROWS
        row = first + tl.arange(0, ROWS)
        ok = inside(row, rows, channel, C, BLOCK)
        x = tl.load(x_ptr + row[:, None] * C + channel[None, :], mask=ok, other=0.0).to(ACC)
        earlier = first - chunk * TILES * ROWS
        mean, squares = add_tile(x, ok, rows - first, earlier, mean, squares, ROWS, ACC)
    tl.store(partial_ptr + chunk * C + channel, mean, mask=channel < C)
    tl.store(partial_ptr + (chunks + chunk) * C + channel, squares, mask=channel < C)


@triton.jit
def combined(partial_ptr, rows, chunks, channel, C: tl.constexpr, PARTS: tl.constexpr, CHUNK: tl.constexpr):
    """Mean and sum of squared deviations over all chunks of CHUNK rows (Chan, Golub, LeVeque, 1979)."""
    part = tl.arange(0, PARTS)
    there = (part < chunks)[:, None] & (channel < C)[None, :]
    place = part[:, None] * C + channel[None, :]
    means = tl.load(partial_ptr + place, mask=there, other=0.0)
    squares = tl.load(partial_ptr + chunks * C + place, mask=there, other=0.0)
    counts = tl.minimum(tl.maximum(rows - part * CHUNK, 0), CHUNK).to(means.dtype)[:, None]
    mean = tl.sum(means * counts, axis=0) / rows
    away = tl.where(there, means - mean[None, :], 0.0)
    return mean, tl.sum(squares + away * away * counts, axis=0)


@triton.jit
def follow(running_ptr, now, channel, C: tl.constexpr, MOMENTUM: tl.constexpr):
    """Moves a running statistic towards what it is now."""
    old = tl.load(running_ptr + channel, mask=channel < C, other=0.0)
    tl.store(running_ptr + channel, old * (1.0 - MOMENTUM) + now * MOMENTUM, mask=channel < C)


@triton.jit
def normalise(
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
    """Combines the chunks of CHUNK rows and writes y; the first programs write saved (2, C) and the buffers."""
    chunk = tl.program_id(0)
    channel = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    known = channel < C
    mean, squares = combined(partial_ptr, rows, chunks, channel, C, PARTS, CHUNK)
    rstd = 1.0 / tl.sqrt(squares / rows + EPS)
    if chunk == 0:
        tl.store(saved_ptr + channel, mean, mask=known)
        tl.store(saved_ptr + C + channel, rstd, mask=known)
        follow(running_mean_ptr, mean, channel, C, MOMENTUM)
        follow(running_var_ptr, squares / (rows - 1), channel, C, MOMENTUM)  # unbiased, as in nn.BatchNorm2d
        if tl.program_id(1) == 0:
            tl.store(tracked_ptr, tl.load(tracked_ptr) + 1)
    weight = tl.load(weight_ptr + channel, mask=known, other=0.0).to(ACC)
    bias = tl.load(bias_ptr + channel, mask=known, other=0.0).to(ACC)
    for tile in range(TILES):
        row = (chunk * TILES + tile) * ROWS + tl.arange(0, ROWS)
        ok = inside(row, rows, channel, C, BLOCK)
        at = row[:, None] * C + channel[None, :]
        x = tl.load(x_ptr + at, mask=ok, other=0.0).to(ACC)
        y = (x - mean[None, :]) * rstd[None, :] * weight[None, :] + bias[None, :]
        if ORDER == 2:  # add_act
            y += tl.load(residual_ptr + at, mask=ok, other=0.0).to(ACC)
        y = tl.where(y <= 0.0, 0.0, y)  # lets NaN through, as PyTorch's ReLU does
        if ORDER == 1:  # act_add
            y += tl.load(residual_ptr + at, mask=ok, other=0.0).to(ACC)
        tl.store(y_ptr + at, y.to(y_ptr.dtype.element_ty), mask=ok)


@triton.jit
def active_gradient(dy_ptr, y_ptr, at, ok, x_hat, weight, bias, ORDER: tl.constexpr, ACC: tl.constexpr):
    """What comes through the ReLU. Its sign is that of the output, or without that of the recomputed batch norm."""
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
    """Sums of g and g * x_hat in a chunk -> partial (2, chunks, C); g is the gradient behind the ReLU."""
    chunk = tl.program_id(0)
    channel = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    known = channel < C
    mean = tl.load(saved_ptr + channel, mask=known, other=0.0)
    rstd = tl.load(saved_ptr + C + channel, mask=known, other=0.0)
    weight = tl.load(weight_ptr + channel, mask=known, other=0.0).to(ACC)
    bias = tl.load(bias_ptr + channel, mask=known, other=0.0).to(ACC)
    total = tl.zeros([BLOCK], ACC)
    total_hat = tl.zeros([BLOCK], ACC)
    for tile in range(TILES):
        row = (chunk * TILES + tile) * ROWS + tl.arange(0, ROWS)
        ok = inside(row, rows, channel, C, BLOCK)
        at = row[:, None] * C + channel[None, :]
        x_hat = (tl.load(x_ptr + at, mask=ok, other=0.0).to(ACC) - mean[None, :]) * rstd[None, :]
        g = active_gradient(dy_ptr, y_ptr, at, ok, x_hat, weight, bias, ORDER, ACC)
        total += tl.sum(g, axis=0)
        total_hat += tl.sum(g * x_hat, axis=0)
    tl.store(partial_ptr + chunk * C + channel, total, mask=known)
    tl.store(partial_ptr + (chunks + chunk) * C + channel, total_hat, mask=known)


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
    """Combines the chunks and writes dx, for ADD_ACT the residual's gradient, and in the first chunk dweight, dbias."""
    chunk = tl.program_id(0)
    channel = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    known = channel < C
    part = tl.arange(0, PARTS)
    there = (part < chunks)[:, None] & known[None, :]
    place = part[:, None] * C + channel[None, :]
    total = tl.sum(tl.load(partial_ptr + place, mask=there, other=0.0), axis=0)
    total_hat = tl.sum(tl.load(partial_ptr + chunks * C + place, mask=there, other=0.0), axis=0)
    if chunk == 0:
        tl.store(dbias_ptr + channel, total.to(dbias_ptr.dtype.element_ty), mask=known)
        tl.store(dweight_ptr + channel, total_hat.to(dweight_ptr.dtype.element_ty), mask=known)
    mean = tl.load(saved_ptr + channel, mask=known, other=0.0)
    rstd = tl.load(saved_ptr + C + channel, mask=known, other=0.0)
    weight = tl.load(weight_ptr + channel, mask=known, other=0.0).to(ACC)
    bias = tl.load(bias_ptr + channel, mask=known, other=0.0).to(ACC)
    for tile in range(TILES):
        row = (chunk * TILES + tile) * ROWS + tl.arange(0, ROWS)
        ok = inside(row, rows, channel, C, BLOCK)
        at = row[:, None] * C + channel[None, :]
        x_hat = (tl.load(x_ptr + at, mask=ok, other=0.0).to(ACC) - mean[None, :]) * rstd[None, :]
        g = active_gradient(dy_ptr, y_ptr, at, ok, x_hat, weight, bias, ORDER, ACC)
        dx = (weight * rstd)[None, :] * (g - (total / rows)[None, :] - x_hat * (total_hat / rows)[None, :])
        tl.store(dx_ptr + at, dx.to(dx_ptr.dtype.element_ty), mask=ok)
        if ORDER == 2:
            tl.store(dresidual_ptr + at, g.to(dresidual_ptr.dtype.element_ty), mask=ok)
