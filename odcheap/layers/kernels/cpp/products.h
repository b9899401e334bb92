// Matrix products of lines of pixels with weights.

#pragma once

#include "vectors.h"

namespace {

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
inline Vector<float> broadcast(BfloatPair factor) { return (Vector<float>)_mm512_set1_epi32(int(factor.bits)); }
#else
template <class T, class A> using FactorOf = A;
#endif
template <class A> inline Vector<A> broadcast(A factor) { return factor - Vector<A>{}; }

// Returns sum + a * b, for vectors of factors of the type F.
template <class F, class A> inline Vector<A> multiply_add(Vector<A> a, Vector<A> b, Vector<A> sum) {
#if defined(__AVX512BF16__)
    if constexpr (std::is_same<F, BfloatPair>::value)
        return (Vector<A>)_mm512_dpbf16_ps((__m512)sum, (__m512bh)(__m512)a, (__m512bh)(__m512)b);
    else
#endif
        return sum + a * b;
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
            const Vector<A> factor = broadcast(s[p * pixel_step + k * k_step]);
            for (int j = 0; j < COLUMNS; j++) sums[p][j] = multiply_add<F, A>(factor, column[j], sums[p][j]);
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

// The order in which the numbers of two vectors of bfloat16 numbers alternate.
inline __m512i interleaved_order() {
    uint16_t order[32];
    for (int i = 0; i < 32; i++) order[i] = uint16_t(i / 2 + i % 2 * 16);
    return _mm512_loadu_si512(order);
}

// Copies a line of pixels (pixels x C) to pairs of each pixel and the next one, (pixels + 1) x C. The first pair has
// zero and the first pixel, the last one the last pixel and zero.
inline void write_neighbor_factors(const float *line, long pixels, long C, BfloatPair *to) {
    const __m512i interleave = interleaved_order();
    for (long c = 0; c < C; c += 16) {
        __m512 before = _mm512_setzero_ps();
        for (long p = 0; p <= pixels; p++) {
            const __m512 own = p < pixels ? _mm512_loadu_ps(line + p * C + c) : _mm512_setzero_ps();
            const __m512i both = (__m512i)_mm512_cvtne2ps_pbh(own, before);
            _mm512_storeu_si512(to + p * C + c, _mm512_permutexvar_epi16(interleave, both));
            before = own;
        }
    }
}

// Copies a line of pixels to pairs of factors. `along_channels` gets those of a product over channels (pixels x C / 2),
// `along_pixels` those of a product over pixels (pixels / 2 x C); either may be null.
inline void write_factors(const float *line, long pixels, long C, BfloatPair *along_channels, BfloatPair *along_pixels) {
    const __m512i interleave = interleaved_order();
    for (long p = 0; p < pixels; p += 2)
        for (long c = 0; c < C; c += 16) {
            const float *at = line + p * C + c;
            const __m512 first = _mm512_loadu_ps(at);
            const __m512 second = p + 1 < pixels ? _mm512_loadu_ps(at + C) : _mm512_setzero_ps();
            const __m512i both = (__m512i)_mm512_cvtne2ps_pbh(second, first);
            if (along_channels != nullptr) {
                __m256i *to = reinterpret_cast<__m256i *>(along_channels + (p * C + c) / 2);
                _mm256_storeu_si256(to, _mm512_castsi512_si256(both));
                if (p + 1 < pixels) _mm256_storeu_si256(to + C / 16, _mm512_extracti64x4_epi64(both, 1));
            }
            if (along_pixels != nullptr)
                _mm512_storeu_si512(along_pixels + p / 2 * C + c, _mm512_permutexvar_epi16(interleave, both));
        }
}
#endif

// Returns a line of pixels (pixels x C) as factors of a product over channels: the line itself, or copied to `to`.
template <class F, class A> inline const F *channel_factors_of(const A *line, long pixels, long C, F *to) {
    if constexpr (std::is_same<F, A>::value) {
        return line;
    } else {
        write_factors(line, pixels, C, to, (F *)nullptr);
        return to;
    }
}

} // namespace
