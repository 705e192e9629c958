// Rows between shuffle and experts: gather, weighted sum, GELU, the weighted activations' backward passes, the weights' gradients home.
//
// gather_rows: src [·, width], index [N] i32 → dst[i] = src[index[i]].                              Bytes: 2·N·width·size.
// expand_rows: src [R, width], slots [R, k] i32 (−1: none) → dst[slots[r, j]] = src[r].            Bytes: (N + R)·width·size.
// weighted_reduce: y [N, width], slots [R, k] i32 (−1: none), weights [R, k] f32 or none → out[r] = Σ_j weights[r,j]·y[slots[r,j]],
//   in f32, ascending j, k ≤ 32.                                                                    Bytes: (N + R)·width·size.
// weighted_swiglu_grad: da [N, F], h [N, 2F], origin [N] i32, weights → dh [N, 2F], a [N, F], dweights[origin[i]] (ops/expert.rs); the
//   row's dot product in f32: strided over the lanes, then a butterfly.                             Bytes: 6·N·F·size.
// gelu_rows: h [N, F] → a [N, F].                                                                 Bytes: 2·N·F·size.
// weighted_gelu_grad: as weighted_swiglu_grad, with h and dh [N, F].                               Bytes: 4·N·F·size.
// sum_dots: dots [N, parts] f32, origin [N] → dweights[origin[i]] = Σ dots[i], ascending; what grouped_grad_swiglu leaves (grouped_gemm_sm90.cu).
// scatter_choices: row_choice, row_dweights [R, k] → dweights[row_choice[i]] = row_dweights[i].
//
// Bound: memory, all of them. Rows beyond the live count are left alone. Each is written once over packs of 16 bytes, and
// exported as NAME_wide; widths or addresses off 16 bytes take packs of one element. Loads of several packs are in flight before the first is used; what is
// written is too large to be found in a cache again, so it passes them by.

#include "gelu.cuh"
#include "pack.cuh"
#include "reduce.cuh"
#include "swiglu.cuh"

constexpr unsigned ALL = 0xffffffffu;
constexpr int THREADS = 256;
constexpr int ROWS_PER_BLOCK = THREADS / WARP;

// The row of this warp; -1 beyond the live ones.
__device__ __forceinline__ int row_of_warp(int bound, const int* count) {
    const int row = blockIdx.x * ROWS_PER_BLOCK + threadIdx.x / WARP;
    return row < live_rows(bound, count) ? row : -1;
}

// One warp a row.
template <typename Act, int N>
__device__ void gather_rows(int bound, const int* count, int width, const int* index, const Act* src, Act* dst) {
    constexpr int FLIGHT = 8;
    const int row = row_of_warp(bound, count), lane = threadIdx.x % WARP, packs = width / N;
    if (row < 0) return;
    src += long(index[row]) * width;
    dst += long(row) * width;
    int pack = lane;
    for (; pack + (FLIGHT - 1) * WARP < packs; pack += FLIGHT * WARP) {
        Pack<Act, N> held[FLIGHT];
#pragma unroll
        for (int i = 0; i < FLIGHT; i++) held[i] = load<N>(src + (pack + i * WARP) * N);
#pragma unroll
        for (int i = 0; i < FLIGHT; i++) store_once<N>(dst + (pack + i * WARP) * N, held[i]);
    }
    for (; pack < packs; pack += WARP) store_once<N>(dst + pack * N, load<N>(src + pack * N));
}

// One warp a row: read once, written to each of its slots. (Gathering by destination reads a row once a slot, long after the caches have
// dropped it: twice the bytes.)
template <typename Act, int N>
__device__ void expand_rows(int bound, const int* count, int slots_per_row, int width, const int* slots, const Act* src, Act* dst) {
    constexpr int FLIGHT = 8;
    const int row = row_of_warp(bound, count), lane = threadIdx.x % WARP, packs = width / N;
    if (row < 0) return;
    const int slot = lane < slots_per_row ? slots[long(row) * slots_per_row + lane] : -1;
    src += long(row) * width;
    for (int first = lane; first - lane < packs; first += FLIGHT * WARP) {
        Pack<Act, N> held[FLIGHT];
#pragma unroll
        for (int i = 0; i < FLIGHT; i++)
            if (first + i * WARP < packs) held[i] = load_once<N>(src + (first + i * WARP) * N);
        for (int j = 0; j < slots_per_row; j++) {
            const int to = __shfl_sync(ALL, slot, j);
            if (to < 0) continue;
#pragma unroll
            for (int i = 0; i < FLIGHT; i++)
                if (first + i * WARP < packs) store_once<N>(dst + long(to) * width + (first + i * WARP) * N, held[i]);
        }
    }
}

