// SwiGLU's arithmetic, for every kernel that has gate and up at hand.

#pragma once

// 1/(1 + e^−x). Within a few units of the last place, 0 and 1 far out. By the special functions as they are: what the compiler's own forms
// spend on subnormal numbers is two thirds of the arithmetic.
__device__ __forceinline__ float sigmoid(float x) {
    float e, s;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(e) : "f"(-1.4426950408889634f * x));
    asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(s) : "f"(1.0f + e));
    return s;
}

__device__ __forceinline__ float swiglu(float gate, float up) { return gate * sigmoid(gate) * up; }

// With s = sigmoid(g) and t = g·s: dt/dg = s·(1 + g·(1 − s)) = s + t − t·s.
__device__ __forceinline__ void swiglu_slopes(float gate, float up, float da, float& dgate, float& dup) {
    const float s = sigmoid(gate), t = gate * s;
    dup = da * t;
    dgate = da * up * fmaf(-t, s, s + t);
}
