// RMSNorm (Zhang and Sennrich 2019): y = x · rstd · w, rstd = 1/√(mean(x²) + eps).           (DenseOps::rms_norm, rms_norm_grad)
//
// rms_norm_SHAPE       x [rows of `width`], w [width] → y, rstd [rows] f32
// rms_norm_grad_SHAPE  dy, x, w, rstd → dx (+)= rstd·(dy·w − x·rstd²·mean(dy·w·x)), partial[block, width] = Σ dy·x·rstd over the
//                      block's rows; add_partials (columns.cu) adds the blocks' sums to dw
// Row r starts at r / groups · token_stride + r % groups · width: heads inside wider rows are normalised where they lie.
//
// A row is held in registers by a team of L threads, K packs of V elements each, so that x is read once; R rows a team (forward, backward)
// are under way together, so that short rows keep the memory busy too. Shapes, by the packs of a row: heads 16, narrow 64, row 256, wide 512, widest
// 2048; odd: up to 8192 single elements, where rows are not whole packs. Sums of a row: a thread's elements, then a butterfly, then
// warps; of dw: a team's rows ascending, then teams, then blocks. Bound: memory, bytes = 2 (forward), 3 or 4 (backward) of x.
// Versions of row, 16384 × 2048 bf16 on an H100, of a large copy's rate (a copy of that size: 0.85): a warp a row 0.78 forward, 0.73
// backward → a block a row, one forward 0.85, two backward 0.82
// (0.855 eight in a row) → the sums' kernel begins early 0.866. What did not help backward: rows in one stretch a block 0.82; blocks of
// 512 or 1024 threads, for fewer partial sums, 0.85 and 0.84; three rows or one at a time 0.80 and 0.79.

#include "pack.cuh"

struct Rows {
    int rows, groups, width;
    float eps;
    long token_stride;

    __device__ __forceinline__ long at(int row) const { return row / groups * token_stride + row % groups * width; }
};

// Threads of a block: of several teams of up to a warp, or of one larger team.
constexpr int threads(int team) { return team <= WARP ? 128 : team; }

template <int L> __device__ __forceinline__ float team_sum(float x, float* scratch) {
    if constexpr (L > WARP) {
        return block_sum(x, scratch);
    } else {
#pragma unroll
        for (int d = L / 2; d > 0; d /= 2) x += __shfl_xor_sync(0xffffffffu, x, d);
        return x;
    }
}

template <typename Act, int V, int L, int K, int R> struct Team {
    static constexpr int TEAMS = threads(L) / L, STEP = TEAMS * R;
    using Row = Pack<Act, V>[K];

    const Rows& s;
    const int lane = threadIdx.x % L, team = threadIdx.x / L, packs = s.width / V;

    // Number j of the rows that this team works on from `base`, and whether there is one.
    __device__ __forceinline__ int row(int base, int j) const { return base + j * TEAMS + team; }
    __device__ __forceinline__ bool holds(int row, int k) const { return row < s.rows && lane + k * L < packs; }

    __device__ __forceinline__ void read(int row, const Act* from, Row& to) const {
        const Act* p = from + s.at(row) + lane * V;
#pragma unroll
        for (int k = 0; k < K; ++k) {
            if (holds(row, k)) {
                to[k] = load<V>(p + k * L * V);
            } else {
#pragma unroll
                for (int e = 0; e < V; ++e) to[k].v[e] = from_f32<Act>(0.0f);
            }
        }
    }
};

template <typename Act, int V, int L, int K, int R>
__device__ void forward(const Rows& s, const Act* x, const Act* w, Act* y, float* rstd) {
    __shared__ float scratch[WARP];
    using T = Team<Act, V, L, K, R>;
    const T team{s};
    for (int base = blockIdx.x * T::STEP; base < s.rows; base += gridDim.x * T::STEP) {
        typename T::Row rows[R];
        float scale[R];
#pragma unroll
        for (int j = 0; j < R; ++j) team.read(team.row(base, j), x, rows[j]);
#pragma unroll
        for (int j = 0; j < R; ++j) {
            float sum = 0.0f;
#pragma unroll
            for (int k = 0; k < K; ++k) {
#pragma unroll
                for (int e = 0; e < V; ++e) sum += to_f32(rows[j][k].v[e]) * to_f32(rows[j][k].v[e]);
            }
            scale[j] = 1.0f / sqrtf(team_sum<L>(sum, scratch) / s.width + s.eps);
            if (team.lane == 0 && team.row(base, j) < s.rows) rstd[team.row(base, j)] = scale[j];
        }
#pragma unroll
        for (int k = 0; k < K; ++k) {
            if (team.lane + k * L >= team.packs) break;
            const int c = (team.lane + k * L) * V;
            const Pack<Act, V> weight = load<V>(w + c);
#pragma unroll
            for (int j = 0; j < R; ++j) {
                const int row = team.row(base, j);
                if (row >= s.rows) break;
#pragma unroll
                for (int e = 0; e < V; ++e) {
                    rows[j][k].v[e] = from_f32<Act>(to_f32(rows[j][k].v[e]) * scale[j] * to_f32(weight.v[e]));
                }
                store(y + s.at(row) + c, rows[j][k]);
            }
        }
    }
}

