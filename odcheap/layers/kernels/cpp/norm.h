// Batch norm in training mode, ReLU, and the sum with a residual: statistics, result and gradients.

#pragma once

#include "vectors.h"

namespace {

constexpr long NORM_CHUNKS = 64; // of rows

enum Order { NO_RESIDUAL = 0, ACT_ADD = 1, ADD_ACT = 2 };

// How a map of `rows` x `channels` is read: as vectors whose coefficients repeat after `period` vectors.
template <class A> struct Period {
    long rows, channels, period, block;  // `block` rows have `period` vectors

    Period(long rows, long channels) : rows(rows), channels(channels) {
        block = 1;
        while (block * channels % LANES<A>) block *= 2;
        period = block * channels / LANES<A>;
    }
    long chunks() const { return std::min(NORM_CHUNKS, (rows + block - 1) / block); }
    // The first row of a chunk.
    long first(long chunk) const {
        long blocks = (rows + block - 1) / block;
        return std::min(rows, blocks * chunk / chunks() * block);
    }
    // Copies coefficients of the channels, repeated over the period.
    void repeat(const A *values, A *to) const {
        for (long i = 0; i < block; i++) memcpy(to + i * channels, values, channels * sizeof(A));
    }
};

// Calls `run` with the number of vectors of a period as a constant if it is small, so that coefficients stay in
// registers.
template <class F> inline void with_period(long period, F run) {
    switch (period) {
    case 1: run(std::integral_constant<long, 1>()); break;
    case 2: run(std::integral_constant<long, 2>()); break;
    case 4: run(std::integral_constant<long, 4>()); break;
    default: run(std::integral_constant<long, 0>());
    }
}

// Writes the mean and the sum of squared deviations of each channel in the chunks to partial (chunks, 2, C).
template <class T, class A> void chunk_statistics(const T *x, A *partial, Period<A> plan, int threads) {
    const long C = plan.channels, L = LANES<A>, chunks = plan.chunks(), width = plan.period * L;
#pragma omp parallel num_threads(threads)
    {
        Buffer<A> pivot(width), sum(width), square(width);
#pragma omp for schedule(static)
        for (long chunk = 0; chunk < chunks; chunk++) {
            const long first = plan.first(chunk), last = plan.first(chunk + 1);
            const long whole = first + (last - first) / plan.block * plan.block;
            // Deviations from the first row of the chunk: squares of values far from zero would lose digits.
            for (long i = 0; i < width; i++) pivot[i] = read(x + first * C + i % C), sum[i] = square[i] = 0;
            with_period(plan.period, [&](auto constant) {
                constexpr long P = decltype(constant)::value;
                if constexpr (P > 0) {
                    // Two vectors of sums for each vector of the period, since an addition takes several cycles.
                    Vector<A> center[P], total[P][2] = {}, squares[P][2] = {};
                    for (long v = 0; v < P; v++) center[v] = load((A *)pivot + v * L);
                    long row = first;
                    for (; row + 2 * plan.block <= whole; row += 2 * plan.block)
                        for (long half = 0; half < 2; half++)
                            for (long v = 0; v < P; v++) {
                                Vector<A> away = load(x + (row + half * plan.block) * C + v * L) - center[v];
                                total[v][half] += away;
                                squares[v][half] += away * away;
                            }
                    for (; row < whole; row += plan.block)
                        for (long v = 0; v < P; v++) {
                            Vector<A> away = load(x + row * C + v * L) - center[v];
                            total[v][0] += away;
                            squares[v][0] += away * away;
                        }
                    for (long v = 0; v < P; v++) {
                        store((A *)sum + v * L, total[v][0] + total[v][1]);
                        store((A *)square + v * L, squares[v][0] + squares[v][1]);
                    }
                } else {
                    for (long row = first; row < whole; row += plan.block)
                        for (long v = 0; v < plan.period; v++) {
                            Vector<A> away = load(x + row * C + v * L) - load((A *)pivot + v * L);
                            store((A *)sum + v * L, load((A *)sum + v * L) + away);
                            store((A *)square + v * L, load((A *)square + v * L) + away * away);
                        }
                }
            });
            for (long row = whole; row < last; row++)
                for (long c = 0; c < C; c++) {
                    A away = read(x + row * C + c) - pivot[c];
                    sum[c] += away, square[c] += away * away;
                }
            // Add up the repetitions of a channel.
            for (long i = C; i < width; i++) sum[i % C] += sum[i], square[i % C] += square[i];
            const A count = A(std::max(last - first, 1L));
            for (long c = 0; c < C; c++) {
                partial[chunk * 2 * C + c] = pivot[c] + sum[c] / count;
                partial[(chunk * 2 + 1) * C + c] = std::max(A(0), square[c] - sum[c] * sum[c] / count);
            }
        }
    }
}

// Computes mean and 1 / standard deviation from the statistics of chunks (Chan, Golub, LeVeque, 1979), writes them to
// saved (2, C), and updates the running statistics as nn.BatchNorm2d does. `counts` has the rows of each chunk.
template <class A>
void combine_statistics(const A *partial, const long *counts, long chunks, long rows, long C, double eps,
                        double momentum, A *saved, A *running_mean, A *running_var) {
    for (long c = 0; c < C; c++) {
        double mean = 0, squares = 0;
        for (long i = 0; i < chunks; i++) mean += double(partial[i * 2 * C + c]) * counts[i];
        mean /= rows;
        for (long i = 0; i < chunks; i++) {
            double away = partial[i * 2 * C + c] - mean;
            squares += partial[(i * 2 + 1) * C + c] + away * away * counts[i];
        }
        saved[c] = A(mean);
        saved[C + c] = A(1 / std::sqrt(squares / rows + eps));
        running_mean[c] = A((1 - momentum) * running_mean[c] + momentum * mean);
        running_var[c] = A((1 - momentum) * running_var[c] + momentum * (squares / (rows - 1)));
    }
}

// Writes scale and offset of each channel, so that the normalized value is scale * x + offset.
template <class A>
void write_affine(const A *saved, const A *weight, const A *bias, long C, A *scale, A *offset) {
    for (long c = 0; c < C; c++) {
        scale[c] = weight[c] * saved[C + c];
        offset[c] = bias[c] - saved[c] * scale[c];
    }
}

template <class T, class A, int ORDER>
void normalize_order(const T *x, const T *residual, T *y, const A *scale, const A *offset, Period<A> plan,
                     int threads) {
    const long C = plan.channels, L = LANES<A>, chunks = plan.chunks();
#pragma omp parallel for schedule(static) num_threads(threads)
    for (long chunk = 0; chunk < chunks; chunk++) {
        const long first = plan.first(chunk), last = plan.first(chunk + 1);
        const long whole = first + (last - first) / plan.block * plan.block;
        with_period(plan.period, [&](auto constant) {
            constexpr long P = decltype(constant)::value;
            const long period = P ? P : plan.period;
            Vector<A> a[P ? P : 1], b[P ? P : 1];
            for (long v = 0; v < P; v++) a[v] = load(scale + v * L), b[v] = load(offset + v * L);
            for (long row = first; row < whole; row += plan.block)
                for (long v = 0; v < period; v++) {
                    const long at = row * C + v * L;
                    Vector<A> value = P ? a[P ? v : 0] * load(x + at) + b[P ? v : 0]
                                        : load(scale + v * L) * load(x + at) + load(offset + v * L);
                    if (ORDER == ADD_ACT) value += load(residual + at);
                    value = where_positive<A>(value, value);
                    if (ORDER == ACT_ADD) value += load(residual + at);
                    store(y + at, value);
                }
        });
        for (long row = whole; row < last; row++)
            for (long c = 0; c < C; c++) {
                const long at = row * C + c;
                A value = scale[c] * read(x + at) + offset[c];
                if (ORDER == ADD_ACT) value += read(residual + at);
                value = where_positive_scalar(value, value);
                if (ORDER == ACT_ADD) value += read(residual + at);
                write(y + at, value);
            }
    }
}

// Writes y: batch norm, ReLU and the sum with the residual.
template <class T, class A>
void normalize(const T *x, const T *residual, T *y, const A *weight, const A *bias, const A *saved, long rows, long C,
               int order, int threads) {
    Period<A> plan(rows, C);
    std::vector<A> one(2 * C);
    Buffer<A> scale(plan.period * LANES<A>), offset(plan.period * LANES<A>);
    write_affine(saved, weight, bias, C, one.data(), one.data() + C);
    plan.repeat(one.data(), scale);
    plan.repeat(one.data() + C, offset);
    if (order == NO_RESIDUAL)
        normalize_order<T, A, NO_RESIDUAL>(x, residual, y, scale, offset, plan, threads);
    else if (order == ACT_ADD)
        normalize_order<T, A, ACT_ADD>(x, residual, y, scale, offset, plan, threads);
    else
        normalize_order<T, A, ADD_ACT>(x, residual, y, scale, offset, plan, threads);
}

// Writes the sums of g and of g * x_hat over all rows to dbias and dweight; g is the gradient of the ReLU's input, and
// x_hat the normalized input.
template <class T, class A, bool FROM_OUTPUT>
void gradient_sums(const T *dy, const T *x, const T *y, const A *weight, const A *bias, const A *saved, long rows,
                   long C, int threads, A *dweight, A *dbias) {
    Period<A> plan(rows, C);
    const long L = LANES<A>, chunks = plan.chunks(), width = plan.period * L;
    std::vector<A> one(2 * C);
    Buffer<A> scale(width), offset(width), center(width), partial(chunks * 2 * C);
    write_affine(saved, weight, bias, C, one.data(), one.data() + C);
    plan.repeat(one.data(), scale);
    plan.repeat(one.data() + C, offset);
    plan.repeat(saved, center);
#pragma omp parallel num_threads(threads)
    {
        Buffer<A> sum(width), product(width);
#pragma omp for schedule(static)
        for (long chunk = 0; chunk < chunks; chunk++) {
            const long first = plan.first(chunk), last = plan.first(chunk + 1);
            const long whole = first + (last - first) / plan.block * plan.block;
            for (long i = 0; i < width; i++) sum[i] = product[i] = 0;
            with_period(plan.period, [&](auto constant) {
                constexpr long P = decltype(constant)::value;
                if constexpr (P > 0) {
                    Vector<A> a[P], b[P], mean[P], total[P] = {}, products[P] = {};
                    for (long v = 0; v < P; v++) {
                        a[v] = load((A *)scale + v * L), b[v] = load((A *)offset + v * L);
                        mean[v] = load((A *)center + v * L);
                    }
                    for (long row = first; row < whole; row += plan.block)
                        for (long v = 0; v < P; v++) {
                            const long at = row * C + v * L;
                            Vector<A> value = load(x + at);
                            Vector<A> sign = FROM_OUTPUT ? load(y + at) : a[v] * value + b[v];
                            Vector<A> g = where_positive<A>(sign, load(dy + at));
                            total[v] += g;
                            products[v] += g * (value - mean[v]);
                        }
                    for (long v = 0; v < P; v++) {
                        store((A *)sum + v * L, total[v]);
                        store((A *)product + v * L, products[v]);
                    }
                } else {
                    for (long row = first; row < whole; row += plan.block)
                        for (long v = 0; v < plan.period; v++) {
                            const long at = row * C + v * L, i = v * L;
                            Vector<A> value = load(x + at);
                            Vector<A> sign = FROM_OUTPUT ? load(y + at) : load((A *)scale + i) * value + load((A *)offset + i);
                            Vector<A> g = where_positive<A>(sign, load(dy + at));
                            store((A *)sum + i, load((A *)sum + i) + g);
                            store((A *)product + i, load((A *)product + i) + g * (value - load((A *)center + i)));
                        }
                }
            });
            for (long row = whole; row < last; row++)
                for (long c = 0; c < C; c++) {
                    const long at = row * C + c;
                    A value = read(x + at), sign = FROM_OUTPUT ? read(y + at) : scale[c] * value + offset[c];
                    A g = where_positive_scalar(sign, A(read(dy + at)));
                    sum[c] += g, product[c] += g * (value - center[c]);
                }
            for (long i = C; i < width; i++) sum[i % C] += sum[i], product[i % C] += product[i];
            for (long c = 0; c < C; c++) {
                partial[chunk * 2 * C + c] = sum[c];
                partial[(chunk * 2 + 1) * C + c] = product[c];
            }
        }
    }
    for (long c = 0; c < C; c++) {
        double total = 0, product = 0;
        for (long chunk = 0; chunk < chunks; chunk++)
            total += partial[chunk * 2 * C + c], product += partial[(chunk * 2 + 1) * C + c];
        dbias[c] = A(total);
        dweight[c] = A(product * saved[C + c]);
    }
}

// The gradient of the batch norm's input is gain * g + slope * x + shift in each channel: mean and variance depend on
// x too. `dweight` and `dbias` are the sums of `gradient_sums`.
template <class A>
void write_gradient_affine(const A *saved, const A *weight, const A *dweight, const A *dbias, long rows, long C,
                           A *gain, A *slope, A *shift) {
    for (long c = 0; c < C; c++) {
        const double rstd = saved[C + c], scale = weight[c] * rstd;
        const double along = dweight[c] / double(rows) * rstd;
        gain[c] = A(scale);
        slope[c] = A(-scale * along);
        shift[c] = A(scale * (along * saved[c] - dbias[c] / double(rows)));
    }
}

template <class T, class A, bool FROM_OUTPUT>
void input_gradient(const T *dy, const T *x, const T *y, const A *weight, const A *bias, const A *saved,
                    const A *dweight, const A *dbias, T *dx, T *dresidual, long rows, long C, int threads) {
    Period<A> plan(rows, C);
    const long L = LANES<A>, chunks = plan.chunks(), width = plan.period * L;
    std::vector<A> one(5 * C);
    Buffer<A> all(5 * width);
    write_affine(saved, weight, bias, C, one.data(), one.data() + C);
    write_gradient_affine(saved, weight, dweight, dbias, rows, C, one.data() + 2 * C, one.data() + 3 * C,
                          one.data() + 4 * C);
    for (long i = 0; i < 5; i++) plan.repeat(one.data() + i * C, all + i * width);
    const A *scale = all, *offset = scale + width, *gain = offset + width, *slope = gain + width, *shift = slope + width;
#pragma omp parallel for schedule(static) num_threads(threads)
    for (long chunk = 0; chunk < chunks; chunk++) {
        const long first = plan.first(chunk), last = plan.first(chunk + 1);
        const long whole = first + (last - first) / plan.block * plan.block;
        with_period(plan.period, [&](auto constant) {
            constexpr long P = decltype(constant)::value;
            const long period = P ? P : plan.period;
            for (long row = first; row < whole; row += plan.block)
                for (long v = 0; v < period; v++) {
                    const long at = row * C + v * L, i = v * L;
                    Vector<A> value = load(x + at);
                    Vector<A> sign = FROM_OUTPUT ? load(y + at) : load(scale + i) * value + load(offset + i);
                    Vector<A> g = where_positive<A>(sign, load(dy + at));
                    store(dx + at, load(gain + i) * g + (load(slope + i) * value + load(shift + i)));
                    if (FROM_OUTPUT) store(dresidual + at, g);
                }
        });
        for (long row = whole; row < last; row++)
            for (long c = 0; c < C; c++) {
                const long at = row * C + c;
                A value = read(x + at), sign = FROM_OUTPUT ? read(y + at) : scale[c] * value + offset[c];
                A g = where_positive_scalar(sign, A(read(dy + at)));
                write(dx + at, gain[c] * g + (slope[c] * value + shift[c]));
                if (FROM_OUTPUT) write(dresidual + at, g);
            }
    }
}

template <class T, class A>
void norm_forward(const T *x, const T *residual, T *y, const A *weight, const A *bias, A *running_mean, A *running_var,
                  A *saved, long rows, long channels, double eps, double momentum, int order, int threads) {
    Period<A> plan(rows, channels);
    Buffer<A> partial(plan.chunks() * 2 * channels);
    std::vector<long> counts;
    for (long i = 0; i < plan.chunks(); i++) counts.push_back(plan.first(i + 1) - plan.first(i));
    chunk_statistics<T, A>(x, partial, plan, threads);
    combine_statistics<A>(partial, counts.data(), plan.chunks(), rows, channels, eps, momentum, saved, running_mean,
                          running_var);
    normalize<T, A>(x, residual, y, weight, bias, saved, rows, channels, order, threads);
}

template <class T, class A, bool FROM_OUTPUT>
void norm_backward(const T *dy, const T *x, const T *y, const A *weight, const A *bias, const A *saved, T *dx,
                   T *dresidual, A *dweight, A *dbias, long rows, long channels, int threads) {
    gradient_sums<T, A, FROM_OUTPUT>(dy, x, y, weight, bias, saved, rows, channels, threads, dweight, dbias);
    input_gradient<T, A, FROM_OUTPUT>(dy, x, y, weight, bias, saved, dweight, dbias, dx, dresidual, rows, channels,
                                      threads);
}

} // namespace
