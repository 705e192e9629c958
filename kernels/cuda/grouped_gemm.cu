// Grouped GEMM on any GPU since sm_80, and in f32: the same operations as grouped_gemm_sm90.cu, without alignment or size rules.
//
//   linear       y[i, out]   = x[i, in] · w[g]ᵀ
//   grad_input   dx[i, in]   = dy[i, out] · w[g]
//   grad_weight  dw[g, out, in] (+)= Σ_i dy[i, out] x[i, in], f32
// for the rows i = offsets[g] .. offsets[g+1] of each group g. Rows outside the groups are neither read nor written.
//
// bf16: mma.sync m16n8k16 with f32 accumulators, tiles of 128 × 128 × 32, eight warps of 32 × 64. f32: fused multiply-add, tiles of 64 × 64
// × 16, for parity with the CPU (no TF32). Sums run in ascending depth. Blocks are persistent (grouped_schedule.cuh).

#include "common.cuh"
#include "grouped_schedule.cuh"

namespace {

constexpr int THREADS = 256, BAND = 8;

enum class Form { Linear, GradInput, GradWeight };

// A matrix operand of one tile: element (i, kk) of `items` × `depth`, zero outside.
template <typename Act, bool K_MAJOR> struct Operand {
    const Act* p;
    long stride;
    int items, depth;

    __device__ Act at(int i, int kk) const {
        if (i >= items || kk >= depth) return from_f32<Act>(0.0f);
        return K_MAJOR ? p[i * stride + kk] : p[kk * stride + i];
    }
};

// Copies ITEMS × DEPTH elements to `to[i][kk]`; neighbouring threads read neighbouring addresses.
template <int ITEMS, int DEPTH, int PITCH, typename Act, bool K_MAJOR>
__device__ void stage(Act (*to)[PITCH], const Operand<Act, K_MAJOR>& from, int first_item, int first_depth) {
    for (int e = threadIdx.x; e < ITEMS * DEPTH; e += THREADS) {
        const int i = K_MAJOR ? e / DEPTH : e % ITEMS, kk = K_MAJOR ? e % DEPTH : e / ITEMS;
        to[i][kk] = from.at(first_item + i, first_depth + kk);
    }
}

template <typename Act> struct Multiplier;

// C fragment layout as in the PTX ISA, m16n8k16.
template <> struct Multiplier<bf16> {
    static constexpr int BM = 128, BN = 128, BK = 32, PITCH = BK + 8;
    float c[2][8][4] = {};

    __device__ void step(const bf16 (*a)[PITCH], const bf16 (*b)[PITCH]) {
        const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, m = warp % 4 * 32, n = warp / 4 * 64;
#pragma unroll
        for (int k = 0; k < BK; k += 16) {
            const int kk = k + lane % 4 * 2;
            uint32_t fa[2][4], fb[8][2];
#pragma unroll
            for (int i = 0; i < 2; ++i)
#pragma unroll
                for (int j = 0; j < 4; ++j)
                    fa[i][j] = *reinterpret_cast<const uint32_t*>(&a[m + i * 16 + j % 2 * 8 + lane / 4][kk + j / 2 * 8]);
#pragma unroll
            for (int i = 0; i < 8; ++i)
#pragma unroll
                for (int j = 0; j < 2; ++j) fb[i][j] = *reinterpret_cast<const uint32_t*>(&b[n + i * 8 + lane / 4][kk + j * 8]);
#pragma unroll
            for (int i = 0; i < 2; ++i)
#pragma unroll
                for (int j = 0; j < 8; ++j)
                    asm volatile(
                        "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
                        : "+f"(c[i][j][0]), "+f"(c[i][j][1]), "+f"(c[i][j][2]), "+f"(c[i][j][3])
                        : "r"(fa[i][0]), "r"(fa[i][1]), "r"(fa[i][2]), "r"(fa[i][3]), "r"(fb[j][0]), "r"(fb[j][1]));
        }
    }

    template <typename Put> __device__ void put(Put put) const {
        const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, m = warp % 4 * 32, n = warp / 4 * 64;
#pragma unroll
        for (int i = 0; i < 2; ++i)
#pragma unroll
            for (int j = 0; j < 8; ++j)
#pragma unroll
                for (int e = 0; e < 4; ++e) put(m + i * 16 + e / 2 * 8 + lane / 4, n + j * 8 + lane % 4 * 2 + e % 2, c[i][j][e]);
    }
};

template <> struct Multiplier<float> {
    static constexpr int BM = 64, BN = 64, BK = 16, PITCH = BK + 1;
    float c[4][4] = {};

    __device__ void step(const float (*a)[PITCH], const float (*b)[PITCH]) {
        const int m = threadIdx.x / 16 * 4, n = threadIdx.x % 16 * 4;
#pragma unroll
        for (int k = 0; k < BK; ++k)
#pragma unroll
            for (int i = 0; i < 4; ++i)
#pragma unroll
                for (int j = 0; j < 4; ++j) c[i][j] = fmaf(a[m + i][k], b[n + j][k], c[i][j]);
    }

    template <typename Put> __device__ void put(Put put) const {
        const int m = threadIdx.x / 16 * 4, n = threadIdx.x % 16 * 4;
#pragma unroll
        for (int i = 0; i < 4; ++i)
#pragma unroll
            for (int j = 0; j < 4; ++j) put(m + i, n + j, c[i][j]);
    }
};

// One tile: `put(i, j, value)` gets what lies inside `items` × `columns`.
template <typename Act, typename A, typename B, typename Put>
__device__ void tile_product(const A& a, const B& b, int first_a, int first_b, int depth, Put put) {
    using M = Multiplier<Act>;
    __shared__ __align__(16) Act sa[M::BM][M::PITCH], sb[M::BN][M::PITCH];
    M product;
    for (int k = 0; k < depth; k += M::BK) {
        __syncthreads();
        stage<M::BM, M::BK>(sa, a, first_a, k);
        stage<M::BN, M::BK>(sb, b, first_b, k);
        __syncthreads();
        product.step(sa, sb);
    }
    product.put([&](int i, int j, float value) {
        if (first_a + i < a.items && first_b + j < b.items) put(first_a + i, first_b + j, value);
    });
}

// p: x or dy; q: w, or x for the weight gradient. `out` × `in` is one group's matrix.
template <Form FORM, typename Act> __device__ void run(const Act* p, const Act* q, const int* offsets, int groups, int out, int in, void* result, bool add = false) {
    using M = Multiplier<Act>;
    __shared__ int first[MOST_GROUPS + 1];
    if constexpr (FORM == Form::GradWeight) {
        DepthSchedule<BAND> tiles{offsets, groups, (out + M::BM - 1) / M::BM, (in + M::BN - 1) / M::BN};
        for (int index = blockIdx.x; index < tiles.tiles(); index += gridDim.x) {
            const Tile tile = tiles.at(index);
            const Operand<Act, false> a{p + long(tile.start) * out, out, out, tile.rows}, b{q + long(tile.start) * in, in, in, tile.rows};
            float* dw = static_cast<float*>(result) + long(tile.group) * out * in;
            tile_product<Act>(a, b, tile.m * M::BM, tile.n * M::BN, tile.rows, [&](int i, int j, float value) {
                float& to = dw[long(i) * in + j];
                to = add ? to + value : value;
            });
        }
    } else {
        constexpr bool LINEAR = FORM == Form::Linear;
        const int columns = LINEAR ? out : in, depth = LINEAR ? in : out;
        RowSchedule<M::BM, BAND>::prepare(first, offsets, groups);
        __syncthreads();
        RowSchedule<M::BM, BAND> tiles{offsets, first, groups, (columns + M::BN - 1) / M::BN};
        for (int index = blockIdx.x; index < tiles.tiles(); index += gridDim.x) {
            const Tile tile = tiles.at(index);
            const Operand<Act, true> a{p + long(tile.start) * depth, depth, tile.rows, depth};
            const Operand<Act, LINEAR> b{q + long(tile.group) * out * in, in, columns, depth};
            Act* y = static_cast<Act*>(result) + long(tile.start) * columns;
            tile_product<Act>(a, b, tile.m * M::BM, tile.n * M::BN, depth,
                              [&](int i, int j, float value) { y[long(i) * columns + j] = from_f32<Act>(value); });
        }
    }
}

} // namespace

#define PARAMS(Act) const Act *p, const Act *q, const int *offsets, int groups, int out, int in, void *result
#define ARGS (p, q, offsets, groups, out, in, result)
template <typename Act> __device__ void body_grouped_linear(PARAMS(Act)) { run<Form::Linear>ARGS; }
template <typename Act> __device__ void body_grouped_grad_input(PARAMS(Act)) { run<Form::GradInput>ARGS; }
#define WEIGHT_PARAMS(Act) const Act *p, const Act *q, const int *offsets, int groups, int out, int in, float *result, int add
#define WEIGHT_ARGS (p, q, offsets, groups, out, in, result, add)
template <typename Act> __device__ void body_grouped_grad_weight(WEIGHT_PARAMS(Act)) { run<Form::GradWeight>WEIGHT_ARGS; }
BOTH(grouped_linear, THREADS, PARAMS, ARGS)
BOTH(grouped_grad_input, THREADS, PARAMS, ARGS)
BOTH(grouped_grad_weight, THREADS, WEIGHT_PARAMS, WEIGHT_ARGS)