template <typename Act, int V, int L, int K, int R>
__device__ void backward(const Rows& s, const Act* dy, const Act* x, const Act* w, const float* rstd, Act* dx, float* partial, int add) {
    __shared__ float scratch[WARP];
    extern __shared__ float sums[];
    using T = Team<Act, V, L, K, R>;
    const T team{s};
    let_the_next_kernel_begin();
    float dw[K][V] = {};
    for (int base = blockIdx.x * T::STEP; base < s.rows; base += gridDim.x * T::STEP) {
        typename T::Row slope[R], rows[R];
        float scale[R], mean[R];
#pragma unroll
        for (int j = 0; j < R; ++j) {
            const int row = team.row(base, j);
            team.read(row, dy, slope[j]), team.read(row, x, rows[j]);
            scale[j] = row < s.rows ? rstd[row] : 0.0f;
        }
#pragma unroll
        for (int j = 0; j < R; ++j) {
            float dot = 0.0f;
#pragma unroll
            for (int k = 0; k < K; ++k) {
                if (team.lane + k * L >= team.packs) break;
                const Pack<Act, V> weight = load<V>(w + (team.lane + k * L) * V);
#pragma unroll
                for (int e = 0; e < V; ++e) dot += to_f32(slope[j][k].v[e]) * to_f32(weight.v[e]) * to_f32(rows[j][k].v[e]);
            }
            mean[j] = scale[j] * scale[j] * scale[j] * team_sum<L>(dot, scratch) / s.width;
        }
#pragma unroll
        for (int k = 0; k < K; ++k) {
            if (team.lane + k * L >= team.packs) break;
            const int c = (team.lane + k * L) * V;
            const Pack<Act, V> weight = load<V>(w + c);
#pragma unroll
            for (int j = 0; j < R; ++j) {
                const int row = team.row(base, j);
                if (row >= s.rows) break;
                Act* to = dx + s.at(row) + c;
                Pack<Act, V> out;
                if (add) out = load<V>(to);
#pragma unroll
                for (int e = 0; e < V; ++e) {
                    const float d = to_f32(slope[j][k].v[e]), a = to_f32(rows[j][k].v[e]);
                    const float g = d * to_f32(weight.v[e]) * scale[j] - a * mean[j];
                    out.v[e] = from_f32<Act>(add ? to_f32(out.v[e]) + g : g);
                    dw[k][e] += d * a * scale[j];
                }
                store(to, out);
            }
        }
    }
    // One team after the other, so that the order is fixed.
    for (int turn = 0; turn < T::TEAMS; ++turn) {
        if (turn == team.team) {
#pragma unroll
            for (int k = 0; k < K; ++k) {
                if (team.lane + k * L >= team.packs) break;
#pragma unroll
                for (int e = 0; e < V; ++e) {
                    float& sum = sums[(team.lane + k * L) * V + e];
                    sum = turn == 0 ? dw[k][e] : sum + dw[k][e];
                }
            }
        }
        __syncthreads();
    }
    for (int c = threadIdx.x; c < s.width; c += threads(L)) partial[long(blockIdx.x) * s.width + c] = sums[c];
}

#define NORM_OF(SHAPE, TYPE, Act, V, L, K, RF, RB)                                                                       \
    extern "C" __global__ void __launch_bounds__(threads(L))                                                             \
        rms_norm_##SHAPE##_##TYPE(Rows s, const Act* x, const Act* w, Act* y, float* rstd) {                             \
        forward<Act, V, L, K, RF>(s, x, w, y, rstd);                                                                     \
    }                                                                                                                    \
    extern "C" __global__ void __launch_bounds__(threads(L)) rms_norm_grad_##SHAPE##_##TYPE(                             \
        Rows s, const Act* dy, const Act* x, const Act* w, const float* rstd, Act* dx, float* partial, int add) {        \
        backward<Act, V, L, K, RB>(s, dy, x, w, rstd, dx, partial, add);                                                 \
    }
#define NORM(SHAPE, V, L, K, RF, RB)                                                                                     \
    NORM_OF(SHAPE, f32, float, V(float), L, K, RF, RB)                                                                   \
    NORM_OF(SHAPE, bf16, bf16, V(bf16), L, K, RF, RB)
#define PACKED(Act) FULL<Act>
#define SINGLE(Act) 1

NORM(heads, PACKED, 16, 1, 4, 4)
NORM(narrow, PACKED, 32, 2, 2, 2)
NORM(row, PACKED, 256, 1, 1, 2)
NORM(wide, PACKED, 128, 4, 1, 1)
NORM(widest, PACKED, 256, 8, 1, 1)
NORM(odd, SINGLE, 256, 32, 1, 1)
