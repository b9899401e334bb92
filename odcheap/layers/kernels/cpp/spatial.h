// The 3 x 3 operators of a pair, one line of an image at a time: `Depthwise`, `Shift` and `Grouped`.
//
// Each of them is a class with four parts:
// - `Kernel`: the weights as the loops read them; all threads share it.
// - `Forward`: the lines that a thread keeps. `input(h)` is where line `h` of the input is written (width x padded C),
//   `take_input(h)` is called when it is there, and `convolve(row, to)` computes line `row` of the output from the
//   lines around it.
// - `Backward`: the same for the gradients. `gradient(h)` is where the gradient of an output line is written, at the
//   line and with the steps of the input; `take_gradient(h)` is called when it is there. `convolve_again(row, ...)`
//   returns a line of the output again and adds to the gradient of the kernel, and `convolve_back(h, to)` computes line
//   `h` of the gradient of the input.
// - `gradient_size` and `copy_gradient`: the sums of the kernel's gradient, and their copy in PyTorch's order.

#pragma once

#include "products.h"

namespace {

constexpr long PAIR_CHUNKS = 32; // of images: more chunks would use more threads, but take longer to add up

// The sizes of a pair: a 3 x 3 operator C -> C, and a 1 x 1 convolution C -> O with a stride. `padded_in` and
// `padded_out` are C and O, rounded up to a multiple of the vectors' length.
template <class A> struct PairSizes {
    long images, height, width, in, out, stride, groups, out_height, out_width, padded_in, padded_out;

    PairSizes(long images, long height, long width, long in, long out, long stride, long groups)
        : images(images), height(height), width(width), in(in), out(out), stride(stride), groups(groups),
          out_height((height + stride - 1) / stride), out_width((width + stride - 1) / stride),
          padded_in(round_up(in, LANES<A>)), padded_out(round_up(out, LANES<A>)) {}
    long chunks() const { return std::min(PAIR_CHUNKS, images); }
    long first(long chunk) const { return images * chunk / chunks(); }
    long out_rows() const { return images * out_height * out_width; }
};

// Rounds a weight to the type of the map, as autocast does.
template <class T, class A> inline A round_weight(A value) {
    T rounded;
    write(&rounded, value);
    return A(read(&rounded));
}

// Copies a line of an image to a padded line of the type A.
template <class T, class A> inline void read_line(const T *from, long width, long channels, long padded, A *to) {
    if (channels == padded) {
        for (long i = 0; i < width * channels; i += LANES<A>) store(to + i, load(from + i));
        return;
    }
    for (long w = 0; w < width; w++)
        for (long c = 0; c < channels; c++) to[w * padded + c] = read(from + w * channels + c);
}

// Three lines that move down an image: line `h` lies in place h mod 3. A line has `size` numbers for each pixel, and a
// pixel of zeros before and after it.
template <class F> struct Lines {
    long height, size, step;
    Buffer<F> lines, zeros;
    Lines(long height, long width, long size)
        : height(height), size(size), step((width + 2) * size), lines(3 * step), zeros(step) {}
    // The first pixel of a line.
    F *at(long h) { return lines + h % 3 * step + size; }
    // Writes where the lines around line `h` begin, with their first pixel of zeros. Outside of the image and between
    // the lines that the stride visits there are zeros.
    void around(long h, long stride, const F *to[3]) {
        for (long i = 0; i < 3; i++) {
            const long line = h + i - 1;
            to[i] = line < 0 || line >= height || line % stride ? (F *)zeros : at(line) - size;
        }
    }
};

// ------------------------------------------------------------------------------------------------ depth-wise

// The depth-wise convolution of one line; FLIP turns the kernel by 180 degrees, as the gradient of the input needs.
template <class A, bool FLIP>
inline void convolve_line(const A *const lines[3], const A *kernel, long padded, long count, long stride, A *to) {
    for (long c = 0; c < padded; c += LANES<A>) {
        Vector<A> k[9];
        for (int t = 0; t < 9; t++) k[t] = load(kernel + (FLIP ? 8 - t : t) * padded + c);
        for (long w = 0; w < count; w++) {
            const long at = w * stride * padded + c;
            Vector<A> sum = k[0] * load(lines[0] + at);
            for (int t = 1; t < 9; t++) sum += k[t] * load(lines[t / 3] + at + t % 3 * padded);
            store(to + w * padded + c, sum);
        }
    }
}

// `convolve_line`, and adds the gradient of the kernel, given the gradient `ds` of the result; `ds` has the step of
// the input.
template <class A>
inline void convolve_line_again(const A *const lines[3], const A *kernel, const A *ds, long padded, long count,
                                long stride, A *to, A *dkernel) {
    for (long c = 0; c < padded; c += LANES<A>) {
        Vector<A> k[9], dk[9];
        for (int t = 0; t < 9; t++) k[t] = load(kernel + t * padded + c), dk[t] = load(dkernel + t * padded + c);
        for (long w = 0; w < count; w++) {
            const long at = w * stride * padded + c;
            const Vector<A> gradient = load(ds + at);
            Vector<A> sum = {};
            for (int t = 0; t < 9; t++) {
                const Vector<A> value = load(lines[t / 3] + at + t % 3 * padded);
                sum += k[t] * value;
                dk[t] += gradient * value;
            }
            store(to + w * padded + c, sum);
        }
        for (int t = 0; t < 9; t++) store(dkernel + t * padded + c, dk[t]);
    }
}

template <class T, class A> struct Depthwise {
    static constexpr bool SAVES_OUTPUT = false;

    // The kernel (C, 3, 3) as (9, padded C).
    struct Kernel {
        Buffer<A> taps;
        Kernel(const A *kernel, const PairSizes<A> &n) : taps(9 * n.padded_in) {
            for (long c = 0; c < n.in; c++)
                for (long t = 0; t < 9; t++) taps[t * n.padded_in + c] = round_weight<T>(kernel[c * 9 + t]);
        }
    };

    struct Forward {
        Kernel &kernel;
        const PairSizes<A> &n;
        Lines<A> lines;
        Forward(Kernel &kernel, const PairSizes<A> &n)
            : kernel(kernel), n(n), lines(n.height, n.width, n.padded_in) {}
        A *input(long h) { return lines.at(h); }
        void take_input(long) {}
        void convolve(long row, A *to) {
            const A *around[3];
            lines.around(row * n.stride, 1, around);
            convolve_line<A, false>(around, kernel.taps, n.padded_in, n.out_width, n.stride, to);
        }
    };

    struct Backward {
        Kernel &kernel;
        const PairSizes<A> &n;
        Lines<A> lines, gradients;
        Backward(Kernel &kernel, const PairSizes<A> &n)
            : kernel(kernel), n(n), lines(n.height, n.width, n.padded_in), gradients(n.height, n.width, n.padded_in) {}
        A *input(long h) { return lines.at(h); }
        void take_input(long) {}
        A *gradient(long h) { return gradients.at(h); }
        void take_gradient(long) {}
        void convolve_again(long row, const T *, A *to, A *dkernel) {
            const A *around[3];
            lines.around(row * n.stride, 1, around);
            convolve_line_again<A>(around, kernel.taps, gradient(row * n.stride), n.padded_in, n.out_width, n.stride,
                                   to, dkernel);
        }
        void convolve_back(long h, A *to) {
            const A *around[3];
            gradients.around(h, n.stride, around);
            convolve_line<A, true>(around, kernel.taps, n.padded_in, n.width, 1, to);
        }
    };

    static long gradient_size(const PairSizes<A> &n) { return 9 * n.padded_in; }
    static void copy_gradient(const A *sums, const PairSizes<A> &n, A *dkernel) {
        for (long c = 0; c < n.in; c++)
            for (long t = 0; t < 9; t++) dkernel[c * 9 + t] = sums[t * n.padded_in + c];
    }
};

// ------------------------------------------------------------------------------------------------ shift

// Keeps the lanes of a vector whose mask has all bits set; the others become zero.
template <class A> inline Vector<A> keep(Vector<A> value, Vector<A> mask) {
    typedef typename VectorOf<A>::mask Mask;
    return (Vector<A>)((Mask)value & (Mask)mask);
}

template <class A> inline Vector<A> unite(Vector<A> a, Vector<A> b, Vector<A> c) {
    typedef typename VectorOf<A>::mask Mask;
    return (Vector<A>)((Mask)a | (Mask)b | (Mask)c);
}

// Writes a shifted line. `masks` (6, padded C) says for each channel from which of the three lines, and from which of
// three columns, it reads; FLIP shifts into the opposite direction. First the line is chosen, then the column.
template <class A, bool FLIP>
inline void shift_line(const A *const lines[3], const A *masks, long padded, long count, long stride, A *to) {
    for (long c = 0; c < padded; c += LANES<A>) {
        Vector<A> row[3], column[3];
        for (int i = 0; i < 3; i++) {
            row[i] = load(masks + (FLIP ? 2 - i : i) * padded + c);
            column[i] = load(masks + (FLIP ? 5 - i : 3 + i) * padded + c);
        }
        auto choose_line = [&](long pixel) {
            const long at = pixel * padded + c;
            return unite<A>(keep<A>(load(lines[0] + at), row[0]), keep<A>(load(lines[1] + at), row[1]),
                            keep<A>(load(lines[2] + at), row[2]));
        };
        Vector<A> left = choose_line(0), middle = choose_line(1);
        for (long w = 0; w < count; w++) {
            const Vector<A> right = choose_line(w * stride + 2);
            store(to + w * padded + c, unite<A>(keep<A>(left, column[0]), keep<A>(middle, column[1]),
                                                keep<A>(right, column[2])));
            if (w + 1 < count) {
                left = stride == 1 ? middle : right;
                middle = stride == 1 ? right : choose_line(w * stride + 3);
            }
        }
    }
}

// A shift moves numbers and multiplies none. Channel c of the first 9 * floor(C / 9) reads tap c mod 9 of the 3 x 3
// window, and the remaining channels are copied.
template <class T, class A> struct Shift {
    static constexpr bool SAVES_OUTPUT = false;

    struct Kernel {
        Buffer<A> masks;
        Kernel(const A *, const PairSizes<A> &n) : masks(6 * n.padded_in) {
            for (long c = 0; c < n.in; c++) {
                const long tap = c < n.in / 9 * 9 ? c % 9 : 4;
                memset((A *)masks + tap / 3 * n.padded_in + c, 0xff, sizeof(A));
                memset((A *)masks + (3 + tap % 3) * n.padded_in + c, 0xff, sizeof(A));
            }
        }
    };

    struct Forward {
        Kernel &kernel;
        const PairSizes<A> &n;
        Lines<A> lines;
        Forward(Kernel &kernel, const PairSizes<A> &n)
            : kernel(kernel), n(n), lines(n.height, n.width, n.padded_in) {}
        A *input(long h) { return lines.at(h); }
        void take_input(long) {}
        void convolve(long row, A *to) {
            const A *around[3];
            lines.around(row * n.stride, 1, around);
            shift_line<A, false>(around, kernel.masks, n.padded_in, n.out_width, n.stride, to);
        }
    };

    struct Backward : Forward {
        Lines<A> gradients;
        Backward(Kernel &kernel, const PairSizes<A> &n)
            : Forward(kernel, n), gradients(n.height, n.width, n.padded_in) {}
        A *gradient(long h) { return gradients.at(h); }
        void take_gradient(long) {}
        void convolve_again(long row, const T *, A *to, A *) { this->convolve(row, to); }
        void convolve_back(long h, A *to) {
            const A *around[3];
            gradients.around(h, this->n.stride, around);
            shift_line<A, true>(around, this->kernel.masks, this->n.padded_in, this->n.width, 1, to);
        }
    };

    static long gradient_size(const PairSizes<A> &) { return 0; }
    static void copy_gradient(const A *, const PairSizes<A> &, A *) {}
};

// ------------------------------------------------------------------------------------------------ grouped

// How a grouped convolution reads a line of factors of the type F. An output vector has LANES channels, and each of
// them needs the K factors of its own group. If a vector lies within a group, the factors are read one by one and
// broadcast (SPREAD is false). Otherwise a line is spread before: for each pixel, vector and k it gets a vector with
// factor k of each channel's group.
template <class F, class A> struct GroupReader {
    long per_group, K, vectors, line_size, size;
    bool spread;
    std::vector<int32_t> index; // (vectors, K, LANES): the factor of the pixel
    std::vector<long> base;     // (vectors): subtracted from `index` if a vector's factors lie within LANES factors

    GroupReader(const PairSizes<A> &n)
        : per_group(n.in / n.groups), K(per_group / DEPTH<F>), vectors(n.padded_in / LANES<A>),
          line_size(n.padded_in / DEPTH<F>), spread(per_group % LANES<A> != 0) {
        size = spread ? vectors * K * LANES<A> : line_size;
        index.resize(vectors * K * LANES<A>), base.resize(vectors);
        for (long v = 0; v < vectors; v++) {
            base[v] = std::min(v * LANES<A>, n.in - 1) / per_group * K;
            for (long k = 0; k < K; k++)
                for (long l = 0; l < LANES<A>; l++)
                    index[(v * K + k) * LANES<A> + l] = std::min(v * LANES<A> + l, n.in - 1) / per_group * K + k;
            const bool fits = index[(v * K + K) * LANES<A> - 1] - base[v] < LANES<A>;
            if (!fits) base[v] = 0;
            for (long i = v * K * LANES<A>; i < (v + 1) * K * LANES<A>; i++) index[i] -= base[v];
        }
    }
    // Where the factor(s) of vector v and k = 0 of a pixel are; those of the next k are `k_step` further.
    long offset(long v) const { return spread ? v * K * LANES<A> : v * LANES<A> / per_group * K; }
    long k_step() const { return spread ? LANES<A> : 1; }

    // Copies a line of factors (width, line_size) to a line that can be read, (width, size). `from` can be read LANES
    // factors beyond its end.
    template <class E> void copy(const E *from, long width, E *to) const {
        if (!spread) {
            memcpy(static_cast<void *>(to), from, width * size * sizeof(E));
            return;
        }
        for (long v = 0; v < vectors; v++)
            for (long k = 0; k < K; k++) {
                const int32_t *own = index.data() + (v * K + k) * LANES<A>;
                const E *read_at = from + base[v];
                E *write_at = to + (v * K + k) * LANES<A>;
#if defined(__AVX512F__)
                if (sizeof(E) == 4 && index[(v * K + K) * LANES<A> - 1] < LANES<A>) {
                    const __m512i lanes = _mm512_loadu_si512(own);
                    for (long w = 0; w < width; w++)
                        _mm512_storeu_si512(write_at + w * size, _mm512_permutexvar_epi32(lanes, _mm512_loadu_si512(read_at + w * line_size)));
                    continue;
                }
#elif defined(__AVX2__)
                if (sizeof(E) == 4 && index[(v * K + K) * LANES<A> - 1] < LANES<A>) {
                    const __m256i lanes = _mm256_loadu_si256((const __m256i *)own);
                    for (long w = 0; w < width; w++)
                        _mm256_storeu_si256((__m256i *)(write_at + w * size), _mm256_permutevar8x32_epi32(_mm256_loadu_si256((const __m256i *)(read_at + w * line_size)), lanes));
                    continue;
                }
#endif
                for (long w = 0; w < width; w++)
                    for (long l = 0; l < LANES<A>; l++) write_at[w * size + l] = read_at[w * line_size + own[l]];
            }
    }
};

template <bool SPREAD, class F, class A> inline Vector<A> fetch(const F *at) {
    if constexpr (SPREAD)
        return load(at);
    else
        return broadcast(*at);
}

// PIXELS pixels of one output vector: the sum over the 3 x 3 window and the K factors of a group. `weights` (9, K) are
// vectors, `tap_step` apart for two taps; the lines begin at their pixel of zeros.
template <class F, class A, bool SPREAD, int PIXELS, int STRIDE>
inline void convolve_group_tile(const F *const lines[3], long size, long k_step, long K, const F *weights,
                                long tap_step, A *out, long out_step) {
    Vector<A> sums[PIXELS] = {};
    for (int row = 0; row < 3; row++)
        for (long k = 0; k < K; k++) {
            const F *at = lines[row] + k * k_step, *own = weights + row * 3 * tap_step + k * LANES<A>;
            const Vector<A> w[3] = {load(own), load(own + tap_step), load(own + 2 * tap_step)};
            if constexpr (STRIDE == 1) {
                // A pixel of the input is read once for the three pixels of the output that use it.
#pragma GCC unroll 16
                for (int i = 0; i < PIXELS + 2; i++) {
                    const Vector<A> value = fetch<SPREAD, F, A>(at + i * size);
#pragma GCC unroll 3
                    for (int t = 0; t < 3; t++)
                        if (i - t >= 0 && i - t < PIXELS) sums[i - t] = multiply_add<F, A>(value, w[t], sums[i - t]);
                }
            } else {
#pragma GCC unroll 8
                for (int p = 0; p < PIXELS; p++)
#pragma GCC unroll 3
                    for (int t = 0; t < 3; t++)
                        sums[p] = multiply_add<F, A>(fetch<SPREAD, F, A>(at + (p * STRIDE + t) * size), w[t], sums[p]);
            }
        }
#pragma GCC unroll 8
    for (int p = 0; p < PIXELS; p++) store(out + p * out_step, sums[p]);
}

// The grouped convolution of one line: `weights` (9, vectors, K) are vectors.
template <class F, class A, bool SPREAD, int STRIDE>
inline void convolve_group_line(const F *const lines[3], const GroupReader<F, A> &reader, const F *weights, long padded,
                                long count, A *to) {
    constexpr int WIDE = VECTOR_BYTES == 64 ? 8 : 4;
    for (long v = 0; v < reader.vectors; v++) {
        long p = 0;
        auto run = [&](auto pixels) {
            constexpr int PIXELS = decltype(pixels)::value;
            const long at = p * STRIDE * reader.size + reader.offset(v);
            const F *const own[3] = {lines[0] + at, lines[1] + at, lines[2] + at};
            convolve_group_tile<F, A, SPREAD, PIXELS, STRIDE>(
                own, reader.size, reader.k_step(), reader.K, weights + v * reader.K * LANES<A>,
                reader.vectors * reader.K * LANES<A>, to + p * padded + v * LANES<A>, padded);
            p += PIXELS;
        };
        while (p + WIDE <= count) run(std::integral_constant<int, WIDE>());
        if (p + 4 <= count) run(std::integral_constant<int, 4>());
        if (p + 2 <= count) run(std::integral_constant<int, 2>());
        if (p < count) run(std::integral_constant<int, 1>());
    }
}

template <class F, class A>
inline void convolve_groups(const F *const lines[3], const GroupReader<F, A> &reader, const F *weights, long padded,
                            long count, long stride, A *to) {
    auto run = reader.spread ? (stride == 1 ? convolve_group_line<F, A, true, 1> : convolve_group_line<F, A, true, 2>)
                             : (stride == 1 ? convolve_group_line<F, A, false, 1> : convolve_group_line<F, A, false, 2>);
    run(lines, reader, weights, padded, count, to);
}

// Adds the gradient of DEEP of the K entries of a group's kernel, of one row of the window: `dkernel` (3, K) are
// vectors, `tap_step` apart for two taps. `ds` has `count` vectors of factors, `ds_step` apart, and the line is read in
// steps of `pixel_step` pixels.
template <class F, class A, bool SPREAD, int DEEP>
inline void add_group_gradient_tile(const F *line, long size, long k_step, const F *ds, long ds_step, long count,
                                    long pixel_step, A *dkernel, long tap_step) {
    Vector<A> sums[3][DEEP];
#pragma GCC unroll 3
    for (int t = 0; t < 3; t++)
#pragma GCC unroll 8
        for (int k = 0; k < DEEP; k++) sums[t][k] = load(dkernel + t * tap_step + k * LANES<A>);
    for (long w = 0; w < count; w++) {
        const Vector<A> gradient = load(ds + w * ds_step);
#pragma GCC unroll 3
        for (int t = 0; t < 3; t++)
#pragma GCC unroll 8
            for (int k = 0; k < DEEP; k++)
                sums[t][k] = multiply_add<F, A>(gradient, fetch<SPREAD, F, A>(line + (w * pixel_step + t) * size + k * k_step), sums[t][k]);
    }
#pragma GCC unroll 3
    for (int t = 0; t < 3; t++)
#pragma GCC unroll 8
        for (int k = 0; k < DEEP; k++) store(dkernel + t * tap_step + k * LANES<A>, sums[t][k]);
}

// Adds the gradient of the kernel, (9, vectors, K) vectors, given the gradient `ds` of the output.
template <class F, class A, bool SPREAD>
inline void add_group_gradient(const F *const lines[3], const GroupReader<A, A> &reader, const F *ds, long ds_step,
                               long count, long pixel_step, A *dkernel) {
    constexpr int WIDE = VECTOR_BYTES == 64 ? 8 : 4;
    const long tap_step = reader.vectors * reader.K * LANES<A>;
    for (long v = 0; v < reader.vectors; v++)
        for (int row = 0; row < 3; row++) {
            long k = 0;
            auto run = [&](auto deep) {
                constexpr int DEEP = decltype(deep)::value;
                add_group_gradient_tile<F, A, SPREAD, DEEP>(
                    lines[row] + reader.offset(v) + k * reader.k_step(), reader.size, reader.k_step(),
                    ds + v * LANES<A>, ds_step, count, pixel_step,
                    dkernel + row * 3 * tap_step + (v * reader.K + k) * LANES<A>, tap_step);
                k += DEEP;
            };
            while (k + WIDE <= reader.K) run(std::integral_constant<int, WIDE>());
            if (k + 4 <= reader.K) run(std::integral_constant<int, 4>());
            if (k + 2 <= reader.K) run(std::integral_constant<int, 2>());
            if (k < reader.K) run(std::integral_constant<int, 1>());
        }
}

// A grouped 3 x 3 convolution; a group has an even number of channels. The output is kept for the backward pass: it
// takes longer to compute than to read.
template <class T, class A> struct Grouped {
    typedef FactorOf<T, A> F;
    static constexpr bool SAVES_OUTPUT = true;

    // The kernel (C, C / groups, 3, 3) as vectors (9, vectors, K): `forward` over the channels of the output, and
    // `backward`, turned by 180 degrees, over those of the input.
    struct Kernel {
        GroupReader<F, A> reader;
        Buffer<F> forward, backward;
        Kernel(const A *kernel, const PairSizes<A> &n)
            : reader(n), forward(9 * reader.vectors * reader.K * LANES<A>), backward(forward.count) {
            const long per_group = reader.per_group;
            for (long c = 0; c < n.in; c++)
                for (long j = 0; j < per_group; j++)
                    for (long t = 0; t < 9; t++) {
                        const long own = c / per_group * per_group;
                        set_factor(at(forward, t, c), j, c % LANES<A>, LANES<A>,
                                   round_weight<T>(kernel[(c * per_group + j) * 9 + t]));
                        set_factor(at(backward, 8 - t, c), j, c % LANES<A>, LANES<A>,
                                   round_weight<T>(kernel[((own + j) * per_group + c - own) * 9 + t]));
                    }
        }
        F *at(F *weights, long tap, long channel) const {
            return weights + (tap * reader.vectors + channel / LANES<A>)*reader.K * LANES<A>;
        }
    };

    struct Forward {
        Kernel &kernel;
        const PairSizes<A> &n;
        Lines<F> lines;
        Buffer<A> line;
        Buffer<F> factors;
        Forward(Kernel &kernel, const PairSizes<A> &n)
            : kernel(kernel), n(n), lines(n.height, n.width, kernel.reader.size),
              line(n.width * n.padded_in + LANES<A>), factors(n.width * n.padded_in / DEPTH<F> + LANES<A>) {}
        A *input(long) { return line; }
        void take_input(long h) {
            kernel.reader.copy(channel_factors_of<F, A>(line, n.width, n.padded_in, factors), n.width, lines.at(h));
        }
        void convolve(long row, A *to) {
            const F *around[3];
            lines.around(row * n.stride, 1, around);
            convolve_groups<F, A>(around, kernel.reader, kernel.forward, n.padded_in, n.out_width, n.stride, to);
        }
    };

    // The gradient of the kernel is a sum over pixels. If a factor is two numbers, they are those of two pixels that are
    // side by side: `lines` has such a pair for each pixel and the one after it.
    struct Backward {
        Kernel &kernel;
        const PairSizes<A> &n;
        GroupReader<A, A> reader; // of the input
        Lines<F> lines, gradients;
        Buffer<A> line, ds;
        Buffer<F> factors, pixel_pairs;
        Backward(Kernel &kernel, const PairSizes<A> &n)
            : kernel(kernel), n(n), reader(n), lines(n.height, n.width, reader.size),
              gradients(n.height, n.width, kernel.reader.size), line(n.width * n.padded_in + LANES<A>),
              ds(n.width * n.padded_in + LANES<A>), factors(n.width * n.padded_in / DEPTH<F> + LANES<A>),
              pixel_pairs((n.width + 1) * n.padded_in + LANES<A>) {}
        A *input(long) { return line; }
        void take_input(long h) {
            if constexpr (DEPTH<F> == 1) {
                reader.copy((const F *)line, n.width, lines.at(h));
            } else {
                write_neighbor_factors(line, n.width, n.padded_in, (F *)pixel_pairs);
                reader.copy((const F *)pixel_pairs, n.width + 1, lines.at(h) - reader.size);
            }
        }
        A *gradient(long) { return ds; }
        void take_gradient(long h) {
            kernel.reader.copy(channel_factors_of<F, A>(ds, n.width, n.padded_in, factors), n.width, gradients.at(h));
        }
        void convolve_again(long row, const T *saved, A *to, A *dkernel) {
            read_line(saved, n.out_width, n.in, n.padded_in, to);
            const F *around[3];
            lines.around(row * n.stride, 1, around);
            auto run = reader.spread ? add_group_gradient<F, A, true> : add_group_gradient<F, A, false>;
            if constexpr (DEPTH<F> == 1) {
                run(around, reader, ds, n.stride * n.padded_in, n.out_width, n.stride, dkernel);
            } else {
                // With a stride of 2 every second pixel of the gradient is zero.
                write_factors((A *)ds, n.width, n.padded_in, (F *)nullptr, (F *)pixel_pairs);
                run(around, reader, pixel_pairs, n.padded_in, (n.width + 1) / 2, 2, dkernel);
            }
        }
        void convolve_back(long h, A *to) {
            const F *around[3];
            gradients.around(h, n.stride, around);
            convolve_groups<F, A>(around, kernel.reader, kernel.backward, n.padded_in, n.width, 1, to);
        }
    };

    static long gradient_size(const PairSizes<A> &n) { return 9 * n.padded_in * (n.in / n.groups); }
    static void copy_gradient(const A *sums, const PairSizes<A> &n, A *dkernel) {
        const long per_group = n.in / n.groups, vectors = n.padded_in / LANES<A>;
        for (long c = 0; c < n.in; c++)
            for (long j = 0; j < per_group; j++)
                for (long t = 0; t < 9; t++)
                    dkernel[(c * per_group + j) * 9 + t] =
                        sums[((t * vectors + c / LANES<A>)*per_group + j) * LANES<A> + c % LANES<A>];
    }
};

} // namespace
