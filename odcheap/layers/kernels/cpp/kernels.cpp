// Fused operators of training steps on channels-last feature maps, for CPUs: the functions that Python calls.
//
// A row is one pixel of one image with all its C channels; in the functions on image rows, a line is one row of pixels
// of an image. The operators read and write feature maps of the type T (float, bfloat16 or double), and compute in the
// type A (float; double if T is double). All parameters, statistics and sums are of the type A.
//
// Maps are divided into chunks whose number does not depend on the number of threads. Each chunk writes its own sums,
// which are then added up in a fixed order: the results are the same bits for each number of threads.

#include "norm.h"
#include "pair.h"

// The functions, once for each type of the map. Pointers to tensors that an operator does not have are null.
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
    extern "C" void normalize_##NAME(const T *x, const T *residual, T *y, const A *weight, const A *bias,              \
                                     const A *saved, long rows, long channels, int order, int threads) {               \
        normalize<T, A>(x, residual, y, weight, bias, saved, rows, channels, order, threads);                          \
    }                                                                                                                  \
    extern "C" void gradient_sums_##NAME(const T *dy, const T *x, const A *weight, const A *bias, const A *saved,      \
                                         A *dweight, A *dbias, long rows, long channels, int threads) {                \
        gradient_sums<T, A, false>(dy, x, x, weight, bias, saved, rows, channels, threads, dweight, dbias);            \
    }                                                                                                                  \
    extern "C" void pair_forward_##NAME(const T *x, const A *in_saved, const A *in_gamma, const A *in_beta,            \
                                        const A *kernel, const A *weight, A *running_mean, A *running_var,             \
                                        int64_t *batches, T *s, T *z, A *saved, long images, long height, long width,  \
                                        long in, long out, long stride, long groups, double eps, double momentum,      \
                                        int threads) {                                                                 \
        PairSizes<A> n(images, height, width, in, out, stride, groups);                                                \
        pair_statistics_forward<T, A>(x, in_saved, in_gamma, in_beta, kernel, weight, running_mean, running_var, s, z, \
                                      saved, n, eps, momentum, threads);                                               \
        *batches += 1;                                                                                                 \
    }                                                                                                                  \
    extern "C" void pair_backward_##NAME(                                                                              \
        const T *dy, const T *z, const A *gamma, const A *beta, const A *saved, const A *dgamma, const A *dbeta,       \
        const T *x, const A *in_saved, const A *in_gamma, const A *in_beta, const A *kernel, const A *weight,          \
        const T *s, const T *added, T *dx, A *dkernel, A *dweight, A *in_dgamma, A *in_dbeta, long images,             \
        long height, long width, long in, long out, long stride, long groups, int threads) {                           \
        PairSizes<A> n(images, height, width, in, out, stride, groups);                                                \
        pair_norm_backward<T, A>(dy, z, gamma, beta, saved, dgamma, dbeta, x, in_saved, in_gamma, in_beta, kernel,     \
                                 weight, s, added, dx, dkernel, dweight, in_dgamma, in_dbeta, n, threads);             \
    }

EXPORT(float32, float, float)
EXPORT(bfloat16, bfloat16, float)
EXPORT(float64, double, double)
