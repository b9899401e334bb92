// Vectors, the types of feature maps, and buffers.
//
// The vectors are those of GCC's and Clang's vector extensions, with the width of this processor's registers.

#pragma once

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

#if defined(__AVX__)
#include <immintrin.h>
#endif

namespace {

struct bfloat16 {
    uint16_t bits;
};

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
#if defined(__AVX512F__)
    return (Vector<float>)_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i *)from)), 16);
#else
    Bits16 half;
    memcpy(&half, from, VECTOR_BYTES / 2);
    return (Vector<float>)(__builtin_convertvector(half, Bits32) << 16);
#endif
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

// Asks for `count` numbers that are read soon, so that they arrive from memory while something else is computed.
template <class T> inline void prefetch(const T *from, long count) {
    const char *at = reinterpret_cast<const char *>(from);
    for (long i = 0; i < count * long(sizeof(T)); i += 64) __builtin_prefetch(at + i);
}

// A block of memory that begins at a multiple of 64 bytes and holds zeros.
template <class A> struct Buffer {
    long count;
    A *data;
    explicit Buffer(long count) : count(count) {
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

} // namespace
