// Sums in f64, the same bits in every run.                                     (LossOps::sum, OptimizerOps::sum_of_squares)
//
// sum_TYPE          partial[b] = Σ x over the elements of block b              x [n] f32, bf16, f64 or i32 → partial [blocks] f64
// sum_squares_f32   partial[b] = Σ x²
// sum_partials      total[0] += Σ_b partial[b]
// Order: a thread's elements ascending, threads of a block by butterfly, then blocks. Bound: memory, n elements read.

#include "pack.cuh"

constexpr int THREADS = 512;

template <typename T> __device__ __forceinline__ double to_f64(T x) { return double(x); }
template <> __device__ __forceinline__ double to_f64(bf16 x) { return double(to_f32(x)); }

template <bool SQUARED, typename T> __device__ __forceinline__ double term(T x) {
    const double wide = to_f64(x);
    return SQUARED ? wide * wide : wide;
}

template <bool SQUARED, typename T> __device__ void block_total(const T* x, Cut cut, double* partial) {
    constexpr int V = FULL<T>;
    __shared__ double scratch[WARP];
    double sum = 0.0;
#pragma unroll 4
    for (long i = flat_thread(); i < cut.packs; i += flat_threads()) {
        const Pack<T, V> pack = load<V>(x + cut.head + i * V);
#pragma unroll
        for (int e = 0; e < V; ++e) sum += term<SQUARED>(pack.v[e]);
    }
    for (long r = flat_thread(); r < cut.outside(V); r += flat_threads()) sum += term<SQUARED>(x[cut.index(r, V)]);
    sum = block_sum(sum, scratch);
    if (threadIdx.x == 0) partial[blockIdx.x] = sum;
}

#define SUM(NAME, SQUARED, T)                                                                                           \
    extern "C" __global__ void __launch_bounds__(THREADS) NAME(const T* x, Cut cut, double* partial) {                  \
        block_total<SQUARED>(x, cut, partial);                                                                          \
    }
SUM(sum_f32, false, float)
SUM(sum_bf16, false, bf16)
SUM(sum_f64, false, double)
SUM(sum_i32, false, int)
SUM(sum_squares_f32, true, float)

// One block.
extern "C" __global__ void __launch_bounds__(THREADS) sum_partials(int blocks, const double* partial, double* total) {
    __shared__ double scratch[WARP];
    double sum = 0.0;
    for (int b = threadIdx.x; b < blocks; b += THREADS) sum += partial[b];
    sum = block_sum(sum, scratch);
    if (threadIdx.x == 0) total[0] += sum;
}
