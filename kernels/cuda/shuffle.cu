// The shuffle's plans, without the host: stable counting sorts of (token, rank) pairs and of (row, expert) slots.
//
// shuffle_plan: ids [T, k] i32 (−1: not sent), weights [T, k] f32 → the outputs of ops/expert.rs, ShufflePlan; rows sorted by
//   destination rank, then token. W ≤ 64, k ≤ 32.
// expand_plan: recv_counts [W] i32, row_experts [R', k] i32 → ExpandPlan; expanded rows sorted by expert, then arrived row. E/W ≤ 512.
//
// Two launches each. `*_count`: each block counts the keys of its own stretch into scratch [blocks, keys]. `*_place`: each block sums the
// counts of the blocks before it (and of all, for the starts of the keys), then places its stretch in order: ranks inside a tile come
// from ballots, so no order depends on timing; the atomics are integer ones, whose sums do not depend on their order. The stretch grows with the input so that
// there are at most some hundred blocks, and the sums over them stay short.
// Bound: latency of the launches; bytes are about 4·T·k·(3 + 4) read and written once, all of it in the second-level cache.

#include "common.cuh"

constexpr unsigned ALL = 0xffffffffu;
constexpr int MOST_RANKS = 64;
constexpr int MOST_EXPERTS = 512;
constexpr int PLAN_THREADS = 256;
constexpr int TILE_TOKENS = 2 * WARP;
constexpr int EXPAND_THREADS = 1024;

__device__ __forceinline__ int lane_id() { return threadIdx.x % WARP; }
__device__ __forceinline__ int warp_id() { return threadIdx.x / WARP; }
__device__ __forceinline__ unsigned lanes_below() { return (1u << lane_id()) - 1; }

// below[c] = Σ counts[b, c] over the blocks b < before, total[c] over all blocks. At most blockDim.x columns. All threads call it.
__device__ void sum_counts(const int* counts, int columns, int before, int blocks, int* below, int* total) {
    for (int c = threadIdx.x; c < columns; c += blockDim.x) below[c] = total[c] = 0;
    __syncthreads();
    const int groups = blockDim.x / columns, group = threadIdx.x / columns, c = threadIdx.x % columns;
    if (group < groups) {
        int lower = 0, all = 0;
#pragma unroll 4
        for (int b = group; b < blocks; b += groups) {
            const int n = counts[b * columns + c];
            all += n;
            if (b < before) lower += n;
        }
        atomicAdd(&below[c], lower);
        atomicAdd(&total[c], all);
    }
    __syncthreads();
}

// starts[c] = Σ total[c' < c], starts[columns] = Σ total. All threads call it.
__device__ void scan_columns(const int* total, int columns, int* starts) {
    if (warp_id() == 0) {
        int carry = 0;
        for (int first = 0; first < columns; first += WARP) {
            const int c = first + lane_id(), n = c < columns ? total[c] : 0;
            int sum = n;
#pragma unroll
            for (int d = 1; d < WARP; d *= 2) {
                const int other = __shfl_up_sync(ALL, sum, d);
                if (lane_id() >= d) sum += other;
            }
            if (c < columns) starts[c] = carry + sum - n;
            carry += __shfl_sync(ALL, sum, WARP - 1);
        }
        if (lane_id() == 0) starts[columns] = carry;
    }
    __syncthreads();
}

struct Routes {
    int tokens, top_k, experts, ranks;
    __device__ int local() const { return experts / ranks; }
    __device__ int rows_per_token() const { return min(top_k, ranks); }
    __device__ bool sent(int id) const { return id >= 0 && id < experts; }

    // The ranks that a token goes to, as bits.
    __device__ uint64_t destinations(const int* ids) const {
        uint64_t ranks_hit = 0;
        for (int j = 0; j < top_k; j++)
            if (sent(ids[j])) ranks_hit |= uint64_t(1) << (ids[j] / local());
        return ranks_hit;
    }
};

