// Column sums over all rows, the same bits in every run: parts of the rows first, then the parts ascending.
//
// bias_grad     partial[c, j] = Σ dy[r, j] over the rows r of chunk c          dy [rows, columns] → partial [chunks, columns] f32
// add_partials  out[j] += Σ_c partial[c, j]                                    also of RMSNorm's weight gradient (norm.cu)
//                                                                              (DenseOps::bias_grad)
// Order: in a chunk eight interleaved sums of ascending rows, added ascending; over chunks 32 interleaved sums, added ascending.
// Bound: memory, rows · columns elements read; the partial sums stay in the L2 cache.

#include "pack.cuh"

constexpr int GROUPS = 8, THREADS = GROUPS * WARP, LATE_GROUPS = 32;

// Block (x, y): 32 packs of columns, chunk y of the rows.
template <typename Act, int V> __device__ void column_chunk(long rows, int columns, const Act* dy, float* partial, float* shared) {
    const int lane = threadIdx.x % WARP, group = threadIdx.x / WARP, width = WARP * V;
    const int left = blockIdx.x * width, mine = left + lane * V;
    const long begin = rows * blockIdx.y / gridDim.y, end = rows * (blockIdx.y + 1) / gridDim.y;
    float sum[V] = {};
    if (mine < columns) {
#pragma unroll 4
        for (long r = begin + group; r < end; r += GROUPS) {
            const Pack<Act, V> x = load<V>(dy + r * columns + mine);
#pragma unroll
            for (int e = 0; e < V; ++e) sum[e] += to_f32(x.v[e]);
        }
    }
    set_to<V>(shared + group * width + lane * V, sum);
    __syncthreads();
    for (int c = threadIdx.x; c < width && left + c < columns; c += THREADS) {
        float total = 0.0f;
        for (int g = 0; g < GROUPS; ++g) total += shared[g * width + c];
        partial[long(blockIdx.y) * columns + left + c] = total;
    }
}

template <typename Act> __device__ void body_bias_grad(long rows, int columns, const Act* dy, float* partial, int packed) {
    __shared__ alignas(16) float shared[GROUPS * WARP * FULL<Act>];
    packed ? column_chunk<Act, FULL<Act>>(rows, columns, dy, partial, shared) : column_chunk<Act, 1>(rows, columns, dy, partial, shared);
}

#define BIAS_GRAD(Act) long rows, int columns, const Act *dy, float *partial, int packed
BOTH(bias_grad, THREADS, BIAS_GRAD, (rows, columns, dy, partial, packed))

// A block of 32 × 32 threads has 32 columns.
extern "C" __global__ void __launch_bounds__(LATE_GROUPS* WARP) add_partials(int chunks, int columns, const float* partial, float* out) {
    __shared__ float shared[LATE_GROUPS][WARP];
    const int lane = threadIdx.x % WARP, group = threadIdx.x / WARP, column = blockIdx.x * WARP + lane;
    after_the_kernel_before();
    float sum = 0.0f;
    if (column < columns) {
#pragma unroll 8
        for (int c = group; c < chunks; c += LATE_GROUPS) sum += partial[long(c) * columns + column];
    }
    shared[group][lane] = sum;
    __syncthreads();
    if (group > 0 || column >= columns) return;
    float total = 0.0f;
#pragma unroll
    for (int g = 0; g < LATE_GROUPS; ++g) total += shared[g][lane];
    out[column] += total;
}
