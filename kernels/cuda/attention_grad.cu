// Backward of causal flash attention (attention.cu has layouts and letters).                     (AttentionOps::attention_grad)
//
// P = exp(q·kᵀ/√D − lse), dP = dout·vᵀ, dS = P∘(dP − delta) with delta[row] = Σ dout·out; then
//   dv = Pᵀ·dout, dk = dSᵀ·q/√D (both over the query heads of the group), dq = dS·k/√D.
// qkv, out, dout bf16, lse f32 → delta [B·S, heads] f32 (scratch), dqkv bf16, every row written.
// Three kernels, none with atomics: delta; dq by a block of queries over the keys; dk and dv by a block of keys over the group's
// heads and the queries. Sums: dq over ascending keys, dk and dv over ascending heads, then queries: same bits every run.
// P and dP are made twice, in both kernels: seven products where five would do, which costs 1.4 times the tensor-core time but
// no ordered exchange of partial dq through memory.
// Bound: tensor cores, then shared memory. FLOPs counted = 5·B·heads·S²·D (causal half of five products).
//
// dq: as the forward pass, 64·M queries of a head by four warps, tiles of 32 keys through two buffers (one at D = 256).
// dk, dv: 16 keys a warp, transposed: Sᵀ = k·qᵀ puts keys in the rows of the C fragments, which then are the A fragments of both
// products, so P and dS never leave registers. At D = 256 the sums of 16 keys do not fit in registers: a block then makes half of
// the columns (SPLIT) and both halves recompute P.

#include "attention.cuh"
#include "mma.cuh"

// delta: `lanes` (a power of two) lanes a row of one head, 8 elements each at a time.
extern "C" __global__ void __launch_bounds__(128) attention_delta_bf16(const bf16* out, const bf16* dout, float* delta,
                                                                       int64_t rows, int dim, int lanes) {
    const int64_t row = (blockIdx.x * int64_t(blockDim.x) + threadIdx.x) / lanes;
    float sum = 0.f;
    if (row < rows) {
        for (int column = threadIdx.x % lanes * 8; column < dim; column += lanes * 8) {
            const Vec<bf16> x = load16(out + row * dim + column), y = load16(dout + row * dim + column);
#pragma unroll
            for (int i = 0; i < 8; ++i) sum = fmaf(to_f32(x.v[i]), to_f32(y.v[i]), sum);
        }
    }
    for (int d = lanes / 2; d > 0; d /= 2) sum += __shfl_xor_sync(0xffffffffu, sum, d);
    if (row < rows && threadIdx.x % lanes == 0) delta[row] = sum;
}

template <int D> struct QueryGrad {
    static constexpr int M = D > 128 ? 1 : 2, ROWS = 64 * M, KEYS = 32, THREADS = 128, BUFFERS = D > 128 ? 1 : 2;
    static constexpr int QUERY_BYTES = ROWS * D * 2, KEY_BYTES = KEYS * D * 2;
    // queries, dout, then keys and values for each buffer
    static constexpr int SHARED_BYTES = 2 * QUERY_BYTES + BUFFERS * 2 * KEY_BYTES;
};