// One warp a row. (One block a row and one thread a pack of it took 1.5 times as long where two of six slots are rows, and 1.1 times where all are.)
template <typename Act, int N>
__device__ void weighted_reduce(int bound, const int* count, int slots_per_row, int width, const int* slots,
                                const float* weights, const Act* y, Act* out) {
    const int row = row_of_warp(bound, count);
    if (row < 0) return;
    const long at = long(row) * slots_per_row;
    reduce_row<Act, N>(slots_per_row, width, slots + at, weights ? weights + at : nullptr, y, out + long(row) * width);
}

// One pack of a row: gradients and weighted activations; the product of da with the plain activations is added to `dot`.
template <typename Act, int N>
__device__ __forceinline__ void swiglu_pack(float weight, const Pack<Act, N>& da, const Pack<Act, N>& gate,
                                            const Pack<Act, N>& up, Pack<Act, N>& dgate, Pack<Act, N>& dup,
                                            Pack<Act, N>& a, float& dot) {
#pragma unroll
    for (int c = 0; c < N; c++) {
        const float g = to_f32(gate.v[c]), u = to_f32(up.v[c]), d = to_f32(da.v[c]);
        const float plain = swiglu(g, u);
        float dg, du;
        swiglu_slopes(g, u, weight * d, dg, du);
        dot += d * plain;
        dgate.v[c] = from_f32<Act>(dg);
        dup.v[c] = from_f32<Act>(du);
        a.v[c] = from_f32<Act>(weight * plain);
    }
}

// One warp a row, two packs of each operand in flight.
template <typename Act, int N>
__device__ void weighted_swiglu_grad(int bound, const int* count, int f, const int* origin, const float* weights,
                                     const Act* da, const Act* h, Act* dh, Act* a, float* dweights) {
    constexpr int FLIGHT = 2;
    const int row = row_of_warp(bound, count), lane = threadIdx.x % WARP;
    if (row < 0) return;
    const int from = origin[row];
    const float weight = weights[from];
    da += long(row) * f;
    a += long(row) * f;
    h += long(row) * 2 * f;
    dh += long(row) * 2 * f;
    float dot = 0.0f;
    for (int first = lane * N; first < f; first += FLIGHT * WARP * N) {
        Pack<Act, N> d[FLIGHT], gate[FLIGHT], up[FLIGHT];
#pragma unroll
        for (int i = 0; i < FLIGHT; i++) {
            const int at = first + i * WARP * N;
            if (at >= f) continue;
            d[i] = load_once<N>(da + at);
            gate[i] = load_once<N>(h + at);
            up[i] = load_once<N>(h + f + at);
        }
#pragma unroll
        for (int i = 0; i < FLIGHT; i++) {
            const int at = first + i * WARP * N;
            if (at >= f) continue;
            Pack<Act, N> dgate, dup, weighted;
            swiglu_pack<Act, N>(weight, d[i], gate[i], up[i], dgate, dup, weighted, dot);
            store_once<N>(dh + at, dgate);
            store_once<N>(dh + f + at, dup);
            store_once<N>(a + at, weighted);
        }
    }
    dot = warp_sum(dot);
    if (lane == 0) dweights[from] = dot;
}

// One warp a row, two packs in flight.
template <typename Act, int N> __device__ void gelu_rows(int bound, const int* count, int f, const Act* h, Act* a) {
    constexpr int FLIGHT = 2;
    const int row = row_of_warp(bound, count), lane = threadIdx.x % WARP;
    if (row < 0) return;
    h += long(row) * f;
    a += long(row) * f;
    for (int first = lane * N; first < f; first += FLIGHT * WARP * N) {
        Pack<Act, N> x[FLIGHT];
#pragma unroll
        for (int i = 0; i < FLIGHT; i++)
            if (first + i * WARP * N < f) x[i] = load<N>(h + first + i * WARP * N);
#pragma unroll
        for (int i = 0; i < FLIGHT; i++) {
            const int at = first + i * WARP * N;
            if (at >= f) continue;
#pragma unroll
            for (int c = 0; c < N; c++) x[i].v[c] = from_f32<Act>(gelu(to_f32(x[i].v[c])));
            store_once<N>(a + at, x[i]);
        }
    }
}