extern "C" __global__ void __launch_bounds__(PLAN_THREADS)
    shuffle_count(int tokens, int top_k, int experts, int ranks, int per_block, const int* ids, int* counts) {
    // Rows of each rank, then choices.
    __shared__ int held[2 * MOST_RANKS];
    const Routes routes{tokens, top_k, experts, ranks};
    const int columns = 2 * ranks;
    for (int w = threadIdx.x; w < columns; w += blockDim.x) held[w] = 0;
    __syncthreads();
    const int last = min((blockIdx.x + 1) * per_block, tokens);
    for (int t = blockIdx.x * per_block + threadIdx.x; t < last; t += blockDim.x) {
        const int* mine = ids + long(t) * top_k;
        for (uint64_t to = routes.destinations(mine); to != 0; to &= to - 1) atomicAdd(&held[__ffsll(to) - 1], 1);
        for (int j = 0; j < top_k; j++)
            if (routes.sent(mine[j])) atomicAdd(&held[ranks + mine[j] / routes.local()], 1);
    }
    __syncthreads();
    for (int w = threadIdx.x; w < columns; w += blockDim.x) counts[blockIdx.x * columns + w] = held[w];
}

struct RowOutputs {
    int *token, *experts, *choice;
    float* weights;
};

// One warp, one token: its rows' experts in ascending order, then −1. `rows` holds its rows by ascending rank.
__device__ void fill_rows(const Routes& routes, int t, uint64_t to, const int* ids, const float* weights, const int* rows,
                          const RowOutputs& out) {
    const int k = routes.top_k, lane = lane_id(), local = routes.local();
    int id = lane < k ? ids[long(t) * k + lane] : -1;
    if (!routes.sent(id)) id = -1;
    const int rank = id < 0 ? -1 : id / local;
    int place = 0;
    for (int j = 0; j < k; j++) {
        const int other = __shfl_sync(ALL, id, j), other_rank = __shfl_sync(ALL, rank, j);
        place += other_rank == rank && (other < id || (other == id && j > lane));
    }
    if (id >= 0) {
        const int row = rows[__popcll(to & ((uint64_t(1) << rank) - 1))];
        const long at = long(row) * k + place;
        out.experts[at] = id - rank * local;
        out.choice[at] = t * k + lane;
        out.weights[at] = weights[long(t) * k + lane];
    }
    for (int n = 0; to != 0; n++, to &= to - 1) {
        const int held = __popc(__ballot_sync(ALL, rank == __ffsll(to) - 1));
        if (lane >= held && lane < k) {
            const long at = long(rows[n]) * k + lane;
            out.experts[at] = -1;
            out.choice[at] = -1;
            out.weights[at] = 0.0f;
        }
    }
}

extern "C" __global__ void __launch_bounds__(PLAN_THREADS)
    shuffle_place(int tokens, int top_k, int experts, int ranks, int per_block, const int* ids, const float* weights,
                  const int* counts, int* send_counts, int* row_token, int* row_experts, int* row_choice, float* row_weights,
                  int* token_rows, int* rows) {
    __shared__ int next[2 * MOST_RANKS], total[2 * MOST_RANKS], starts[MOST_RANKS + 1], held[TILE_TOKENS / WARP][MOST_RANKS];
    __shared__ uint64_t destinations[TILE_TOKENS];
    const Routes routes{tokens, top_k, experts, ranks};
    const RowOutputs out{row_token, row_experts, row_choice, row_weights};
    const int slots = routes.rows_per_token(), warp = warp_id();
    sum_counts(counts, 2 * ranks, blockIdx.x, gridDim.x, next, total);
    scan_columns(total, ranks, starts);
    if (threadIdx.x < ranks) next[threadIdx.x] += starts[threadIdx.x];
    if (blockIdx.x == 0 && threadIdx.x < 2 * ranks) send_counts[threadIdx.x] = total[threadIdx.x];
    if (blockIdx.x == 0 && threadIdx.x == 0) rows[0] = starts[ranks];
    const int last = min((blockIdx.x + 1) * per_block, tokens);
    for (int first = blockIdx.x * per_block; first < last; first += TILE_TOKENS) {
        // One thread a token, in the first warps: which row each of its ranks gets.
        const int t = first + threadIdx.x;
        const bool mine = threadIdx.x < TILE_TOKENS && t < last;
        const uint64_t to = mine ? routes.destinations(ids + long(t) * top_k) : 0;
        if (threadIdx.x < TILE_TOKENS) {
            destinations[threadIdx.x] = to;
            for (int w = 0; w < ranks; w++) {
                const unsigned going = __ballot_sync(ALL, to >> w & 1);
                if (lane_id() == 0) held[warp][w] = __popc(going);
            }
        }
        __syncthreads();
        if (threadIdx.x < TILE_TOKENS) {
            int found = 0;
            for (int w = 0; w < ranks; w++) {
                const unsigned going = __ballot_sync(ALL, to >> w & 1);
                if (to >> w & 1) {
                    const int row = next[w] + (warp > 0 ? held[0][w] : 0) + __popc(going & lanes_below());
                    token_rows[long(t) * slots + found++] = row;
                    row_token[row] = t;
                }
            }
            while (mine && found < slots) token_rows[long(t) * slots + found++] = -1;
        }
        __syncthreads();
        for (int i = warp; i < min(TILE_TOKENS, last - first); i += PLAN_THREADS / WARP)
            fill_rows(routes, first + i, destinations[i], ids, weights, token_rows + long(first + i) * slots, out);
        if (threadIdx.x < ranks) next[threadIdx.x] += held[0][threadIdx.x] + held[1][threadIdx.x];
        __syncthreads();
    }
}