template <int D>
__device__ void query_grad(const bf16* qkv, const int* starts, const float* lse, const float* delta, const bf16* dout, bf16* dqkv,
                           const AttentionShape shape) {
    using G = QueryGrad<D>;
    using T = Tile<D>;
    constexpr int M = G::M, KEYS = G::KEYS;
    extern __shared__ __align__(128) unsigned char shared[];
    const int warp = threadIdx.x / WARP, lane = threadIdx.x % WARP;
    const int head = blockIdx.x % shape.heads, b = blockIdx.x / shape.heads, kv = shape.kv_of(head);
    const int first = (gridDim.y - 1 - blockIdx.y) * G::ROWS, live = min(G::ROWS, shape.seq - first);
    const int64_t width = shape.width();
    const bf16* keys = qkv + shape.at(b, shape.heads + kv);
    const int to_values = shape.kv_heads * shape.dim;
    const int* seen_from = starts ? starts + int64_t(b) * shape.seq : nullptr;

    const uint32_t queries_at = shared_u32(shared), dout_at = queries_at + G::QUERY_BYTES, tiles_at = dout_at + G::QUERY_BYTES;
    const int from = seen_from ? seen_from[first] / KEYS : 0, to = (first + live + KEYS - 1) / KEYS;
    auto fetch = [&](int tile) {
        const int key = tile * KEYS, live = shape.seq - key;
        const bf16* rows = keys + key * width;
        const uint32_t at = tiles_at + (tile - from) % G::BUFFERS * 2 * G::KEY_BYTES;
        T::template fetch<KEYS, G::THREADS>(at, rows, width, live, shape.dim);
        T::template fetch<KEYS, G::THREADS>(at + G::KEY_BYTES, rows + to_values, width, live, shape.dim);
    };
    const int64_t out_width = shape.out_width();
    T::template fetch<G::ROWS, G::THREADS>(queries_at, qkv + shape.at(b, head) + first * width, width, live, shape.dim);
    T::template fetch<G::ROWS, G::THREADS>(dout_at, dout + shape.out_at(b, head) + first * out_width, out_width, live, shape.dim);
    fetch(from);
    copies_end_group();

    const int warp_row = warp * 16 * M;
    auto row = [&](int m, int half) { return first + warp_row + m * 16 + half * 8 + lane / 4; };
    float sums[M][D / 8][4] = {}, log_sum[M][2], mean[M][2];
#pragma unroll
    for (int m = 0; m < M; ++m) {
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            const int position = row(m, half);
            const int64_t at = shape.stat_at(b, head) + int64_t(position) * shape.heads;
            log_sum[m][half] = position < shape.seq ? lse[at] * LOG2_E : 0.f;
            mean[m][half] = position < shape.seq ? delta[at] : 0.f;
        }
    }
    const uint32_t my_queries = T::rows16(queries_at, warp_row, lane), my_dout = T::rows16(dout_at, warp_row, lane);
    const float scale = shape.scale * LOG2_E;

    for (int tile = from; tile < to; ++tile) {
        const int key = tile * KEYS;
        copies_wait<0>();
        __syncthreads();  // the tile is there for all; with two buffers, all are done with the other one
        if (G::BUFFERS == 2 && tile + 1 < to) fetch(tile + 1);
        copies_end_group();
        if (key <= first + warp_row + 16 * M - 1) {  // else behind all rows of this warp
            const uint32_t keys_at = tiles_at + (tile - from) % G::BUFFERS * 2 * G::KEY_BYTES;
            const uint32_t my_keys = T::columns16(keys_at, 0, lane), my_values = T::columns16(keys_at + G::KEY_BYTES, 0, lane);
            float scores[M][KEYS / 8][4] = {}, grads[M][KEYS / 8][4] = {};
            auto products = [&](float (&c)[M][KEYS / 8][4], uint32_t rows, uint32_t columns) {
#pragma unroll
                for (int depth = 0; depth < D / 8; depth += 2) {
                    uint32_t a[M][4];
#pragma unroll
                    for (int m = 0; m < M; ++m) load_blocks(a[m], T::step(rows, m * 16, depth));
#pragma unroll
                    for (int n = 0; n < KEYS / 8; n += 2) {
                        uint32_t x[4];
                        load_blocks(x, T::step(columns, n * 8, depth));
#pragma unroll
                        for (int m = 0; m < M; ++m) {
                            multiply_add(c[m][n], a[m], x[0], x[1]);
                            multiply_add(c[m][n + 1], a[m], x[2], x[3]);
                        }
                    }
                }
            };
            products(scores, my_queries, my_keys);
            products(grads, my_dout, my_values);

            const bool edge = key + KEYS - 1 > first + warp_row || seen_from;
#pragma unroll
            for (int m = 0; m < M; ++m) {
#pragma unroll
                for (int half = 0; half < 2; ++half) {
                    const int last = row(m, half), low = edge && seen_from ? seen_from[min(last, shape.seq - 1)] : 0;
#pragma unroll
                    for (int n = 0; n < KEYS / 8; ++n) {
#pragma unroll
                        for (int i = 0; i < 2; ++i) {
                            const int at = key + n * 8 + lane % 4 * 2 + i;
                            float p = fast_exp2(scores[m][n][2 * half + i] * scale - log_sum[m][half]);
                            if (edge && (at > last || at < low)) p = 0.f;
                            grads[m][n][2 * half + i] = p * (grads[m][n][2 * half + i] - mean[m][half]);
                        }
                    }
                }
            }

            const uint32_t my_key_rows = T::rows16(keys_at, 0, lane);
#pragma unroll
            for (int n = 0; n < KEYS / 8; n += 2) {
                uint32_t ds[M][4];
#pragma unroll
                for (int m = 0; m < M; ++m) {
#pragma unroll
                    for (int i = 0; i < 4; ++i) ds[m][i] = pack(grads[m][n + i / 2][i % 2 * 2], grads[m][n + i / 2][i % 2 * 2 + 1]);
                }
#pragma unroll
                for (int column = 0; column < D / 8; column += 2) {
                    uint32_t k[4];
                    load_blocks_transposed(k, T::step(my_key_rows, n * 8, column));
#pragma unroll
                    for (int m = 0; m < M; ++m) {
                        multiply_add(sums[m][column], ds[m], k[0], k[1]);
                        multiply_add(sums[m][column + 1], ds[m], k[2], k[3]);
                    }
                }
            }
        }
        if (G::BUFFERS == 1) {
            __syncthreads();  // all are done with the only buffer
            if (tile + 1 < to) fetch(tile + 1);
            copies_end_group();
        }
    }

    // A warp alone reads its rows of queries, so the result may go through their place.
