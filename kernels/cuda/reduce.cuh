// The weighted sum of a row's slots by one warp, in f32 and ascending order.

#pragma once

#include "pack.cuh"

// out = Σ_j weights[j] · y[slots[j]] over the j < k ≤ 32 whose slot is not −1; no weights: all 1. Slots that are none are left out before
// anything is loaded, and two packs of two slots are in flight: rows have few slots where experts are on several ranks. All lanes of the
// warp call it.
template <typename Act, int N>
__device__ __forceinline__ void reduce_row(int k, int width, const int* slots, const float* weights, const Act* y, Act* out) {
    constexpr unsigned ALL = 0xffffffffu;
    constexpr int PACKS = 2, SLOTS = 2;
    const int lane = threadIdx.x % WARP, packs = width / N;
    int slot = -1;
    float weight = 0.0f;
    if (lane < k) {
        slot = slots[lane];
        if (slot >= 0) weight = weights ? weights[lane] : 1.0f;
    }
    const unsigned held = __ballot_sync(ALL, slot >= 0);
    for (int first = lane; first - lane < packs; first += PACKS * WARP) {
        float sum[PACKS][N] = {};
        for (unsigned left = held; left != 0;) {
            Pack<Act, N> got[SLOTS][PACKS];
            float factor[SLOTS];
#pragma unroll
            for (int s = 0; s < SLOTS; s++) {
                const bool any = left != 0;
                const int j = any ? __ffs(left) - 1 : 0, from = __shfl_sync(ALL, slot, j);
                factor[s] = __shfl_sync(ALL, weight, j);
                if (!any) factor[s] = 0.0f;
                left &= left - 1;
#pragma unroll
                for (int p = 0; p < PACKS; p++) {
                    got[s][p] = {};
                    if (any && first + p * WARP < packs) got[s][p] = load_once<N>(y + long(from) * width + (first + p * WARP) * N);
                }
            }
#pragma unroll
            for (int s = 0; s < SLOTS; s++)
#pragma unroll
                for (int p = 0; p < PACKS; p++)
#pragma unroll
                    for (int c = 0; c < N; c++) sum[p][c] += factor[s] * to_f32(got[s][p].v[c]);
        }
#pragma unroll
        for (int p = 0; p < PACKS; p++) {
            if (first + p * WARP >= packs) continue;
            Pack<Act, N> total;
#pragma unroll
            for (int c = 0; c < N; c++) total.v[c] = from_f32<Act>(sum[p][c]);
            store_once<N>(out + (first + p * WARP) * N, total);
        }
    }
}
