// SiLU and what SwiGLU's backward pass needs of it, in f32.
//
// bf16 tensors take the short exponential and division, whose errors of a few 1e-7 vanish in rounding; f32 ones the exact, so that
// they agree with the CPU.

#pragma once

#include "common.cuh"

// 1 / (1 + e⁻ˣ).
template <typename Act> __device__ __forceinline__ float sigmoid(float x);
template <> __device__ __forceinline__ float sigmoid<float>(float x) { return 1.0f / (1.0f + expf(-x)); }
template <> __device__ __forceinline__ float sigmoid<bf16>(float x) { return __fdividef(1.0f, 1.0f + __expf(-x)); }

// x · sigmoid(x).
template <typename Act> __device__ __forceinline__ float silu(float x) { return x * sigmoid<Act>(x); }

// The derivative of silu where its sigmoid is known.
__device__ __forceinline__ float silu_slope(float x, float sigmoid_of_x) {
    return sigmoid_of_x * (1.0f + x * (1.0f - sigmoid_of_x));
}
