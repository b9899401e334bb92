// Fused operators of training steps on channels-last feature maps, for CPUs.
//
// A row is one pixel of one image with all its C channels; in the functions on image rows, a line is one row of pixels
// of an image. The operators read and write feature maps of the type T (float, bfloat16 or double), and compute in the
// type A (float; double if T is double). All parameters, statistics and sums are of the type A.
//
// Maps are divided into chunks whose number does not depend on the number of threads. Each chunk writes its own sums,
// which are then added up in a fixed order: the results are the same bits for each number of threads.
//
// The vectors are those of GCC's and Clang's vector extensions, with the width of this processor's registers.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <type_traits>
#include <vector>

#if defined(__AVX512F__)
#define VECTOR_BYTES 64
#elif defined(__AVX__)
#define VECTOR_BYTES 32
#else
#define VECTOR_BYTES 16
#endif

#if defined(__AVX512BF16__)
#include <immintrin.h>
#endif

namespace {

constexpr long PAIR_CHUNKS = 32;   // of images: more chunks would use more threads, but take longer to add up
constexpr long NORM_CHUNKS = 64;   // of rows
constexpr long LINES_OF_SUMS = 64; // pixels that are collected before they are added to the gradient of the 1 x 1 kernel

struct bfloat16 {
    uint16_t bits;
};

// ------------------------------------------------------------------------------------------------ vectors

template <class A> struct VectorOf;
template <> struct VectorOf<float> {
    typedef float type __attribute__((vector_size(VECTOR_BYTES)));
    typedef int32_t mask __attribute__((vector_size(VECTOR_BYTES)));
};
template <> struct VectorOf<double> {
    typedef double type __attribute__((vector_size(VECTOR_BYTES)));
    typedef int64_t mask __attribute__((vector_size(VECTOR_BYTES)));
};
template <class A> using Vector = typename VectorOf<A>::type;
template <class A> constexpr long LANES = VECTOR_BYTES / sizeof(A);

typedef uint16_t Bits16 __attribute__((vector_size(VECTOR_BYTES / 2)));
typedef uint32_t Bits32 __attribute__((vector_size(VECTOR_BYTES)));

inline float widen(bfloat16 value) {
    uint32_t bits = uint32_t(value.bits) << 16;
    float result;
    memcpy(&result, &bits, 4);
    return result;
}

// Rounds to the nearest bfloat16, ties to even; NaN stays NaN.
inline bfloat16 narrow(float value) {
    if (value != value) return {0x7fc0};
    uint32_t bits;
    memcpy(&bits, &value, 4);
    return {uint16_t((bits + 0x7fff + ((bits >> 16) & 1)) >> 16)};
}

template <class A> inline Vector<A> load(const A *from) {
    Vector<A> value;
    memcpy(&value, from, VECTOR_BYTES);
    return value;
}

inline Vector<float> load(const bfloat16 *from) {
    Bits16 half;
    memcpy(&half, from, VECTOR_BYTES / 2);
    return (Vector<float>)(__builtin_convertvector(half, Bits32) << 16);
}

template <class A> inline void store(A *to, Vector<A> value) { memcpy(to, &value, VECTOR_BYTES); }

inline void store(bfloat16 *to, Vector<float> value) {
#if defined(__AVX512BF16__)
    auto half = _mm512_cvtneps_pbh((__m512)value);
#else
    Bits32 bits = (Bits32)value;
    Bits32 rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
    Bits32 is_nan = (Bits32)(value != value);
    Bits16 half = __builtin_convertvector((rounded & ~is_nan) | (0x7fc0 & is_nan), Bits16);
#endif
    memcpy(to, &half, VECTOR_BYTES / 2);
}

inline float read(const bfloat16 *from) { return widen(*from); }
template <class A> inline A read(const A *from) { return *from; }
inline void write(bfloat16 *to, float value) { *to = narrow(value); }
template <class A> inline void write(A *to, A value) { *to = value; }

// The type in which sums over a map of the type T are computed.
template <class T> struct SumOf {
    typedef T type;
};
template <> struct SumOf<bfloat16> {
    typedef float type;
};

// Returns `value` where `sign` is positive or NaN, otherwise zero; keeps NaN as PyTorch's ReLU does.
template <class A> inline Vector<A> where_positive(Vector<A> sign, Vector<A> value) {
    typedef typename VectorOf<A>::mask Mask;
    return (Vector<A>)((Mask)value & ~(Mask)(sign <= A(0)));
}
template <class A> inline A where_positive_scalar(A sign, A value) { return sign <= A(0) ? A(0) : value; }

inline long round_up(long count, long multiple) { return (count + multiple - 1) / multiple * multiple; }

// A block of memory that begins at a multiple of 64 bytes and holds zeros.
template <class A> struct Buffer {
    A *data;
    explicit Buffer(long count) {
        size_t bytes = round_up(std::max(count, 1L) * long(sizeof(A)), 64);
        data = static_cast<A *>(std::aligned_alloc(64, bytes));
        if (data == nullptr) std::abort();
        memset(static_cast<void *>(data), 0, bytes);
    }
    ~Buffer() { std::free(data); }
    Buffer(const Buffer &) = delete;
    Buffer &operator=(const Buffer &) = delete;
    operator A *() { return data; }
};

// ------------------------------------------------------------------------------------------------ batch norm

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

// ------------------------------------------------------------------------------------------------ the pair

// A factor of a matrix product: a number of the type A, or two bfloat16 numbers that one instruction multiplies with two
// others and adds up in float32.
struct BfloatPair {
    uint32_t bits;
};

#if defined(__AVX512BF16__)
template <class T, class A>
using FactorOf = typename std::conditional<std::is_same<T, bfloat16>::value, BfloatPair, A>::type;

inline Vector<float> load(const BfloatPair *from) {
    Vector<float> value;
    memcpy(&value, from, VECTOR_BYTES);
    return value;
}
inline Vector<float> multiply_add(BfloatPair factor, Vector<float> column, Vector<float> sum) {
    __m512i both = _mm512_set1_epi32(int(factor.bits));
    return (Vector<float>)_mm512_dpbf16_ps((__m512)sum, (__m512bh)both, (__m512bh)(__m512)column);
}
#else
template <class T, class A> using FactorOf = A;
#endif
template <class A> inline Vector<A> multiply_add(A factor, Vector<A> column, Vector<A> sum) {
    return sum + factor * column;
}

// The numbers that a factor has.
template <class F> constexpr long DEPTH = std::is_same<F, BfloatPair>::value ? 2 : 1;

// Matrix product of PIXELS x K and K x (COLUMNS vectors), with the factor s[p * pixel_step + k * k_step]. ADD adds to
// `out` in place of replacing it.
template <class F, class A, int PIXELS, int COLUMNS, bool ADD>
inline void multiply_tile(const F *s, long pixel_step, long k_step, const F *w, long w_step, long K, A *out,
                          long out_step) {
    Vector<A> sums[PIXELS][COLUMNS];
    for (int p = 0; p < PIXELS; p++)
        for (int j = 0; j < COLUMNS; j++)
            sums[p][j] = ADD ? load(out + p * out_step + j * LANES<A>) : Vector<A>{};
    for (long k = 0; k < K; k++) {
        Vector<A> column[COLUMNS];
        for (int j = 0; j < COLUMNS; j++) column[j] = load(w + k * w_step + j * LANES<A>);
        for (int p = 0; p < PIXELS; p++) {
            const F factor = s[p * pixel_step + k * k_step];
            for (int j = 0; j < COLUMNS; j++) sums[p][j] = multiply_add(factor, column[j], sums[p][j]);
        }
    }
    for (int p = 0; p < PIXELS; p++)
        for (int j = 0; j < COLUMNS; j++) store(out + p * out_step + j * LANES<A>, sums[p][j]);
}

template <class F, class A, int COLUMNS, bool ADD>
inline void multiply_columns(const F *s, long pixel_step, long k_step, long pixels, const F *w, long w_step, long K,
                             A *out, long out_step) {
    constexpr int WIDE = VECTOR_BYTES == 64 ? 8 : 4;
    long p = 0;
    auto run = [&](auto count) {
        constexpr int PIXELS = decltype(count)::value;
        multiply_tile<F, A, PIXELS, COLUMNS, ADD>(s + p * pixel_step, pixel_step, k_step, w, w_step, K,
                                                  out + p * out_step, out_step);
        p += PIXELS;
    };
    while (p + WIDE <= pixels) run(std::integral_constant<int, WIDE>());
    if (p + 4 <= pixels) run(std::integral_constant<int, 4>());
    if (p + 2 <= pixels) run(std::integral_constant<int, 2>());
    if (p < pixels) run(std::integral_constant<int, 1>());
}

// out (pixels x columns) = or += s (pixels x K) w (K x columns); `columns` is a multiple of the vectors' length.
template <bool ADD, class F, class A>
void multiply(const F *s, long pixel_step, long k_step, long pixels, const F *w, long w_step, long K, long columns,
              A *out, long out_step) {
    long j = 0;
    for (; j + 2 * LANES<A> <= columns; j += 2 * LANES<A>)
        multiply_columns<F, A, 2, ADD>(s, pixel_step, k_step, pixels, w + j, w_step, K, out + j, out_step);
    if (j < columns) multiply_columns<F, A, 1, ADD>(s, pixel_step, k_step, pixels, w + j, w_step, K, out + j, out_step);
}

// Sets the number in row k and column j of a matrix of factors; a factor has the numbers of DEPTH rows.
template <class A> inline void set_factor(A *to, long k, long j, long columns, A value) { to[k * columns + j] = value; }
inline void set_factor(BfloatPair *to, long k, long j, long columns, float value) {
    BfloatPair &pair = to[k / 2 * columns + j];
    const uint32_t bits = narrow(value).bits;
    pair.bits = k % 2 ? (pair.bits & 0xffff) | bits << 16 : (pair.bits & 0xffff0000) | bits;
}

// A line of pixels as the factors of matrix products: `line` is where its numbers are written. Numbers of the type A are
// factors themselves, in `along_pixels`, so the line is written there.
template <class A> inline A *line_of(A *along_pixels, A *) { return along_pixels; }
template <class A> inline A *channel_factors(A *along_pixels, A *) { return along_pixels; }
template <class A> inline void write_factors(const A *, long, long, A *, A *) {}

#if defined(__AVX512BF16__)
inline float *line_of(BfloatPair *, float *line) { return line; }
inline BfloatPair *channel_factors(BfloatPair *, BfloatPair *along_channels) { return along_channels; }

// Copies a line of pixels to pairs of factors. `along_channels` gets those of a product over channels (pixels x C / 2),
// `along_pixels` those of a product over pixels (pixels / 2 x C); either may be null.
inline void write_factors(const float *line, long pixels, long C, BfloatPair *along_channels, BfloatPair *along_pixels) {
    uint16_t order[32];
    for (int i = 0; i < 32; i++) order[i] = uint16_t(i / 2 + i % 2 * 16);
    const __m512i interleave = _mm512_loadu_si512(order);
    for (long p = 0; p < pixels; p += 2)
        for (long c = 0; c < C; c += 16) {
            const float *at = line + p * C + c;
            const __m512 first = _mm512_loadu_ps(at);
            const __m512 second = p + 1 < pixels ? _mm512_loadu_ps(at + C) : _mm512_setzero_ps();
            const __m512i both = (__m512i)_mm512_cvtne2ps_pbh(second, first);
            if (along_channels != nullptr) {
                BfloatPair *to = along_channels + (p * C + c) / 2;
                memcpy(to, &both, 32);
                if (p + 1 < pixels) memcpy(to + C / 2, (const char *)&both + 32, 32);
            }
            if (along_pixels != nullptr)
                _mm512_storeu_si512(along_pixels + p / 2 * C + c, _mm512_permutexvar_epi16(interleave, both));
        }
}
#endif

// The sizes of a pair: a 3 x 3 depth-wise convolution C -> C, and a 1 x 1 convolution C -> O with a stride. `padded_in`
// and `padded_out` are C and O, rounded up to a multiple of the vectors' length.
template <class A> struct PairSizes {
    long images, height, width, in, out, stride, out_height, out_width, padded_in, padded_out;

    PairSizes(long images, long height, long width, long in, long out, long stride)
        : images(images), height(height), width(width), in(in), out(out), stride(stride),
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

// Copies the depth-wise kernel (C, 3, 3) to (9, padded C). A shift, for which `kernel` is null, has one-hot kernels:
// channel c of the first 9 * floor(C / 9) reads tap c mod 9, and the remaining channels are copied.
template <class T, class A> void copy_kernel(const A *kernel, const PairSizes<A> &n, A *to) {
    for (long c = 0; c < n.in; c++) {
        const long tap = c < n.in / 9 * 9 ? c % 9 : 4;
        for (long t = 0; t < 9; t++)
            to[t * n.padded_in + c] = kernel == nullptr ? A(t == tap) : round_weight<T>(kernel[c * 9 + t]);
    }
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

// The depth-wise convolution of one line: `lines` are three padded lines, each with a pixel of zeros before and after
// it; FLIP turns the kernel by 180 degrees, as the gradient of the input needs.
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
template <class A, bool WITH_KERNEL>
inline void convolve_line_again(const A *const lines[3], const A *kernel, const A *ds, long padded, long count,
                                long stride, A *to, A *dkernel) {
    for (long c = 0; c < padded; c += LANES<A>) {
        Vector<A> k[9], dk[9];
        for (int t = 0; t < 9; t++) k[t] = load(kernel + t * padded + c);
        if (WITH_KERNEL)
            for (int t = 0; t < 9; t++) dk[t] = load(dkernel + t * padded + c);
        for (long w = 0; w < count; w++) {
            const long at = w * stride * padded + c;
            const Vector<A> gradient = load(ds + at);
            Vector<A> sum = {};
            for (int t = 0; t < 9; t++) {
                const Vector<A> value = load(lines[t / 3] + at + t % 3 * padded);
                sum += k[t] * value;
                if (WITH_KERNEL) dk[t] += gradient * value;
            }
            store(to + w * padded + c, sum);
        }
        if (WITH_KERNEL)
            for (int t = 0; t < 9; t++) store(dkernel + t * padded + c, dk[t]);
    }
}

// Three padded lines that move down an image: line `h` lies in place h mod 3.
template <class A> struct Lines {
    long height, step;
    Buffer<A> lines, zeros;
    Lines(long height, long width, long padded)
        : height(height), step((width + 2) * padded), lines(3 * step), zeros(step) {}
    A *at(long h) { return lines + h % 3 * step; }
    const A *get(long h, long stride = 1) { return h < 0 || h >= height || h % stride ? (A *)zeros : at(h); }
};

// Writes z, the output of the 1 x 1 convolution, and the statistics of z in each chunk of images to partial
// (chunks, 2, O): the mean and the sum of squared deviations.
template <class T, class A>
void pair_forward(const T *x, const A *kernel, const A *weight, T *z, A *partial, const PairSizes<A> &n, int threads) {
    const long C = n.padded_in, O = n.padded_out;
    typedef FactorOf<T, A> F;
    Buffer<A> k(9 * C);
    Buffer<F> w(C / DEPTH<F> * O);
    copy_kernel<T>(kernel, n, (A *)k);
    for (long o = 0; o < n.out; o++)
        for (long c = 0; c < n.in; c++) set_factor((F *)w, c, o, O, round_weight<T>(weight[o * n.in + c]));
#pragma omp parallel num_threads(threads)
    {
        Lines<A> input(n.height, n.width, C);
        Buffer<A> s(n.out_width * C), line(n.out_width * O), pivot(O), sum(O), square(O);
        Buffer<F> factors(n.out_width * C / DEPTH<F>);
#pragma omp for schedule(static)
        for (long chunk = 0; chunk < n.chunks(); chunk++) {
            for (long o = 0; o < O; o++) sum[o] = square[o] = 0;
            for (long image = n.first(chunk); image < n.first(chunk + 1); image++) {
                const T *from = x + image * n.height * n.width * n.in;
                T *to = z + image * n.out_height * n.out_width * n.out;
                long read_lines = 0;
                for (long row = 0; row < n.out_height; row++) {
                    const long h = row * n.stride;
                    for (; read_lines < std::min(h + 2, n.height); read_lines++)
                        read_line(from + read_lines * n.width * n.in, n.width, n.in, C, input.at(read_lines) + C);
                    const A *lines[3] = {input.get(h - 1), input.get(h), input.get(h + 1)};
                    A *own_s = line_of((F *)factors, (A *)s);
                    convolve_line<A, false>(lines, k, C, n.out_width, n.stride, own_s);
                    write_factors(own_s, n.out_width, C, (F *)factors, (F *)nullptr);
                    const long K = C / DEPTH<F>;
                    multiply<false>((F *)factors, K, 1, n.out_width, (F *)w, O, K, O, (A *)line, O);
                    T *out = to + row * n.out_width * n.out;
                    write_line<T, A>(line, nullptr, n.out_width, n.out, O, out);
                    // The statistics of the rounded values.
                    if (sizeof(T) != sizeof(A)) read_line(out, n.out_width, n.out, O, (A *)line);
                    if (image == n.first(chunk) && row == 0) memcpy(pivot, line, O * sizeof(A));
                    for (long o = 0; o < O; o += LANES<A>) {
                        const Vector<A> center = load((A *)pivot + o);
                        Vector<A> total = load((A *)sum + o), squares = load((A *)square + o);
                        for (long p = 0; p < n.out_width; p++) {
                            const Vector<A> away = load((A *)line + p * O + o) - center;
                            total += away, squares += away * away;
                        }
                        store((A *)sum + o, total), store((A *)square + o, squares);
                    }
                }
            }
            const A count = A((n.first(chunk + 1) - n.first(chunk)) * n.out_height * n.out_width);
            for (long o = 0; o < n.out; o++) {
                partial[chunk * 2 * n.out + o] = pivot[o] + sum[o] / count;
                partial[(chunk * 2 + 1) * n.out + o] = std::max(A(0), square[o] - sum[o] * sum[o] / count);
            }
        }
    }
}

// The gradient of a batch norm and ReLU, given the gradient of their output: coefficients (padded O) of each channel.
template <class A> struct NormGradient {
    const A *scale, *offset, *gain, *slope, *shift;
};

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

// Writes the gradients of the input, the kernel (C, 3, 3; none if dkernel is null) and the weight (O, C). `added` is
// added to the gradient of the input if it is not null.
template <class T, class A>
void pair_backward(const T *dy, const T *z, const NormGradient<A> &norm, const T *x, const A *kernel, const A *weight,
                   const T *added, T *dx, A *dkernel, A *dweight, const PairSizes<A> &n, int threads) {
    typedef FactorOf<T, A> F;
    const long C = n.padded_in, O = n.padded_out, columns = n.in * O + 9 * C, chunks = n.chunks();
    Buffer<A> k(9 * C), partial(chunks * columns);
    Buffer<F> w(O / DEPTH<F> * C);
    copy_kernel<T>(kernel, n, (A *)k);
    for (long o = 0; o < n.out; o++)
        for (long c = 0; c < n.in; c++) set_factor((F *)w, o, c, C, round_weight<T>(weight[o * n.in + c]));
#pragma omp parallel num_threads(threads)
    {
        Lines<A> input(n.height, n.width, C), gradient(n.height, n.width, C);
        const long collected_lines = std::max(1L, LINES_OF_SUMS / n.out_width);
        // The factors of a line along pixels, and the lines that are collected of them.
        const long deep = round_up(n.out_width, DEPTH<F>) / DEPTH<F>;
        Buffer<F> s_factors(collected_lines * deep * C), dz_factors(collected_lines * deep * O);
        Buffer<F> dz_channels(n.out_width * O / DEPTH<F>);
        Buffer<A> s(n.out_width * C), dz(n.out_width * O), line(n.width * C);
#pragma omp for schedule(static)
        for (long chunk = 0; chunk < chunks; chunk++) {
            A *dw = partial + chunk * columns, *dk = dw + n.in * O;
            for (long image = n.first(chunk); image < n.first(chunk + 1); image++) {
                const long in_image = n.height * n.width * n.in, out_image = n.out_height * n.out_width * n.out;
                const T *from = x + image * in_image;
                read_line(from, n.width, n.in, C, input.at(0) + C);
                long collected = 0;
                for (long h = 0; h <= n.height; h++) {
                    if (h + 1 < n.height)
                        read_line(from + (h + 1) * n.width * n.in, n.width, n.in, C, input.at(h + 1) + C);
                    if (h < n.height && h % n.stride == 0) {
                        const long at = image * out_image + h / n.stride * n.out_width * n.out;
                        F *s_own = s_factors + collected * deep * C, *dz_own = dz_factors + collected * deep * O;
                        A *s_line = line_of(s_own, (A *)s), *dz_line = line_of(dz_own, (A *)dz);
                        F *dz_over = channel_factors(dz_own, (F *)dz_channels);
                        gradient_line(dy + at, z + at, norm, n.out_width, n.out, O, dz_line);
                        write_factors(dz_line, n.out_width, O, dz_over, dz_own);
                        // The gradient of the depth-wise convolution's output, at the step of the input.
                        A *ds = gradient.at(h) + C;
                        const long K = O / DEPTH<F>;
                        multiply<false>(dz_over, K, 1, n.out_width, (F *)w, C, K, C, ds, n.stride * C);
                        const A *lines[3] = {input.get(h - 1), input.get(h), input.get(h + 1)};
                        if (dkernel != nullptr)
                            convolve_line_again<A, true>(lines, k, ds, C, n.out_width, n.stride, s_line, dk);
                        else
                            convolve_line_again<A, false>(lines, k, ds, C, n.out_width, n.stride, s_line, dk);
                        write_factors(s_line, n.out_width, C, (F *)nullptr, s_own);
                        collected++;
                        if (collected == collected_lines || h + n.stride >= n.height) {
                            multiply<true>((F *)s_factors, 1, C, n.in, (F *)dz_factors, O, collected * deep, O, dw, O);
                            collected = 0;
                        }
                    }
                    if (h == 0) continue;
                    const A *lines[3] = {gradient.get(h - 2, n.stride), gradient.get(h - 1, n.stride),
                                         gradient.get(h, n.stride)};
                    convolve_line<A, true>(lines, k, C, n.width, 1, line);
                    const long at = image * in_image + (h - 1) * n.width * n.in;
                    write_line<T, A>(line, added == nullptr ? nullptr : added + at, n.width, n.in, C, dx + at);
                }
            }
        }
    }
    // Add up the chunks' sums in their order.
    for (long chunk = 1; chunk < chunks; chunk++)
        for (long i = 0; i < columns; i++) partial[i] += partial[chunk * columns + i];
    for (long o = 0; o < n.out; o++)
        for (long c = 0; c < n.in; c++) dweight[o * n.in + c] = partial[c * O + o];
    if (dkernel == nullptr) return;
    for (long c = 0; c < n.in; c++)
        for (long t = 0; t < 9; t++) dkernel[c * 9 + t] = partial[n.in * O + t * C + c];
}

// ------------------------------------------------------------------------------------------------ whole operators

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

template <class T, class A>
void pair_norm_forward(const T *x, const A *kernel, const A *weight, const T *residual, const A *gamma, const A *beta,
                       A *running_mean, A *running_var, T *z, T *y, A *saved, const PairSizes<A> &n, double eps,
                       double momentum, int threads) {
    Buffer<A> partial(n.chunks() * 2 * n.out);
    std::vector<long> counts;
    for (long i = 0; i < n.chunks(); i++)
        counts.push_back((n.first(i + 1) - n.first(i)) * n.out_height * n.out_width);
    pair_forward<T, A>(x, kernel, weight, z, partial, n, threads);
    combine_statistics<A>(partial, counts.data(), n.chunks(), n.out_rows(), n.out, eps, momentum, saved, running_mean,
                          running_var);
    normalize<T, A>(z, residual, y, gamma, beta, saved, n.out_rows(), n.out, residual ? ACT_ADD : NO_RESIDUAL, threads);
}

template <class T, class A>
void pair_norm_backward(const T *dy, const T *z, const T *x, const A *kernel, const A *weight, const A *gamma,
                        const A *beta, const A *saved, const T *added, T *dx, A *dkernel, A *dweight, A *dgamma,
                        A *dbeta, const PairSizes<A> &n, int threads) {
    const long rows = n.out_rows(), O = n.padded_out;
    gradient_sums<T, A, false>(dy, z, z, gamma, beta, saved, rows, n.out, threads, dgamma, dbeta);
    Buffer<A> all(5 * O);
    NormGradient<A> norm = {all, all + O, all + 2 * O, all + 3 * O, all + 4 * O};
    write_affine<A>(saved, gamma, beta, n.out, all, all + O);
    write_gradient_affine<A>(saved, gamma, dgamma, dbeta, rows, n.out, all + 2 * O, all + 3 * O, all + 4 * O);
    pair_backward<T, A>(dy, z, norm, x, kernel, weight, added, dx, dkernel, dweight, n, threads);
}

} // namespace

// The functions that Python calls, once for each type of the map.
#define EXPORT(NAME, T, A)                                                                                             \
    extern "C" void norm_forward_##NAME(const T *x, const T *residual, T *y, const A *weight, const A *bias,           \
                                        A *running_mean, A *running_var, int64_t *batches, A *saved, long rows,        \
                                        long channels, double eps, double momentum, int order, int threads) {          \
        norm_forward<T, A>(x, residual, y, weight, bias, running_mean, running_var, saved, rows, channels, eps,        \
                           momentum, order, threads);                                                                  \
        *batches += 1;                                                                                                 \
    }                                                                                                                  \
    extern "C" void norm_backward_##NAME(const T *dy, const T *x, const T *y, const A *weight, const A *bias,          \
                                         const A *saved, T *dx, T *dresidual, A *dweight, A *dbias, long rows,         \
                                         long channels, int order, int threads) {                                      \
        auto run = order == ADD_ACT ? norm_backward<T, A, true> : norm_backward<T, A, false>;                          \
        run(dy, x, y, weight, bias, saved, dx, dresidual, dweight, dbias, rows, channels, threads);                    \
    }                                                                                                                  \
    extern "C" void pair_norm_forward_##NAME(                                                                          \
        const T *x, const A *kernel, const A *weight, const T *residual, const A *gamma, const A *beta,                \
        A *running_mean, A *running_var, int64_t *batches, T *z, T *y, A *saved, long images, long height, long width, \
        long in, long out, long stride, double eps, double momentum, int threads) {                                    \
        PairSizes<A> n(images, height, width, in, out, stride);                                                        \
        pair_norm_forward<T, A>(x, kernel, weight, residual, gamma, beta, running_mean, running_var, z, y, saved, n,   \
                                eps, momentum, threads);                                                               \
        *batches += 1;                                                                                                 \
    }                                                                                                                  \
    extern "C" void pair_norm_backward_##NAME(                                                                         \
        const T *dy, const T *z, const T *x, const A *kernel, const A *weight, const A *gamma, const A *beta,          \
        const A *saved, const T *added, T *dx, A *dkernel, A *dweight, A *dgamma, A *dbeta, long images, long height,  \
        long width, long in, long out, long stride, int threads) {                                                     \
        PairSizes<A> n(images, height, width, in, out, stride);                                                        \
        pair_norm_backward<T, A>(dy, z, x, kernel, weight, gamma, beta, saved, added, dx, dkernel, dweight, dgamma,    \
                                 dbeta, n, threads);                                                                   \
    }

EXPORT(float32, float, float)
EXPORT(bfloat16, bfloat16, float)
EXPORT(float64, double, double)
