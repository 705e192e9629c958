// One warp's row of E numbers in registers, and the choice of its highest.
//
// Lane l holds expert i·32 + l in place i of P; P·32 ≥ E. P is a template argument so that rows stay in registers.

#pragma once

#include "common.cuh"

constexpr unsigned ALL = 0xffffffffu;

__device__ __forceinline__ int lane_id() { return threadIdx.x % WARP; }
__device__ __forceinline__ int warp_id() { return threadIdx.x / WARP; }

// A row of memory; `missing` in the places beyond E.
template <int P> __device__ __forceinline__ void load_row(const float* row, int experts, float missing, float (&x)[P]) {
#pragma unroll
    for (int i = 0; i < P; i++) {
        const int e = i * WARP + lane_id();
        x[i] = e < experts ? row[e] : missing;
    }
}

template <int P> __device__ __forceinline__ void store_row(float* row, int experts, const float (&x)[P]) {
#pragma unroll
    for (int i = 0; i < P; i++) {
        const int e = i * WARP + lane_id();
        if (e < experts) row[e] = x[i];
    }
}

template <int P> __device__ __forceinline__ float row_sum(const float (&x)[P]) {
    float sum = 0.0f;
#pragma unroll
    for (int i = 0; i < P; i++) sum += x[i];
    return warp_sum(sum);
}

// The highest, at least `least`; NaN is passed over.
template <int P> __device__ __forceinline__ float row_max(const float (&x)[P], float least) {
    float most = least;
#pragma unroll
    for (int i = 0; i < P; i++) most = fmaxf(most, x[i]);
    return warp_max(most);
}

// Places already taken, or beyond E.
constexpr unsigned NO_KEY = 0;

// Unsigned numbers in the order of choice: as the floats, −0 like 0, NaN below all of them; never NO_KEY.
__device__ __forceinline__ unsigned order_key(float x) {
    if (x != x) return 1;
    const unsigned bits = __float_as_uint(x + 0.0f);
    return bits >> 31 ? ~bits : bits | 0x80000000u;
}

// The expert of the highest key, the lowest of equal ones; its key becomes NO_KEY. The same in every lane.
template <int P> __device__ __forceinline__ int take_best(unsigned (&keys)[P]) {
    unsigned best = NO_KEY;
#pragma unroll
    for (int i = 0; i < P; i++) best = max(best, keys[i]);
    best = __reduce_max_sync(ALL, best);
    unsigned expert = ALL;
#pragma unroll
    for (int i = P - 1; i >= 0; i--)
        if (keys[i] == best) expert = i * WARP + lane_id();
    expert = __reduce_min_sync(ALL, expert);
#pragma unroll
    for (int i = 0; i < P; i++)
        if (i * WARP + lane_id() == expert) keys[i] = NO_KEY;
    return expert;
}

// The value of one expert, in every lane.
template <int P> __device__ __forceinline__ float value_of(const float (&x)[P], int expert) {
    float value = 0.0f;
#pragma unroll
    for (int i = 0; i < P; i++)
        if (i == expert / WARP) value = x[i];
    return __shfl_sync(ALL, value, expert % WARP);
}
