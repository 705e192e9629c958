// Causal flash attention on Hopper, forward, for heads of up to 128 columns: attention.cu's contract, by wgmma.
//                                                                                                        (AttentionOps::attention)
// Bound: tensor cores. FLOPs = 2·B·heads·S²·D. A tile of 128 queries × 128 keys at D = 128 takes the tensor cores at least 2048
// cycles and the 16384 exponentials the special function units 1024: the softmax has to run beside the products, not after them.
//
// A block is 128 query rows of one head, 64 for each of two warpgroups. A step issues the scores of the next tile and the values of
// this one, waits for the scores only, and makes the next tile's weights while the values are still being added: so each warpgroup's
// softmax hides behind its own products. Tiles of 128 keys come by cp.async, which (unlike a tensor map) needs nothing from the host
// and zeroes what lies beyond the sequence or the head; one barrier a step, two buffers for keys and two for values, a step's time
// for a copy to arrive. Weights go from the score registers straight into the second product. Rows, order of sums, skipping of tiles
// and order of blocks as in attention.cu.

#include "attention.cuh"
#include "attention_wgmma.cuh"

template <int D>
__device__ void attend_hopper(const bf16* qkv, const int* starts, bf16* out, float* lse, const AttentionShape shape) {
    // Shared memory: queries, two tiles of keys, two of values.
    constexpr int ROWS = 128, KEYS = 128, N = KEYS / 8;
    using P = Panels<D, 128>;
    extern __shared__ __align__(1024) unsigned char shared[];
    const int group = threadIdx.x / 128, warp = threadIdx.x / WARP, lane = threadIdx.x % WARP;
    const int head = blockIdx.x % shape.heads, b = blockIdx.x / shape.heads, kv = shape.kv_of(head);
    const int first = (gridDim.y - 1 - blockIdx.y) * ROWS, live = min(ROWS, shape.seq - first);
    const int64_t width = shape.width();
    const bf16* keys = qkv + shape.at(b, shape.heads + kv);
    const bf16* values = keys + shape.kv_heads * shape.dim;
    const int* seen_from = starts ? starts + int64_t(b) * shape.seq : nullptr;

    unsigned char *const keys_at = shared + P::BYTES, *const values_at = shared + 3 * P::BYTES;
    const int from = seen_from ? seen_from[first] / KEYS : 0, tiles = (first + live + KEYS - 1) / KEYS - from;
    // Tiles are counted from the first that is seen; tile t lies in buffer t % 2.
    auto fetch = [&](unsigned char* buffers, const bf16* rows, int tile) {
        const int key = (from + tile) * KEYS;
        P::fetch(buffers + tile % 2 * P::BYTES, rows + key * width, width, shape.seq - key, shape.dim);
    };
    P::fetch(shared, qkv + shape.at(b, head) + first * width, width, live, shape.dim);
    fetch(keys_at, keys, 0);
    copies_end_group();

    // This lane's rows are first_row and 8 further on; its columns 8·n + 2·(lane % 4) and the next.
    const int warp_row = warp * 16, first_row = first + warp_row + lane / 4;
    float sums[D / 2], scores[KEYS / 2], most[2] = {-INFINITY, -INFINITY}, total[2] = {}, fade[2];
    uint32_t weights[KEYS / 16][4];
#pragma unroll
    for (int i = 0; i < D / 2; ++i) sums[i] = 0.f;
    const float scale = shape.scale * LOG2_E;  // into powers of two

    auto issue_scores = [&](int tile) {
#pragma unroll
        for (int depth = 0; depth < D; depth += 16) {
            const uint64_t k = P::by_columns(keys_at + tile % 2 * P::BYTES, 0, depth);
            wgmma_scores(scores, P::by_columns(shared, group * 64, depth), k, depth > 0);
        }
    };
    auto issue_values = [&](int tile) {
#pragma unroll
        for (int key = 0; key < KEYS; key += 16) {
            wgmma_values(sums, weights[key / 16], P::by_rows(values_at + tile % 2 * P::BYTES, key));
        }
    };
    // Scores to powers of two, rows' largest and sums brought up to date; `fade` is what the sums so far have to be multiplied by.
    auto soften = [&](int tile) {
        const int key = (from + tile) * KEYS;
        if (key + KEYS - 1 > first + warp_row || seen_from) {
#pragma unroll
            for (int half = 0; half < 2; ++half) {
                const int last = first_row + half * 8, low = seen_from ? seen_from[min(last, shape.seq - 1)] : 0;
#pragma unroll
                for (int n = 0; n < N; ++n) {
#pragma unroll
                    for (int i = 0; i < 2; ++i) {
                        const int at = key + n * 8 + lane % 4 * 2 + i;
                        if (at > last || at < low) scores[4 * n + 2 * half + i] = -INFINITY;
                    }
                }
            }
        }
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            float peak = most[half];
#pragma unroll
            for (int n = 0; n < N; ++n) peak = fmaxf(peak, fmaxf(scores[4 * n + 2 * half], scores[4 * n + 2 * half + 1]));
            peak = fmaxf(peak, __shfl_xor_sync(0xffffffffu, peak, 1));
            peak = fmaxf(peak, __shfl_xor_sync(0xffffffffu, peak, 2));
            // A row that has seen no key yet has −∞, from which nothing can be subtracted.
            const float base = peak == -INFINITY ? 0.f : peak * scale;
            fade[half] = fast_exp2(most[half] * scale - base);
            most[half] = peak;
            float sum = 0.f;
#pragma unroll
            for (int n = 0; n < N; ++n) {
#pragma unroll
                for (int i = 4 * n + 2 * half; i < 4 * n + 2 * half + 2; ++i) {
                    scores[i] = fast_exp2(scores[i] * scale - base);
                    sum += scores[i];
                }
            }
            total[half] = total[half] * fade[half] + sum;
        }
    };
    // This thread's copies are there, and wgmma of any thread of the block may read them.
    auto arrived = [&] {
        copies_wait<0>();
        fence_async();
        __syncthreads();
    };

    arrived();
    fetch(values_at, values, 0);
    if (tiles > 1) fetch(keys_at, keys, 1);
    copies_end_group();
    wgmma_fence();
    issue_scores(0);
    wgmma_commit();
    wgmma_wait<0>();
    hold(scores);
    soften(0);
    pack_left<KEYS>(weights, scores);

    for (int tile = 0; tile + 1 < tiles; ++tile) {
        arrived();  // values of this tile, keys of the next; and all are done with the keys of this one, the values of the last
        wgmma_fence();
        issue_scores(tile + 1);
        wgmma_commit();
        issue_values(tile);
        wgmma_commit();
        fetch(values_at, values, tile + 1);
        if (tile + 2 < tiles) fetch(keys_at, keys, tile + 2);
        copies_end_group();
        wgmma_wait<1>();
        hold(scores);
        soften(tile + 1);
        wgmma_wait<0>();
        hold(sums);
#pragma unroll
        for (int i = 0; i < D / 2; ++i) sums[i] *= fade[i / 2 % 2];
        pack_left<KEYS>(weights, scores);
    }
    arrived();
    wgmma_fence();
    issue_values(tiles - 1);
    wgmma_commit();
    wgmma_wait<0>();
    hold(sums);

    float inverse[2];
