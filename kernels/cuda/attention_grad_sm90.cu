// Backward of causal flash attention on Hopper for heads of up to 128 columns: attention_grad.cu's contract and division of work, by
// wgmma. Delta is made there.                                                                    (AttentionOps::attention_grad)
// Bound: tensor cores. FLOPs counted = 5·B·heads·S²·D, done = 7.
//
// Two warpgroups a block: 64 queries each for dq, 64 keys each for dk and dv. The other side comes in tiles of 64 rows by cp.async,
// two buffers, one barrier a step. Scores are transposed where keys are the rows, so P and dS always go from the sums' registers into
// the next product as its left operand. P is made while dP is multiplied, dS while dv is; the warpgroups fill each other's gaps.

#include "attention.cuh"
#include "attention_wgmma.cuh"

// Rows of a block, and of a tile of the other side.
constexpr int OWN = 128, TILE = 64;

// c = own[64, D] · tile[64, D]ᵀ, issued as a group of its own.
template <int D> __device__ __forceinline__ void issue_products(float (&c)[TILE / 2], const unsigned char* own, int row, const unsigned char* tile) {
#pragma unroll
    for (int depth = 0; depth < D; depth += 16) {
        wgmma_scores(c, Panels<D, OWN>::by_columns(own, row, depth), Panels<D, TILE>::by_columns(tile, 0, depth), depth > 0);
    }
    wgmma_commit();
}

// sums += left[64, 64] · tile[64, D], issued as a group of its own.
template <int D> __device__ __forceinline__ void issue_sums(float (&sums)[D / 2], const uint32_t (&left)[TILE / 16][4], const unsigned char* tile) {
#pragma unroll
    for (int depth = 0; depth < TILE; depth += 16) wgmma_values(sums, left[depth / 16], Panels<D, TILE>::by_rows(tile, depth));
    wgmma_commit();
}

template <int D>
__device__ void query_grad_hopper(const bf16* qkv, const int* starts, const float* lse, const float* delta, const bf16* dout, bf16* dqkv,
                                  const AttentionShape shape) {
    using Own = Panels<D, OWN>;
    using Other = Panels<D, TILE>;
    extern __shared__ __align__(1024) unsigned char shared[];
    const int group = threadIdx.x / 128, warp = threadIdx.x / WARP, lane = threadIdx.x % WARP;
    const int head = blockIdx.x % shape.heads, b = blockIdx.x / shape.heads, kv = shape.kv_of(head);
    const int first = (gridDim.y - 1 - blockIdx.y) * OWN, live = min(OWN, shape.seq - first);
    const int64_t width = shape.width(), out_width = shape.out_width();
    const bf16* keys = qkv + shape.at(b, shape.heads + kv);
    const int to_values = shape.kv_heads * shape.dim;
    const int* seen_from = starts ? starts + int64_t(b) * shape.seq : nullptr;

    // Shared memory: queries, dout, then keys and values for either buffer.
    unsigned char *const dout_at = shared + Own::BYTES, *const tiles_at = shared + 2 * Own::BYTES;
    const int from = seen_from ? seen_from[first] / TILE : 0, to = (first + live + TILE - 1) / TILE;
    auto fetch = [&](int tile) {
        const int key = tile * TILE, live = shape.seq - key;
        const bf16* rows = keys + key * width;
        unsigned char* at = tiles_at + (tile - from) % 2 * 2 * Other::BYTES;
        Other::fetch(at, rows, width, live, shape.dim);
        Other::fetch(at + Other::BYTES, rows + to_values, width, live, shape.dim);
    };
    Own::fetch(shared, qkv + shape.at(b, head) + first * width, width, live, shape.dim);
    Own::fetch(dout_at, dout + shape.out_at(b, head) + first * out_width, out_width, live, shape.dim);
    fetch(from);
    copies_end_group();

    // This lane's rows are first_row and 8 further on; its columns 8·n + 2·(lane % 4) and the next.
    const int warp_row = warp * 16, first_row = first + warp_row + lane / 4;
    float sums[D / 2], log_sum[2], mean[2];
#pragma unroll
    for (int i = 0; i < D / 2; ++i) sums[i] = 0.f;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
        const int position = first_row + half * 8;
        const int64_t at = shape.stat_at(b, head) + int64_t(position) * shape.heads;
        log_sum[half] = position < shape.seq ? lse[at] * LOG2_E : 0.f;
        mean[half] = position < shape.seq ? delta[at] : 0.f;
    }
    const float scale = shape.scale * LOG2_E;

    for (int tile = from; tile < to; ++tile) {
        const int key = tile * TILE;
        copies_wait<0>();
        fence_async();
        __syncthreads();  // the tile is there for all, and all are done with the one before
        if (tile + 1 < to) fetch(tile + 1);
        copies_end_group();
        if (key > first + group * 64 + 63) continue;  // behind all rows of this warpgroup

        const unsigned char* keys_at = tiles_at + (tile - from) % 2 * 2 * Other::BYTES;
        float scores[TILE / 2], grads[TILE / 2];
        uint32_t left[TILE / 16][4];
        wgmma_fence();
        issue_products<D>(scores, shared, group * 64, keys_at);
        issue_products<D>(grads, dout_at, group * 64, keys_at + Other::BYTES);
        wgmma_wait<1>();
        hold(scores);
        const bool edge = key + TILE - 1 > first + warp_row || seen_from;
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            const int last = first_row + half * 8, low = edge && seen_from ? seen_from[min(last, shape.seq - 1)] : 0;
#pragma unroll
            for (int n = 0; n < TILE / 8; ++n) {
#pragma unroll
                for (int i = 0; i < 2; ++i) {
                    const int at = key + n * 8 + lane % 4 * 2 + i;
                    float& p = scores[4 * n + 2 * half + i];
                    p = fast_exp2(p * scale - log_sum[half]);
                    if (edge && (at > last || at < low)) p = 0.f;
                }
            }
        }
        wgmma_wait<0>();
        hold(grads);
