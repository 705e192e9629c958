// Other experts for choices that capacity turned away.                                                      (ops/routing.rs)
//
// reroute_count: ids, kept [T, k] → room [E] = C − kept choices, dropped [E] = choices that are not kept. One block an expert.
// reroute_wish: scores [T, E], room, ids, kept → wishes [T, k]: whom each dropped choice asks, −1: nobody. One warp a token; as NAME_P for
//   rows of up to 32·P experts, E ≤ 512, k ≤ 32.
// reroute_take: room, wishes → ids, kept, room. One block an expert: takes those who ask in order of tokens while there is room.
// Integers alone: any order gives the same. Bound: latency; E blocks read T·k ids, from the second-level cache. Only runs that reroute call it.

#include "choice.cuh"

constexpr int THREADS = 256;
constexpr int WARPS = THREADS / WARP;
constexpr int WIDE = 1024;

extern "C" __global__ void __launch_bounds__(WIDE)
    reroute_count(int choices, int per_expert, const int* ids, const int* kept, int* room, float* dropped) {
    __shared__ int scratch[WARP];
    const int expert = blockIdx.x;
    int held = 0, lost = 0;
    for (int i = threadIdx.x; i < choices; i += WIDE) {
        held += kept[i] == expert;
        lost += kept[i] < 0 && ids[i] == expert;
    }
    held = block_sum(held, scratch);
    lost = block_sum(lost, scratch);
    if (threadIdx.x == 0) room[expert] = max(0, per_expert - held), dropped[expert] = float(lost);
}

template <int P>
__device__ void reroute_wish(int tokens, int experts, int top_k, const float* scores, const int* room, const int* ids,
                             const int* kept, int* wishes) {
    const int t = blockIdx.x * WARPS + warp_id(), lane = lane_id();
    if (t >= tokens) return;
    const long choice = long(t) * top_k + lane;
    const int id = lane < top_k ? ids[choice] : -1;
    const unsigned dropped = __ballot_sync(ALL, id >= 0 && kept[choice] < 0);
    int wish = -1;
    if (dropped) {
        float x[P];
        unsigned keys[P];
        load_row(scores + long(t) * experts, experts, 0.0f, x);
#pragma unroll
        for (int i = 0; i < P; i++) {
            const int e = i * WARP + lane;
            keys[i] = e < experts && room[e] > 0 ? order_key(x[i]) : NO_KEY;
        }
        for (int j = 0; j < top_k; j++) {
            const int own = __shfl_sync(ALL, id, j);
#pragma unroll
            for (int i = 0; i < P; i++)
                if (i * WARP + lane == own) keys[i] = NO_KEY;
        }
        for (int j = 0; j < top_k; j++) {
            if (!(dropped >> j & 1)) continue;
            unsigned left = NO_KEY;
#pragma unroll
            for (int i = 0; i < P; i++) left = max(left, keys[i]);
            if (!__any_sync(ALL, left != NO_KEY)) break;
            const int best = take_best(keys);
            if (lane == j) wish = best;
        }
    }
    if (lane < top_k) wishes[choice] = wish;
}

extern "C" __global__ void __launch_bounds__(WIDE) reroute_take(int choices, int* room, const int* wishes, int* ids, int* kept) {
    __shared__ int askers[WARP];
    const int expert = blockIdx.x, lane = lane_id(), warp = warp_id();
    int left = room[expert];
    for (int first = 0; first < choices && left > 0; first += WIDE) {
        const int i = first + threadIdx.x;
        const bool asks = i < choices && wishes[i] == expert;
        const unsigned beside = __ballot_sync(ALL, asks);
        __syncthreads();
        if (lane == 0) askers[warp] = __popc(beside);
        __syncthreads();
        const int of_warp = askers[lane];
        const int before = warp_sum(lane < warp ? of_warp : 0) + __popc(beside & ((1u << lane) - 1));
        if (asks && before < left) ids[i] = kept[i] = expert;
        left -= warp_sum(of_warp);
    }
    if (threadIdx.x == 0) room[expert] = max(left, 0);
}

#define SIZED(P)                                                                                                           \
    extern "C" __global__ void __launch_bounds__(THREADS)                                                                  \
        reroute_wish_##P(int tokens, int experts, int top_k, const float* scores, const int* room, const int* ids,         \
                         const int* kept, int* wishes) {                                                                   \
        reroute_wish<P>(tokens, experts, top_k, scores, room, ids, kept, wishes);                                          \
    }
SIZED(1)
SIZED(2)
SIZED(4)
SIZED(8)
SIZED(16)
