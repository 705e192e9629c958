// Reduction of ranks' blocks: y[i] = x[0][i] op x[1][i] op …, op one of sum, max, min.                (Cuda::fold_staged)
//
// x [W, n] f32, f64 or i32 → y [n]. Ascending block, so that every run and every rank gets the bits that the host's reduction gets: a
// maximum or minimum with a NaN is NaN, integers wrap.
// Bound: memory, (W + 1) · n elements. One thread an element.

#include "common.cuh"

template <typename T> __device__ __forceinline__ bool is_nan(T x) { return x != x; }

struct Sum {
    template <typename T> static __device__ __forceinline__ T of(T a, T b) { return a + b; }
    // Signed overflow has no meaning in C++; unsigned wraps, as the host's sum does.
    static __device__ __forceinline__ int of(int a, int b) { return int(unsigned(a) + unsigned(b)); }
};
struct Max {
    template <typename T> static __device__ __forceinline__ T of(T a, T b) { return b > a || is_nan(b) ? b : a; }
};
struct Min {
    template <typename T> static __device__ __forceinline__ T of(T a, T b) { return b < a || is_nan(b) ? b : a; }
};

template <typename Op, typename T> __device__ void fold(int blocks, long n, const T* x, T* y) {
    for (long i = blockIdx.x * long(blockDim.x) + threadIdx.x; i < n; i += long(gridDim.x) * blockDim.x) {
        T folded = x[i];
        for (int b = 1; b < blocks; ++b) folded = Op::of(folded, x[b * n + i]);
        y[i] = folded;
    }
}

#define FOLD(NAME, OP, T)                                                                                               \
    extern "C" __global__ void __launch_bounds__(256) NAME(int blocks, long n, const T* x, T* y) {                      \
        fold<OP>(blocks, n, x, y);                                                                                      \
    }
FOLD(fold_sum_f32, Sum, float)
FOLD(fold_sum_f64, Sum, double)
FOLD(fold_sum_i32, Sum, int)
FOLD(fold_max_f32, Max, float)
FOLD(fold_max_f64, Max, double)
FOLD(fold_max_i32, Max, int)
FOLD(fold_min_f32, Min, float)
FOLD(fold_min_f64, Min, double)
FOLD(fold_min_i32, Min, int)