#pragma unroll
    for (int m = 0; m < M; ++m) {
        T::put(queries_at, warp_row + m * 16, lane, sums[m], shape.scale, shape.scale);
        __syncwarp();
        bf16* to_rows = dqkv + shape.at(b, head) + first * width;
        T::template drain<T::CHUNKS>(queries_at, warp_row + m * 16, lane, to_rows, width, live, shape.dim);
    }
}

template <int D> struct KeyGrad {
    static constexpr int SPLIT = D > 128 ? 2 : 1, WARPS = D > 128 ? 4 : 8, THREADS = WARPS * WARP;
    static constexpr int KEYS = 16 * WARPS, ROWS = D > 128 ? 32 : 64, COLUMNS = D / SPLIT;
    static constexpr int KEY_BYTES = KEYS * D * 2, QUERY_BYTES = ROWS * D * 2;
    // lse, delta and first position seen of each query
    static constexpr int STAT_BYTES = 3 * ROWS * 4;
    // keys, values, then for each buffer queries, dout and their numbers
    static constexpr int BUFFER_BYTES = (2 * QUERY_BYTES + STAT_BYTES + 127) / 128 * 128;
};

template <int D>
__device__ void key_grad(const bf16* qkv, const int* starts, const float* lse, const float* delta, const bf16* dout, bf16* dqkv,
                         const AttentionShape shape, const int buffers) {
    using G = KeyGrad<D>;
    using T = Tile<D>;
    constexpr int ROWS = G::ROWS;
    extern __shared__ __align__(128) unsigned char shared[];
    const int warp = threadIdx.x / WARP, lane = threadIdx.x % WARP;
    const int kv = blockIdx.x % shape.kv_heads, b = blockIdx.x / shape.kv_heads, group = shape.heads / shape.kv_heads;
    // The first keys are seen by the most queries and have the lowest block ids.
    const int first = blockIdx.y * G::KEYS, live = min(G::KEYS, shape.seq - first);
    const int64_t width = shape.width(), out_width = shape.out_width();
    const int* seen_from = starts ? starts + int64_t(b) * shape.seq : nullptr;

    const uint32_t keys_at = shared_u32(shared), values_at = keys_at + G::KEY_BYTES, tiles_at = values_at + G::KEY_BYTES;
    const int from = first / ROWS;
    const int end = seen_from ? seen_until(seen_from, first + live - 1, shape.seq) : shape.seq;
    const int tiles = (end + ROWS - 1) / ROWS - from, steps = group * tiles;
    auto buffer_of = [&](int step) { return buffers == 2 ? step & 1 : 0; };
    auto fetch = [&](int step) {
        const int head = kv * group + step / tiles, query = (from + step % tiles) * ROWS, live = shape.seq - query;
        const uint32_t at = tiles_at + buffer_of(step) * G::BUFFER_BYTES;
        T::template fetch<ROWS, G::THREADS>(at, qkv + shape.at(b, head) + query * width, width, live, shape.dim);
        T::template fetch<ROWS, G::THREADS>(at + G::QUERY_BYTES, dout + shape.out_at(b, head) + query * out_width, out_width, live,
                                            shape.dim);
        const int i = threadIdx.x;
        if (i < ROWS) {
            // Positions past the end: P = 1, but their dout and delta are zero.
            const int64_t stat = i < live ? shape.stat_at(b, head) + int64_t(query + i) * shape.heads : 0;
            const uint32_t stats_at = at + 2 * G::QUERY_BYTES + i * 4;
            copy_async4(stats_at, lse + stat, i < live);
            copy_async4(stats_at + ROWS * 4, delta + stat, i < live);
            if (seen_from) copy_async4(stats_at + 2 * ROWS * 4, seen_from + (i < live ? query + i : 0), i < live);
        }
    };
    const bf16* keys = qkv + shape.at(b, shape.heads + kv) + first * width;
    T::template fetch<G::KEYS, G::THREADS>(keys_at, keys, width, live, shape.dim);
    T::template fetch<G::KEYS, G::THREADS>(values_at, keys + shape.kv_heads * shape.dim, width, live, shape.dim);
    fetch(0);
    copies_end_group();

    // This lane's keys are first + warp_key + lane / 4 and that + 8; its queries of a tile 8·n + 2·(lane % 4) and the next.
    const int warp_key = warp * 16, part = G::SPLIT == 1 ? 0 : blockIdx.z;
    constexpr int N = G::COLUMNS / 8;
    float dkeys[N][4] = {}, dvalues[N][4] = {};
    const uint32_t my_keys = T::rows16(keys_at, warp_key, lane), my_values = T::rows16(values_at, warp_key, lane);
    const float scale = shape.scale * LOG2_E;

    for (int step = 0; step < steps; ++step) {
        const int query = (from + step % tiles) * ROWS;
        copies_wait<0>();
        __syncthreads();  // the tile is there for all; with two buffers, all are done with the other one
        if (buffers == 2 && step + 1 < steps) fetch(step + 1);
        copies_end_group();
        if (query + ROWS - 1 >= first + warp_key) {  // else before all keys of this warp
            const int buffer_offset = buffer_of(step) * G::BUFFER_BYTES;
            const uint32_t queries_at = tiles_at + buffer_offset, dout_at = queries_at + G::QUERY_BYTES;
            const float* stats =
                reinterpret_cast<const float*>(shared + 2 * G::KEY_BYTES + buffer_offset + 2 * G::QUERY_BYTES) + lane % 4 * 2;
            float scores[ROWS / 8][4] = {}, grads[ROWS / 8][4] = {};
            auto products = [&](float (&c)[ROWS / 8][4], uint32_t rows, uint32_t columns) {
#pragma unroll
                for (int depth = 0; depth < D / 8; depth += 2) {
                    uint32_t a[4];
                    load_blocks(a, T::step(rows, 0, depth));
#pragma unroll
                    for (int n = 0; n < ROWS / 8; n += 2) {
                        uint32_t x[4];
                        load_blocks(x, T::step(columns, n * 8, depth));
                        multiply_add(c[n], a, x[0], x[1]);
                        multiply_add(c[n + 1], a, x[2], x[3]);
                    }
                }
            };
            products(scores, my_keys, T::columns16(queries_at, 0, lane));
            const bool edge = query < first + warp_key + 15 || seen_from;
#pragma unroll
            for (int n = 0; n < ROWS / 8; ++n) {
                const float2 log_sum = *reinterpret_cast<const float2*>(stats + n * 8);
#pragma unroll
                for (int i = 0; i < 4; ++i) {
                    const float minus = (i % 2 ? log_sum.y : log_sum.x) * LOG2_E;
                    float p = fast_exp2(scores[n][i] * scale - minus);
                    if (edge) {
                        const int key = first + warp_key + lane / 4 + i / 2 * 8, column = n * 8 + lane % 4 * 2 + i % 2;
                        const int low = seen_from ? reinterpret_cast<const int*>(stats)[2 * ROWS + n * 8 + i % 2] : 0;
                        if (key > query + column || key < low) p = 0.f;
                    }
                    scores[n][i] = p;
                }
            }
            products(grads, my_values, T::columns16(dout_at, 0, lane));
#pragma unroll
            for (int n = 0; n < ROWS / 8; ++n) {
                const float2 mean = *reinterpret_cast<const float2*>(stats + ROWS + n * 8);
#pragma unroll
                for (int i = 0; i < 4; ++i) grads[n][i] = scores[n][i] * (grads[n][i] - (i % 2 ? mean.y : mean.x));
            }
            auto accumulate = [&](float (&sums)[N][4], const float (&c)[ROWS / 8][4], uint32_t tile) {
                const uint32_t columns = T::rows16(tile, 0, lane) + part * G::COLUMNS * 2;
#pragma unroll
                for (int n = 0; n < ROWS / 8; n += 2) {
                    uint32_t a[4];
#pragma unroll
                    for (int i = 0; i < 4; ++i) a[i] = pack(c[n + i / 2][i % 2 * 2], c[n + i / 2][i % 2 * 2 + 1]);
#pragma unroll
                    for (int column = 0; column < N; column += 2) {
                        uint32_t x[4];
                        load_blocks_transposed(x, T::step(columns, n * 8, column));
                        multiply_add(sums[column], a, x[0], x[1]);
                        multiply_add(sums[column + 1], a, x[2], x[3]);
                    }
                }
            };
            accumulate(dvalues, scores, dout_at);
            accumulate(dkeys, grads, queries_at);
        }
        if (buffers == 1) {
            __syncthreads();  // all are done with the only buffer
            if (step + 1 < steps) fetch(step + 1);
            copies_end_group();
        }
    }

    // A warp alone reads its rows of keys and values, so the results may go through their places.
    T::put(keys_at, warp_key, lane, dkeys, shape.scale, shape.scale);
    T::put(values_at, warp_key, lane, dvalues, 1.f, 1.f);
    __syncwarp();
    bf16* to_keys = dqkv + shape.at(b, shape.heads + kv) + first * width + part * G::COLUMNS;
    const int columns = shape.dim - part * G::COLUMNS;
    T::template drain<N>(keys_at, warp_key, lane, to_keys, width, live, columns);
    T::template drain<N>(values_at, warp_key, lane, to_keys + shape.kv_heads * shape.dim, width, live, columns);
}

#define ATTENTION_GRAD(D)                                                                                                \
    extern "C" __global__ void __launch_bounds__(128, 2)                                                                  \
        attention_grad_queries_##D##_bf16(const bf16* qkv, const int* starts, const float* lse, const float* delta,       \
                                          const bf16* dout, bf16* dqkv, AttentionShape shape) {                           \
        query_grad<D>(qkv, starts, lse, delta, dout, dqkv, shape);                                                        \
    }                                                                                                                     \
    extern "C" __global__ void __launch_bounds__(KeyGrad<D>::THREADS, 1)                                                  \
        attention_grad_keys_##D##_bf16(const bf16* qkv, const int* starts, const float* lse, const float* delta,          \
                                       const bf16* dout, bf16* dqkv, AttentionShape shape, int buffers) {                 \
        key_grad<D>(qkv, starts, lse, delta, dout, dqkv, shape, buffers);                                                 \
    }
ATTENTION_GRAD(32)
ATTENTION_GRAD(64)
ATTENTION_GRAD(96)
ATTENTION_GRAD(128)
ATTENTION_GRAD(256)
