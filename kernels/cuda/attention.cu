// Causal flash attention: out = softmax(q·kᵀ/√D)·v, lse = log Σ exp, query head h reading key/value head h / (heads / kv_heads).
//                                                                                                        (AttentionOps::attention)
// qkv [B·S, (heads + 2·kv_heads)·D] bf16 → out [B·S, heads·D] bf16, lse [B·S, heads] f32. D is a multiple of 8 up to 256, rows
// begin on 16 bytes; S is any. `starts` [B·S] i32, null if there are none: the first position that each position sees, ascending
// inside a sequence. Keys are added up in ascending tiles, inside a tile as the tensor cores do: same bits every run. Scores and
// sums are f32, probabilities are rounded to bf16 before they meet the values.
// Bound: tensor cores. FLOPs = 2·B·heads·S²·D (causal half of both products); bytes = B·S·(2·heads + 2·kv_heads)·D·2.
//
// A block is 64·M query rows of one head; each of its four warps owns 16·M of them (M = 2 up to D = 128, so that a fragment of
// keys or values is used twice: at M = 1 shared memory is the bound). Queries stay in shared memory, keys and values come in
// tiles through two buffers of cp.async: one barrier a tile, and a whole tile's time for a copy to arrive. The softmax is online,
// in powers of two. Tiles that no row sees are skipped, only those on an edge are masked, and the block ids put the blocks with
// the most keys first over all heads, so that the short ones fill the last wave.

#include "attention.cuh"
#include "mma.cuh"

// Rows and keys of a block for heads of D columns (the caller's, rounded up).
template <int D> struct Forward {
    static constexpr int M = D > 128 ? 1 : 2, ROWS = 64 * M, KEYS = D > 128 ? 32 : 64, THREADS = 128;
    static constexpr int QUERY_BYTES = ROWS * D * 2, KEY_BYTES = KEYS * D * 2;
    // queries, then twice keys and values
    static constexpr int SHARED_BYTES = QUERY_BYTES + 4 * KEY_BYTES;
};

