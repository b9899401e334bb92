// A pair and the statistics of its batch norm: a 3 x 3 operator, then a 1 x 1 convolution, a line of an image at a time.
//
// The pair's input may be the output of another pair before its batch norm and ReLU: it is then normalized while it is
// read, and the normalized map is never written.

#pragma once

#include "norm.h"
#include "spatial.h"

namespace {

constexpr long LINES_OF_SUMS = 64; // pixels that are collected before they are added to the gradient of the 1 x 1 kernel

// A batch norm with ReLU that a pair applies to its input, and its gradient: coefficients (padded C) of each channel.
// If there is none, `mean` is null.
template <class A> struct InputNorm {
    const A *scale, *offset, *mean;
};

// The gradient of a batch norm and ReLU, given the gradient of their output: coefficients (padded O) of each channel.
template <class A> struct NormGradient {
    const A *scale, *offset, *gain, *slope, *shift;
};

// Copies a line of the pair's input to a padded line of the type A, normalized if there is a batch norm.
template <class T, class A>
inline void read_input(const T *from, const InputNorm<A> &norm, long width, long channels, long padded, A *to) {
    if (norm.mean == nullptr) {
        read_line(from, width, channels, padded, to);
    } else if (channels == padded) {
        for (long c = 0; c < channels; c += LANES<A>) {
            const Vector<A> scale = load(norm.scale + c), offset = load(norm.offset + c);
            for (long at = c; at < width * channels; at += channels) {
                const Vector<A> value = scale * load(from + at) + offset;
                store(to + at, where_positive<A>(value, value));
            }
        }
    } else {
        for (long w = 0; w < width; w++)
            for (long c = 0; c < channels; c++) {
                const A value = norm.scale[c] * read(from + w * channels + c) + norm.offset[c];
                to[w * padded + c] = where_positive_scalar(value, value);
            }
    }
}

// Writes a padded line to an image; `added` is a line of the image that is added, or null.
template <class T, class A>
inline void write_line(const A *from, const T *added, long width, long channels, long padded, T *to) {
    if (channels == padded) {
        if (added == nullptr)
            for (long i = 0; i < width * channels; i += LANES<A>) store(to + i, load(from + i));
        else
            for (long i = 0; i < width * channels; i += LANES<A>) store(to + i, load(from + i) + load(added + i));
        return;
    }
    for (long w = 0; w < width; w++)
        for (long c = 0; c < channels; c++) {
            const A value = from[w * padded + c];
            write(to + w * channels + c, added == nullptr ? value : A(value + read(added + w * channels + c)));
        }
}

// Writes a padded line of the gradient of a normalized input to an image, zero where the ReLU gave zero, and adds the
// sums that the gradient of the batch norm needs to `sums` (2, padded C): those of g and of g * (z - mean), where g is
// what is written and z the line of the batch norm's input.
template <class T, class A>
inline void write_masked_line(const A *from, const T *z, const InputNorm<A> &norm, long width, long channels,
                              long padded, T *to, A *sums) {
    if (channels == padded) {
        for (long c = 0; c < channels; c += LANES<A>) {
            const Vector<A> scale = load(norm.scale + c), offset = load(norm.offset + c), mean = load(norm.mean + c);
            Vector<A> total = load(sums + c), products = load(sums + padded + c);
            for (long at = c; at < width * channels; at += channels) {
                const Vector<A> value = load(z + at);
                store(to + at, where_positive<A>(scale * value + offset, load(from + at)));
                const Vector<A> g = load(to + at); // rounded
                total += g, products += g * (value - mean);
            }
            store(sums + c, total), store(sums + padded + c, products);
        }
        return;
    }
    for (long w = 0; w < width; w++)
        for (long c = 0; c < channels; c++) {
            const A value = read(z + w * channels + c);
            write(to + w * channels + c,
                  where_positive_scalar(norm.scale[c] * value + norm.offset[c], from[w * padded + c]));
            const A g = read(to + w * channels + c);
            sums[c] += g, sums[padded + c] += g * (value - norm.mean[c]);
        }
}

// Writes dz of a line, the gradient of the batch norm's input.
template <class T, class A>
inline void gradient_line(const T *dy, const T *z, const NormGradient<A> &norm, long width, long channels, long padded,
                          A *to) {
    if (channels == padded) {
        for (long o = 0; o < channels; o += LANES<A>) {
            const Vector<A> scale = load(norm.scale + o), offset = load(norm.offset + o), gain = load(norm.gain + o);
            const Vector<A> slope = load(norm.slope + o), shift = load(norm.shift + o);
            for (long at = o; at < width * channels; at += channels) {
                const Vector<A> value = load(z + at);
                const Vector<A> g = where_positive<A>(scale * value + offset, load(dy + at));
                store(to + at, gain * g + (slope * value + shift));
            }
        }
        return;
    }
    for (long w = 0; w < width; w++)
        for (long o = 0; o < channels; o++) {
            const A value = read(z + w * channels + o);
            const A g = where_positive_scalar(norm.scale[o] * value + norm.offset[o], A(read(dy + w * channels + o)));
            to[w * padded + o] = norm.gain[o] * g + (norm.slope[o] * value + norm.shift[o]);
        }
}

// The sums of a chunk for its mean and its squared deviations: of deviations from the first pixel's values.
template <class A> struct Statistics {
    long padded, pixels;
    Buffer<A> pivot, sum, square;
    Statistics(long padded) : padded(padded), pixels(0), pivot(padded), sum(padded), square(padded) {}

    void clear() {
        pixels = 0;
        memset((A *)sum, 0, padded * sizeof(A)), memset((A *)square, 0, padded * sizeof(A));
    }
    void add(const A *line, long width) {
        if (pixels == 0) memcpy((A *)pivot, line, padded * sizeof(A));
        pixels += width;
        for (long o = 0; o < padded; o += LANES<A>) {
            const Vector<A> center = load((A *)pivot + o);
            Vector<A> total = load((A *)sum + o), squares = load((A *)square + o);
            for (long p = 0; p < width; p++) {
                const Vector<A> away = load(line + p * padded + o) - center;
                total += away, squares += away * away;
            }
            store((A *)sum + o, total), store((A *)square + o, squares);
        }
    }
    // Writes the mean and the sum of squared deviations of each channel, (2, channels).
    void write(long channels, A *to) {
        for (long o = 0; o < channels; o++) {
            to[o] = pivot[o] + sum[o] / A(pixels);
            to[channels + o] = std::max(A(0), square[o] - sum[o] * sum[o] / A(pixels));
        }
    }
};

// Writes z, the output of the 1 x 1 convolution, and the statistics of z in each chunk of images to partial
// (chunks, 2, O). `s` gets the output of the 3 x 3 operator if that operator saves it.
template <class T, class A, class Spatial>
void pair_forward(const T *x, const InputNorm<A> &norm, const A *kernel, const A *weight, T *s_map, T *z, A *partial,
                  const PairSizes<A> &n, int threads) {
    const long C = n.padded_in, O = n.padded_out, in_line = n.width * n.in, out_line = n.out_width * n.out;
    typedef FactorOf<T, A> F;
    typename Spatial::Kernel taps(kernel, n);
    Buffer<F> w(C / DEPTH<F> * O);
    for (long o = 0; o < n.out; o++)
        for (long c = 0; c < n.in; c++) set_factor((F *)w, c, o, O, round_weight<T>(weight[o * n.in + c]));
#pragma omp parallel num_threads(threads)
    {
        typename Spatial::Forward spatial(taps, n);
        Buffer<A> s(n.out_width * C), line(n.out_width * O);
        Buffer<F> factors(n.out_width * C / DEPTH<F>);
        Statistics<A> statistics(O);
#pragma omp for schedule(static)
        for (long chunk = 0; chunk < n.chunks(); chunk++) {
            statistics.clear();
            for (long image = n.first(chunk); image < n.first(chunk + 1); image++) {
                const T *from = x + image * n.height * in_line;
                long read_lines = 0;
                for (long row = 0; row < n.out_height; row++) {
                    for (; read_lines < std::min(row * n.stride + 2, n.height); read_lines++) {
                        const T *next = from + read_lines * in_line;
                        read_input(next, norm, n.width, n.in, C, spatial.input(read_lines));
                        spatial.take_input(read_lines);
                        prefetch(next + in_line, in_line);
                    }
                    const long at = image * n.out_height + row;
                    spatial.convolve(row, s);
                    if (Spatial::SAVES_OUTPUT)
                        write_line<T, A>(s, nullptr, n.out_width, n.in, C, s_map + at * n.out_width * n.in);
                    const long K = C / DEPTH<F>;
                    multiply<false>(channel_factors_of<F, A>(s, n.out_width, C, factors), K, 1, n.out_width, (F *)w, O,
                                    K, O, (A *)line, O);
                    T *out = z + at * out_line;
                    write_line<T, A>(line, nullptr, n.out_width, n.out, O, out);
                    // The statistics of the rounded values.
                    if (sizeof(T) != sizeof(A)) read_line(out, n.out_width, n.out, O, (A *)line);
                    statistics.add(line, n.out_width);
                }
            }
            statistics.write(n.out, partial + chunk * 2 * n.out);
        }
    }
}

// What `pair_backward` reads and writes. `norm_gradient` is that of the batch norm after the pair. The gradient of the
// input, dx, is that before the `norm` of the input if there is one; its sums are then written to dgamma and dbeta.
// `added` is added to dx if it is not null.
template <class T, class A> struct PairGradients {
    const T *dy, *z, *x, *s, *added;
    const A *kernel, *weight;
    InputNorm<A> norm;
    NormGradient<A> norm_gradient;
    T *dx;
    A *dkernel, *dweight, *input_sums; // input_sums: (2, C), those of g and of g * (x - mean)
};

template <class T, class A, class Spatial>
void pair_backward(const PairGradients<T, A> &g, const PairSizes<A> &n, int threads) {
    typedef FactorOf<T, A> F;
    const long C = n.padded_in, O = n.padded_out, chunks = n.chunks();
    const long in_line = n.width * n.in, out_line = n.out_width * n.out, s_line_size = n.out_width * n.in;
    const long kernel_at = n.in * O, sums_at = kernel_at + Spatial::gradient_size(n), columns = sums_at + 2 * C;
    typename Spatial::Kernel taps(g.kernel, n);
    Buffer<A> partial(chunks * columns);
    Buffer<F> w(O / DEPTH<F> * C);
    for (long o = 0; o < n.out; o++)
        for (long c = 0; c < n.in; c++) set_factor((F *)w, o, c, C, round_weight<T>(g.weight[o * n.in + c]));
#pragma omp parallel num_threads(threads)
    {
        typename Spatial::Backward spatial(taps, n);
        const long collected_lines = std::max(1L, LINES_OF_SUMS / n.out_width);
        // The factors of a line along pixels, and the lines that are collected of them.
        const long deep = round_up(n.out_width, DEPTH<F>) / DEPTH<F>;
        Buffer<F> s_factors(collected_lines * deep * C), dz_factors(collected_lines * deep * O);
        Buffer<F> dz_channels(n.out_width * O / DEPTH<F>);
        Buffer<A> s(n.out_width * C), dz(n.out_width * O), line(n.width * C);
#pragma omp for schedule(static)
        for (long chunk = 0; chunk < chunks; chunk++) {
            A *dw = partial + chunk * columns, *dk = dw + kernel_at, *input_sums = dw + sums_at;
            for (long image = n.first(chunk); image < n.first(chunk + 1); image++) {
                const T *from = g.x + image * n.height * in_line;
                read_input(from, g.norm, n.width, n.in, C, spatial.input(0));
                spatial.take_input(0);
                long collected = 0;
                for (long h = 0; h <= n.height; h++) {
                    if (h + 1 < n.height) {
                        read_input(from + (h + 1) * in_line, g.norm, n.width, n.in, C, spatial.input(h + 1));
                        spatial.take_input(h + 1);
                        prefetch(from + (h + 2) * in_line, in_line);
                    }
                    if (h < n.height && h % n.stride == 0) {
                        const long row = image * n.out_height + h / n.stride, at = row * out_line;
                        F *s_own = s_factors + collected * deep * C, *dz_own = dz_factors + collected * deep * O;
                        A *s_line = line_of(s_own, (A *)s), *dz_line = line_of(dz_own, (A *)dz);
                        F *dz_over = channel_factors(dz_own, (F *)dz_channels);
                        gradient_line(g.dy + at, g.z + at, g.norm_gradient, n.out_width, n.out, O, dz_line);
                        prefetch(g.dy + at + out_line, out_line), prefetch(g.z + at + out_line, out_line);
                        write_factors(dz_line, n.out_width, O, dz_over, dz_own);
                        // The gradient of the 3 x 3 operator's output, at the step of the input.
                        const long K = O / DEPTH<F>;
                        multiply<false>(dz_over, K, 1, n.out_width, (F *)w, C, K, C, spatial.gradient(h), n.stride * C);
                        spatial.take_gradient(h);
                        spatial.convolve_again(h / n.stride, g.s + row * s_line_size, s_line, dk);
                        write_factors(s_line, n.out_width, C, (F *)nullptr, s_own);
                        collected++;
                        if (collected == collected_lines || h + n.stride >= n.height) {
                            multiply<true>((F *)s_factors, 1, C, n.in, (F *)dz_factors, O, collected * deep, O, dw, O);
                            collected = 0;
                        }
                    }
                    if (h == 0) continue;
                    spatial.convolve_back(h - 1, line);
                    const long at = (image * n.height + h - 1) * in_line;
                    if (g.norm.mean != nullptr)
                        write_masked_line<T, A>(line, g.x + at, g.norm, n.width, n.in, C, g.dx + at, input_sums);
                    else
                        write_line<T, A>(line, g.added ? g.added + at : nullptr, n.width, n.in, C, g.dx + at);
                    if (g.added) prefetch(g.added + at + in_line, in_line);
                }
            }
        }
    }
    // Add up the chunks' sums in their order.
    for (long chunk = 1; chunk < chunks; chunk++)
        for (long i = 0; i < columns; i++) partial[i] += partial[chunk * columns + i];
    for (long o = 0; o < n.out; o++)
        for (long c = 0; c < n.in; c++) g.dweight[o * n.in + c] = partial[c * O + o];
    Spatial::copy_gradient(partial + kernel_at, n, g.dkernel);
    if (g.input_sums != nullptr)
        for (long i = 0; i < 2; i++) memcpy(g.input_sums + i * n.in, partial + sums_at + i * C, n.in * sizeof(A));
}

// Calls `run` with the 3 x 3 operator of a pair as a type: `groups` is 0 for a shift.
template <class T, class A, class F> inline void with_spatial(const PairSizes<A> &n, F run) {
    if (n.groups == 0)
        run(Shift<T, A>());
    else if (n.groups == n.in)
        run(Depthwise<T, A>());
    else
        run(Grouped<T, A>());
}

// The coefficients of a pair's input norm, in `buffer` (3, padded C); null pointers if `saved` is null.
template <class A>
InputNorm<A> make_input_norm(const A *saved, const A *gamma, const A *beta, const PairSizes<A> &n, A *buffer) {
    if (saved == nullptr) return {nullptr, nullptr, nullptr};
    A *scale = buffer, *offset = buffer + n.padded_in, *mean = buffer + 2 * n.padded_in;
    write_affine(saved, gamma, beta, n.in, scale, offset);
    memcpy(mean, saved, n.in * sizeof(A));
    return {scale, offset, mean};
}

// The pair, and the statistics of its batch norm.
template <class T, class A>
void pair_statistics_forward(const T *x, const A *in_saved, const A *in_gamma, const A *in_beta, const A *kernel,
                             const A *weight, A *running_mean, A *running_var, T *s, T *z, A *saved,
                             const PairSizes<A> &n, double eps, double momentum, int threads) {
    Buffer<A> partial(n.chunks() * 2 * n.out), coefficients(3 * n.padded_in);
    const InputNorm<A> norm = make_input_norm(in_saved, in_gamma, in_beta, n, (A *)coefficients);
    std::vector<long> counts;
    for (long i = 0; i < n.chunks(); i++)
        counts.push_back((n.first(i + 1) - n.first(i)) * n.out_height * n.out_width);
    with_spatial<T>(n, [&](auto spatial) {
        pair_forward<T, A, decltype(spatial)>(x, norm, kernel, weight, s, z, partial, n, threads);
    });
    combine_statistics<A>(partial, counts.data(), n.chunks(), n.out_rows(), n.out, eps, momentum, saved, running_mean,
                          running_var);
}

// The gradients of the pair. `dgamma` and `dbeta` are the gradients of the batch norm after it, which must be known;
// those of the batch norm before it are written to `in_dgamma` and `in_dbeta`.
template <class T, class A>
void pair_norm_backward(const T *dy, const T *z, const A *gamma, const A *beta, const A *saved, const A *dgamma,
                        const A *dbeta, const T *x, const A *in_saved, const A *in_gamma, const A *in_beta,
                        const A *kernel, const A *weight, const T *s, const T *added, T *dx, A *dkernel, A *dweight,
                        A *in_dgamma, A *in_dbeta, const PairSizes<A> &n, int threads) {
    const long O = n.padded_out;
    Buffer<A> all(5 * O), coefficients(3 * n.padded_in), sums(2 * n.in);
    NormGradient<A> gradient = {all, all + O, all + 2 * O, all + 3 * O, all + 4 * O};
    write_affine<A>(saved, gamma, beta, n.out, all, all + O);
    write_gradient_affine<A>(saved, gamma, dgamma, dbeta, n.out_rows(), n.out, all + 2 * O, all + 3 * O, all + 4 * O);
    const InputNorm<A> norm = make_input_norm(in_saved, in_gamma, in_beta, n, (A *)coefficients);
    const PairGradients<T, A> g = {dy,   z,        x,  s,       added,   kernel, weight,
                                   norm, gradient, dx, dkernel, dweight, in_saved ? (A *)sums : nullptr};
    with_spatial<T>(n, [&](auto spatial) { pair_backward<T, A, decltype(spatial)>(g, n, threads); });
    if (in_saved == nullptr) return;
    for (long c = 0; c < n.in; c++) {
        in_dbeta[c] = sums[c];
        in_dgamma[c] = sums[n.in + c] * in_saved[n.in + c];
    }
}

} // namespace