// Σ recv_counts, no more than the rows that fit. All threads call it.
__device__ int arrived(const int* recv_counts, int ranks, int bound) {
    int rows = 0;
    for (int w = lane_id(); w < ranks; w += WARP) rows += recv_counts[w];
    return min(warp_sum(rows), bound);
}

extern "C" __global__ void __launch_bounds__(EXPAND_THREADS)
    expand_count(int bound, int top_k, int ranks, int experts, int per_block, const int* recv_counts, const int* row_experts,
                 int* rows, int* counts) {
    __shared__ int held[MOST_EXPERTS];
    for (int e = threadIdx.x; e < experts; e += blockDim.x) held[e] = 0;
    const int arrived_rows = arrived(recv_counts, ranks, bound), live = arrived_rows * top_k;
    if (blockIdx.x == 0 && threadIdx.x == 0) rows[0] = arrived_rows;
    __syncthreads();
    const int last = min((blockIdx.x + 1) * per_block, live);
    for (int slot = blockIdx.x * per_block + threadIdx.x; slot < last; slot += blockDim.x) {
        const int e = row_experts[slot];
        if (e >= 0 && e < experts) atomicAdd(&held[e], 1);
    }
    __syncthreads();
    for (int e = threadIdx.x; e < experts; e += blockDim.x) counts[blockIdx.x * experts + e] = held[e];
}

extern "C" __global__ void __launch_bounds__(EXPAND_THREADS)
    expand_place(int bound, int room, int top_k, int ranks, int experts, int per_block, const int* recv_counts,
                 const int* row_experts, const int* counts, int* offsets, int* slots, int* source, int* origin) {
    // held[w, e]: slots of expert e in this tile's warp w, then in the warps before it.
    __shared__ unsigned short held[EXPAND_THREADS / WARP * MOST_EXPERTS];
    __shared__ int next[MOST_EXPERTS], total[MOST_EXPERTS], starts[MOST_EXPERTS + 1];
    const int live = arrived(recv_counts, ranks, bound) * top_k, warp = warp_id();
    sum_counts(counts, experts, blockIdx.x, gridDim.x, next, total);
    scan_columns(total, experts, starts);
    if (threadIdx.x < experts) next[threadIdx.x] += starts[threadIdx.x];
    if (blockIdx.x == 0 && threadIdx.x <= experts) offsets[threadIdx.x] = starts[threadIdx.x];
    const int last = min((blockIdx.x + 1) * per_block, live);
    for (int first = blockIdx.x * per_block; first < last; first += EXPAND_THREADS) {
        for (int i = threadIdx.x; i < EXPAND_THREADS / WARP * experts; i += EXPAND_THREADS) held[i] = 0;
        __syncthreads();
        const int slot = first + threadIdx.x;
        int e = slot < last ? row_experts[slot] : -1;
        if (e >= experts) e = -1;
        const unsigned peers = __match_any_sync(ALL, e);
        const int before = __popc(peers & lanes_below());
        if (e >= 0 && before == 0) held[warp * experts + e] = __popc(peers);
        __syncthreads();
        int in_tile = 0;
        if (threadIdx.x < experts)
            for (int w = 0; w < EXPAND_THREADS / WARP; w++) {
                const int n = held[w * experts + threadIdx.x];
                held[w * experts + threadIdx.x] = in_tile;
                in_tile += n;
            }
        __syncthreads();
        if (slot < last) {
            const int row = e < 0 ? -1 : next[e] + held[warp * experts + e] + before;
            slots[slot] = row;
            if (row >= 0 && row < room) {
                source[row] = slot / top_k;
                origin[row] = slot;
            }
        }
        __syncthreads();
        if (threadIdx.x < experts) next[threadIdx.x] += in_tile;
    }
}