#pragma unroll
    for (int half = 0; half < 2; ++half) {
        float sum = total[half];
        sum += __shfl_xor_sync(0xffffffffu, sum, 1);
        sum += __shfl_xor_sync(0xffffffffu, sum, 2);
        inverse[half] = 1.f / sum;
        const int position = first_row + half * 8;
        if (lane % 4 == 0 && position < shape.seq) {
            lse[shape.stat_at(b, head) + int64_t(position) * shape.heads] = most[half] * shape.scale + logf(sum);
        }
    }
    // A warpgroup alone reads its rows of queries, a warp alone writes its sixteen: the result may go through their place.
    meet(1 + group, 128);
    const int64_t out_width = shape.out_width();
    bf16* to_rows = out + shape.out_at(b, head) + first * out_width;
    P::store(shared, warp_row, lane, sums, inverse[0], inverse[1], to_rows, out_width, live, shape.dim);
}

#define ATTENTION_HOPPER(D)                                                                                              \
    extern "C" __global__ void __launch_bounds__(256, 1) attention_hopper_##D##_bf16(                                     \
        const bf16* qkv, const int* starts, bf16* out, float* lse, AttentionShape shape) {                                \
        attend_hopper<D>(qkv, starts, out, lse, shape);                                                                   \
    }
ATTENTION_HOPPER(64)
ATTENTION_HOPPER(128)
