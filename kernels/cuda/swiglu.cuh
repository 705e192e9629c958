// SwiGLU's arithmetic, for every kernel that has gate and up at hand.

#pragma once

// 1/(1 + e^−x). Within a few units of the last place, 0 and 1 far out.
__device__ __forceinline__ float sigmoid(float x) { return __fdividef(1.0f, 1.0f + __expf(-x)); }

__device__ __forceinline__ float swiglu(float gate, float up) { return gate * sigmoid(gate) * up; }

// With s = sigmoid(g): d(g·s)/dg = s·(1 + g·(1 − s)).
__device__ __forceinline__ void swiglu_slopes(float gate, float up, float da, float& dgate, float& dup) {
    const float s = sigmoid(gate);
    dup = da * gate * s;
    dgate = da * up * s * (1.0f + gate * (1.0f - s));
}
