// What all kernels share: number types, conversions, reductions inside a warp and a block, 16-byte rows.
//
// Every kernel is written once over its activation type and exported by BOTH as NAME_f32 and NAME_bf16, which the host looks up
// by name. Sums are in f32 or f64 and in a fixed order; there are no floating-point atomics anywhere.

#pragma once

#include <cuda_bf16.h>
#include <cstdint>

using bf16 = __nv_bfloat16;

constexpr int WARP = 32;

// Exports `template <typename Act> __device__ void body_NAME(params)` as two kernels, BOUND by threads or registers. PARAMS mentions Act;
// ARGS are the names alone.
#define BOTH_WITHIN(NAME, BOUND, PARAMS, ARGS)                                                                           \
    extern "C" __global__ void BOUND NAME##_f32(PARAMS(float)) { body_##NAME<float> ARGS; }                                \
    extern "C" __global__ void BOUND NAME##_bf16(PARAMS(bf16)) { body_##NAME<bf16> ARGS; }
#define BOTH(NAME, THREADS, PARAMS, ARGS) BOTH_WITHIN(NAME, __launch_bounds__(THREADS), PARAMS, ARGS)

__device__ __forceinline__ float to_f32(float x) { return x; }
__device__ __forceinline__ float to_f32(bf16 x) { return __bfloat162float(x); }

template <typename Act> __device__ __forceinline__ Act from_f32(float x);
template <> __device__ __forceinline__ float from_f32<float>(float x) { return x; }
template <> __device__ __forceinline__ bf16 from_f32<bf16>(float x) { return __float2bfloat16_rn(x); }

constexpr float LOG2_E = 1.4426950408889634f;

// 2^x to about 2 units in the last place; 2^−∞ = 0, and so is what would be subnormal: exp2f's other operations are for that.
__device__ __forceinline__ float fast_exp2(float x) {
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}

// 16 bytes of a row: 4 f32 or 8 bf16. Rows must start on 16 bytes.
template <typename Act> struct Vec {
    static constexpr int N = 16 / sizeof(Act);
    alignas(16) Act v[N];
};

template <typename Act> __device__ __forceinline__ Vec<Act> load16(const Act* p) {
    Vec<Act> r;
    *reinterpret_cast<uint4*>(r.v) = *reinterpret_cast<const uint4*>(p);
    return r;
}

// Read once, not worth keeping in the caches.
template <typename Act> __device__ __forceinline__ Vec<Act> load16_once(const Act* p) {
    Vec<Act> r;
    *reinterpret_cast<uint4*>(r.v) = __ldcs(reinterpret_cast<const uint4*>(p));
    return r;
}

template <typename Act> __device__ __forceinline__ void store16(Act* p, const Vec<Act>& r) {
    *reinterpret_cast<uint4*>(p) = *reinterpret_cast<const uint4*>(r.v);
}

// Sum over the 32 lanes, the same bits in each; a butterfly, so the order is fixed.
template <typename T> __device__ __forceinline__ T warp_sum(T x) {
#pragma unroll
    for (int d = WARP / 2; d > 0; d /= 2) x += __shfl_xor_sync(0xffffffffu, x, d);
    return x;
}

template <typename T> __device__ __forceinline__ T warp_max(T x) {
#pragma unroll
    for (int d = WARP / 2; d > 0; d /= 2) {
        T other = __shfl_xor_sync(0xffffffffu, x, d);
        x = other > x ? other : x;
    }
    return x;
}

// Sum over a block of at most 1024 threads, the same bits in every thread. All threads call it; `scratch` holds 32 values and may
// be used again after the next __syncthreads().
template <typename T> __device__ __forceinline__ T block_sum(T x, T* scratch) {
    const int lane = threadIdx.x % WARP, warp = threadIdx.x / WARP, warps = (blockDim.x + WARP - 1) / WARP;
    x = warp_sum(x);
    __syncthreads();
    if (lane == 0) scratch[warp] = x;
    __syncthreads();
    T total = lane < warps ? scratch[lane] : T(0);
    return warp_sum(total);
}

template <typename T> __device__ __forceinline__ T block_max(T x, T* scratch, T least) {
    const int lane = threadIdx.x % WARP, warp = threadIdx.x / WARP, warps = (blockDim.x + WARP - 1) / WARP;
    x = warp_max(x);
    __syncthreads();
    if (lane == 0) scratch[warp] = x;
    __syncthreads();
    T most = lane < warps ? scratch[lane] : least;
    return warp_max(most);
}

// A kernel that is launched early (cuda/launch.rs) has its blocks take their places as soon as those of the kernel before leave room, if
// that lets them, and waits here until that kernel is over and what it wrote can be read.
__device__ __forceinline__ void after_the_kernel_before() {
#if __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

__device__ __forceinline__ void let_the_next_kernel_begin() {
#if __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}

// The rows that count: `bound`, or fewer where the device knows the number.
__device__ __forceinline__ int live_rows(int bound, const int* count) { return count ? min(*count, bound) : bound; }
