// SwiGLU's arithmetic, for every kernel that has gate and up at hand.

#pragma once

#include "common.cuh"

// 1/(1 + e^−x). Within a few units of the last place, 0 and 1 far out.
__device__ __forceinline__ float sigmoid(float x) {
    float y;
    asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(1.0f + fast_exp2(-x * LOG2_E)));
    return y;
}

__device__ __forceinline__ float swiglu(float gate, float up) { return gate * sigmoid(gate) * up; }

// With s = sigmoid(g): d(g·s)/dg = s + g·s·(1 − s).
__device__ __forceinline__ void swiglu_slopes(float gate, float up, float da, float& dgate, float& dup) {
    const float s = sigmoid(gate), das = da * s;
    dup = gate * das;
    dgate = up * (das + dup * (1.0f - s));
}