#pragma unroll
        for (int i = 0; i < TILE / 2; ++i) grads[i] = scores[i] * (grads[i] - mean[i / 2 % 2]);
        pack_left<TILE>(left, grads);
        wgmma_fence();
        issue_sums<D>(sums, left, keys_at);
        wgmma_wait<0>();
        hold(sums);
    }

    // A warpgroup alone reads its rows of queries, a warp alone writes its sixteen: the result may go through their place.
    meet(1 + group, 128);
    Own::store(shared, warp_row, lane, sums, shape.scale, shape.scale, dqkv + shape.at(b, head) + first * width, width, live, shape.dim);
}

template <int D>
__device__ void key_grad_hopper(const bf16* qkv, const int* starts, const float* lse, const float* delta, const bf16* dout, bf16* dqkv,
                                const AttentionShape shape) {
    using Own = Panels<D, OWN>;
    using Other = Panels<D, TILE>;
    extern __shared__ __align__(1024) unsigned char shared[];
    const int group = threadIdx.x / 128, warp = threadIdx.x / WARP, lane = threadIdx.x % WARP;
    const int kv = blockIdx.x % shape.kv_heads, b = blockIdx.x / shape.kv_heads, heads = shape.heads / shape.kv_heads;
    // The first keys are seen by the most queries and have the lowest block ids.
    const int first = blockIdx.y * OWN, live = min(OWN, shape.seq - first);
    const int64_t width = shape.width(), out_width = shape.out_width();
    const int* seen_from = starts ? starts + int64_t(b) * shape.seq : nullptr;

    // Shared memory: keys, values; queries and dout for either buffer; then lse, delta and first position seen of each query, likewise.
    unsigned char *const values_at = shared + Own::BYTES, *const tiles_at = shared + 2 * Own::BYTES;
    float* const stats_at = reinterpret_cast<float*>(tiles_at + 4 * Other::BYTES);
    const int from = first / TILE;
    const int end = seen_from ? seen_until(seen_from, first + live - 1, shape.seq) : shape.seq;
    const int tiles = (end + TILE - 1) / TILE - from, steps = heads * tiles;
    auto fetch = [&](int step) {
        const int head = kv * heads + step / tiles, query = (from + step % tiles) * TILE, live = shape.seq - query;
        unsigned char* at = tiles_at + step % 2 * 2 * Other::BYTES;
        Other::fetch(at, qkv + shape.at(b, head) + query * width, width, live, shape.dim);
        Other::fetch(at + Other::BYTES, dout + shape.out_at(b, head) + query * out_width, out_width, live, shape.dim);
        const int i = threadIdx.x;
        if (i < TILE) {
            // Positions past the end: P = 1, but their dout and delta are zero.
            const int64_t stat = i < live ? shape.stat_at(b, head) + int64_t(query + i) * shape.heads : 0;
            const uint32_t to = shared_u32(stats_at + step % 2 * 3 * TILE + i);
            copy_async4(to, lse + stat, i < live);
            copy_async4(to + TILE * 4, delta + stat, i < live);
            if (seen_from) copy_async4(to + 2 * TILE * 4, seen_from + (i < live ? query + i : 0), i < live);
        }
    };
    const bf16* keys = qkv + shape.at(b, shape.heads + kv) + first * width;
    Own::fetch(shared, keys, width, live, shape.dim);
    Own::fetch(values_at, keys + shape.kv_heads * shape.dim, width, live, shape.dim);
    fetch(0);
    copies_end_group();

    // This lane's keys are first_key and 8 further on; its queries of a tile 8·n + 2·(lane % 4) and the next.
    const int warp_key = warp * 16, first_key = first + warp_key + lane / 4;
    float dkeys[D / 2], dvalues[D / 2];
#pragma unroll
    for (int i = 0; i < D / 2; ++i) dkeys[i] = dvalues[i] = 0.f;
    const float scale = shape.scale * LOG2_E;

    for (int step = 0; step < steps; ++step) {
        const int query = (from + step % tiles) * TILE;
        copies_wait<0>();
        fence_async();
        __syncthreads();  // the tile is there for all, and all are done with the one before
        if (step + 1 < steps) fetch(step + 1);
        copies_end_group();
        if (query + TILE - 1 < first + group * 64) continue;  // before all keys of this warpgroup

        const unsigned char* queries_at = tiles_at + step % 2 * 2 * Other::BYTES;
        const unsigned char* douts_at = queries_at + Other::BYTES;
        const float* stats = stats_at + step % 2 * 3 * TILE + lane % 4 * 2;
        float scores[TILE / 2], grads[TILE / 2];
        uint32_t left[TILE / 16][4], left_grads[TILE / 16][4];
        wgmma_fence();
        issue_products<D>(scores, shared, group * 64, queries_at);
        issue_products<D>(grads, values_at, group * 64, douts_at);
        wgmma_wait<1>();
        hold(scores);
        const bool edge = query < first + warp_key + 15 || seen_from;
#pragma unroll
        for (int n = 0; n < TILE / 8; ++n) {
            const float2 log_sum = *reinterpret_cast<const float2*>(stats + n * 8);
#pragma unroll
            for (int i = 0; i < 4; ++i) {
                float& p = scores[4 * n + i];
                p = fast_exp2(p * scale - (i % 2 ? log_sum.y : log_sum.x) * LOG2_E);
                if (edge) {
                    const int key = first_key + i / 2 * 8, column = n * 8 + lane % 4 * 2 + i % 2;
                    const int low = seen_from ? reinterpret_cast<const int*>(stats)[2 * TILE + n * 8 + i % 2] : 0;
                    if (key > query + column || key < low) p = 0.f;
                }
            }
        }
        pack_left<TILE>(left, scores);
        wgmma_fence();
        issue_sums<D>(dvalues, left, douts_at);
        wgmma_wait<1>();
        hold(grads);
#pragma unroll
        for (int n = 0; n < TILE / 8; ++n) {
            const float2 mean = *reinterpret_cast<const float2*>(stats + TILE + n * 8);
#pragma unroll
            for (int i = 0; i < 4; ++i) grads[4 * n + i] = scores[4 * n + i] * (grads[4 * n + i] - (i % 2 ? mean.y : mean.x));
        }
        pack_left<TILE>(left_grads, grads);
        wgmma_fence();
        issue_sums<D>(dkeys, left_grads, queries_at);
        wgmma_wait<0>();
        hold(dvalues);
        hold(dkeys);
    }

    // A warpgroup alone reads its rows of keys and values, a warp alone writes its sixteen: the results may go through their places.
    meet(1 + group, 128);
    bf16* to_keys = dqkv + shape.at(b, shape.heads + kv) + first * width;
    Own::store(shared, warp_key, lane, dkeys, shape.scale, shape.scale, to_keys, width, live, shape.dim);
    Own::store(values_at, warp_key, lane, dvalues, 1.f, 1.f, to_keys + shape.kv_heads * shape.dim, width, live, shape.dim);
}

#define ATTENTION_GRAD_HOPPER(D)                                                                                         \
    extern "C" __global__ void __launch_bounds__(256, 1) attention_grad_queries_hopper_##D##_bf16(                        \
        const bf16* qkv, const int* starts, const float* lse, const float* delta, const bf16* dout, bf16* dqkv,           \
        AttentionShape shape) {                                                                                           \
        query_grad_hopper<D>(qkv, starts, lse, delta, dout, dqkv, shape);                                                 \
    }                                                                                                                     \
    extern "C" __global__ void __launch_bounds__(256, 1) attention_grad_keys_hopper_##D##_bf16(                           \
        const bf16* qkv, const int* starts, const float* lse, const float* delta, const bf16* dout, bf16* dqkv,           \
        AttentionShape shape) {                                                                                           \
        key_grad_hopper<D>(qkv, starts, lse, delta, dout, dqkv, shape);                                                   \
    }
ATTENTION_GRAD_HOPPER(64)
ATTENTION_GRAD_HOPPER(128)