template <int D> __device__ void attend(const bf16* qkv, const int* starts, bf16* out, float* lse, const AttentionShape shape) {
    using F = Forward<D>;
    using T = Tile<D>;
    constexpr int M = F::M, KEYS = F::KEYS;
    extern __shared__ __align__(128) unsigned char shared[];
    const int warp = threadIdx.x / WARP, lane = threadIdx.x % WARP;
    const int head = blockIdx.x % shape.heads, b = blockIdx.x / shape.heads, kv = shape.kv_of(head);
    const int first = (gridDim.y - 1 - blockIdx.y) * F::ROWS, live = min(F::ROWS, shape.seq - first);
    const int64_t width = shape.width();
    const bf16* keys = qkv + shape.at(b, shape.heads + kv);
    const int to_values = shape.kv_heads * shape.dim;
    const int* seen_from = starts ? starts + int64_t(b) * shape.seq : nullptr;

    const uint32_t queries_at = shared_u32(shared), tiles_at = queries_at + F::QUERY_BYTES;
    const int from = seen_from ? seen_from[first] / KEYS : 0, to = (first + live + KEYS - 1) / KEYS;
    auto fetch = [&](int tile, int buffer) {
        const int key = tile * KEYS, live = shape.seq - key;
        const bf16* rows = keys + key * width;
        const uint32_t at = tiles_at + buffer * 2 * F::KEY_BYTES;
        T::template fetch<KEYS, F::THREADS>(at, rows, width, live, shape.dim);
        T::template fetch<KEYS, F::THREADS>(at + F::KEY_BYTES, rows + to_values, width, live, shape.dim);
    };
    T::template fetch<F::ROWS, F::THREADS>(queries_at, qkv + shape.at(b, head) + first * width, width, live, shape.dim);
    fetch(from, 0);
    copies_end_group();

    // This lane's rows are row(m, 0) and row(m, 1), its columns 8·n + 2·(lane % 4) and the next.
    const int warp_row = warp * 16 * M;
    auto row = [&](int m, int half) { return first + warp_row + m * 16 + half * 8 + lane / 4; };
    float sums[M][D / 8][4] = {}, most[M][2], total[M][2] = {};
#pragma unroll
    for (int m = 0; m < M; ++m) most[m][0] = most[m][1] = -INFINITY;
    const uint32_t my_queries = T::rows16(queries_at, warp_row, lane);
    const float scale = shape.scale * LOG2_E;  // into powers of two

    for (int tile = from; tile < to; ++tile) {
        const int buffer = (tile - from) & 1, key = tile * KEYS;
        copies_wait<0>();
        __syncthreads();  // the tile is there for all, and all are done with the one before, whose buffer is next
        if (tile + 1 < to) fetch(tile + 1, buffer ^ 1);
        copies_end_group();
        if (key > first + warp_row + 16 * M - 1) continue;  // behind all rows of this warp

        float scores[M][KEYS / 8][4] = {};
        const uint32_t my_keys = T::columns16(tiles_at + buffer * 2 * F::KEY_BYTES, 0, lane);
#pragma unroll
        for (int depth = 0; depth < D / 8; depth += 2) {
            uint32_t a[M][4];
#pragma unroll
            for (int m = 0; m < M; ++m) load_blocks(a[m], T::step(my_queries, m * 16, depth));
#pragma unroll
            for (int n = 0; n < KEYS / 8; n += 2) {
                uint32_t k[4];
                load_blocks(k, T::step(my_keys, n * 8, depth));
#pragma unroll
                for (int m = 0; m < M; ++m) {
                    multiply_add(scores[m][n], a[m], k[0], k[1]);
                    multiply_add(scores[m][n + 1], a[m], k[2], k[3]);
                }
            }
        }

        if (key + KEYS - 1 > first + warp_row || seen_from) {
#pragma unroll
            for (int m = 0; m < M; ++m) {
#pragma unroll
                for (int half = 0; half < 2; ++half) {
                    const int last = row(m, half), low = seen_from ? seen_from[min(last, shape.seq - 1)] : 0;
#pragma unroll
                    for (int n = 0; n < KEYS / 8; ++n) {
#pragma unroll
                        for (int i = 0; i < 2; ++i) {
                            const int at = key + n * 8 + lane % 4 * 2 + i;
                            if (at > last || at < low) scores[m][n][2 * half + i] = -INFINITY;
                        }
                    }
                }
            }
        }

#pragma unroll
        for (int m = 0; m < M; ++m) {
#pragma unroll
            for (int half = 0; half < 2; ++half) {
                float peak = most[m][half];
#pragma unroll
                for (int n = 0; n < KEYS / 8; ++n) peak = fmaxf(peak, fmaxf(scores[m][n][2 * half], scores[m][n][2 * half + 1]));
                peak = fmaxf(peak, __shfl_xor_sync(0xffffffffu, peak, 1));
                peak = fmaxf(peak, __shfl_xor_sync(0xffffffffu, peak, 2));
                // A row that has seen no key yet has −∞, from which nothing can be subtracted.
                const float base = peak == -INFINITY ? 0.f : peak * scale;
                const float fade = fast_exp2(most[m][half] * scale - base);
                most[m][half] = peak;
                float sum = 0.f;
#pragma unroll
                for (int n = 0; n < KEYS / 8; ++n) {
#pragma unroll
                    for (int i = 2 * half; i < 2 * half + 2; ++i) {
                        scores[m][n][i] = fast_exp2(scores[m][n][i] * scale - base);
                        sum += scores[m][n][i];
                    }
                }
                total[m][half] = total[m][half] * fade + sum;
#pragma unroll
                for (int n = 0; n < D / 8; ++n) {
                    sums[m][n][2 * half] *= fade;
                    sums[m][n][2 * half + 1] *= fade;
                }
            }
        }

        const uint32_t my_values = T::rows16(tiles_at + buffer * 2 * F::KEY_BYTES + F::KEY_BYTES, 0, lane);
#pragma unroll
        for (int n = 0; n < KEYS / 8; n += 2) {
            uint32_t p[M][4];
#pragma unroll
            for (int m = 0; m < M; ++m) {
#pragma unroll
                for (int i = 0; i < 4; ++i) p[m][i] = pack(scores[m][n + i / 2][i % 2 * 2], scores[m][n + i / 2][i % 2 * 2 + 1]);
            }
#pragma unroll
            for (int column = 0; column < D / 8; column += 2) {
                uint32_t v[4];
                load_blocks_transposed(v, T::step(my_values, n * 8, column));
#pragma unroll
                for (int m = 0; m < M; ++m) {
                    multiply_add(sums[m][column], p[m], v[0], v[1]);
                    multiply_add(sums[m][column + 1], p[m], v[2], v[3]);
                }
            }
        }
    }

    // A warp alone reads its rows of queries, so the result may go through their place.
#pragma unroll
    for (int m = 0; m < M; ++m) {
        float inverse[2];
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            float sum = total[m][half];
            sum += __shfl_xor_sync(0xffffffffu, sum, 1);
            sum += __shfl_xor_sync(0xffffffffu, sum, 2);
            inverse[half] = 1.f / sum;
            const int position = row(m, half);
            if (lane % 4 == 0 && position < shape.seq) {
                lse[shape.stat_at(b, head) + int64_t(position) * shape.heads] = most[m][half] * shape.scale + logf(sum);
            }
        }
        T::put(queries_at, warp_row + m * 16, lane, sums[m], inverse[0], inverse[1]);
        __syncwarp();
        bf16* to_rows = out + shape.out_at(b, head) + first * shape.out_width();
        T::template drain<T::CHUNKS>(queries_at, warp_row + m * 16, lane, to_rows, shape.out_width(), live, shape.dim);
    }
}

#define ATTENTION(D)                                                                                                     \
    extern "C" __global__ void __launch_bounds__(128, 2) attention_##D##_bf16(                                            \
        const bf16* qkv, const int* starts, bf16* out, float* lse, AttentionShape shape) {                                \
        attend<D>(qkv, starts, out, lse, shape);                                                                          \
    }
ATTENTION(32)
ATTENTION(64)
ATTENTION(96)
ATTENTION(128)
ATTENTION(256)