// One warp a row, two packs of each operand in flight.
template <typename Act, int N>
__device__ void weighted_gelu_grad(int bound, const int* count, int f, const int* origin, const float* weights,
                                   const Act* da, const Act* h, Act* dh, Act* a, float* dweights) {
    constexpr int FLIGHT = 2;
    const int row = row_of_warp(bound, count), lane = threadIdx.x % WARP;
    if (row < 0) return;
    const int from = origin[row];
    const float weight = weights[from];
    const long begin = long(row) * f;
    float dot = 0.0f;
    for (int first = lane * N; first < f; first += FLIGHT * WARP * N) {
        Pack<Act, N> d[FLIGHT], x[FLIGHT];
#pragma unroll
        for (int i = 0; i < FLIGHT; i++) {
            const int at = first + i * WARP * N;
            if (at >= f) continue;
            d[i] = load_once<N>(da + begin + at);
            x[i] = load_once<N>(h + begin + at);
        }
#pragma unroll
        for (int i = 0; i < FLIGHT; i++) {
            const int at = first + i * WARP * N;
            if (at >= f) continue;
            Pack<Act, N> slope, weighted;
#pragma unroll
            for (int c = 0; c < N; c++) {
                const float value = to_f32(x[i].v[c]), up = to_f32(d[i].v[c]);
                float density;
                const float below = normal(value, density), plain = value * below;
                dot += up * plain;
                slope.v[c] = from_f32<Act>(weight * up * (below + value * density));
                weighted.v[c] = from_f32<Act>(weight * plain);
            }
            store_once<N>(dh + begin + at, slope);
            store_once<N>(a + begin + at, weighted);
        }
    }
    dot = warp_sum(dot);
    if (lane == 0) dweights[from] = dot;
}

// NAME_wide_f32, NAME_wide_bf16 in packs of 16 bytes, NAME_f32, NAME_bf16 in single elements.
#define EXPORT(NAME, BLOCKS, PARAMS, ARGS)                                                                                         \
    extern "C" __global__ void __launch_bounds__(THREADS, BLOCKS) NAME##_wide_f32(PARAMS(float)) { NAME<float, 4> ARGS; }           \
    extern "C" __global__ void __launch_bounds__(THREADS, BLOCKS) NAME##_wide_bf16(PARAMS(bf16)) { NAME<bf16, 8> ARGS; }            \
    extern "C" __global__ void __launch_bounds__(THREADS, BLOCKS) NAME##_f32(PARAMS(float)) { NAME<float, 1> ARGS; }                \
    extern "C" __global__ void __launch_bounds__(THREADS, BLOCKS) NAME##_bf16(PARAMS(bf16)) { NAME<bf16, 1> ARGS; }

#define GATHER_PARAMS(Act) int bound, const int *count, int width, const int *index, const Act *src, Act *dst
EXPORT(gather_rows, 4, GATHER_PARAMS, (bound, count, width, index, src, dst))

#define EXPAND_PARAMS(Act) int bound, const int *count, int slots_per_row, int width, const int *slots, const Act *src, Act *dst
EXPORT(expand_rows, 4, EXPAND_PARAMS, (bound, count, slots_per_row, width, slots, src, dst))

#define REDUCE_PARAMS(Act)                                                                                                 \
    int bound, const int *count, int slots_per_row, int width, const int *slots, const float *weights, const Act *y,       \
        Act *out
EXPORT(weighted_reduce, 4, REDUCE_PARAMS, (bound, count, slots_per_row, width, slots, weights, y, out))

#define GELU_PARAMS(Act) int bound, const int *count, int f, const Act *h, Act *a
EXPORT(gelu_rows, 4, GELU_PARAMS, (bound, count, f, h, a))

#define GRADIENT_PARAMS(Act)                                                                                               \
    int bound, const int *count, int f, const int *origin, const float *weights, const Act *da, const Act *h, Act *dh,     \
        Act *a, float *dweights
EXPORT(weighted_swiglu_grad, 2, GRADIENT_PARAMS, (bound, count, f, origin, weights, da, h, dh, a, dweights))
EXPORT(weighted_gelu_grad, 2, GRADIENT_PARAMS, (bound, count, f, origin, weights, da, h, dh, a, dweights))

extern "C" __global__ void __launch_bounds__(THREADS)
    sum_dots(int bound, const int* count, int parts, const float* dots, const int* origin, float* dweights) {
    const int row = blockIdx.x * THREADS + threadIdx.x;
    if (row >= live_rows(bound, count)) return;
    float sum = 0.0f;
    for (int part = 0; part < parts; ++part) sum += dots[long(row) * parts + part];
    dweights[origin[row]] = sum;
}

// Choices without a row keep the zero that a fill put there before.
extern "C" __global__ void __launch_bounds__(THREADS)
    scatter_choices(int bound, const int* count, int top_k, int choices, const int* row_choice, const float* row_dweights,
                    float* dweights) {
    const int slots = live_rows(bound, count) * top_k;
    for (int i = blockIdx.x * blockDim.x + threadIdx.x; i < slots; i += gridDim.x * blockDim.x) {
        const int choice = row_choice[i];
        if (choice >= 0 && choice < choices) dweights[choice] = row_dweights[i];
    }
}
