// GELU's arithmetic, x · Φ(x), for every kernel that has x at hand.

#pragma once

// The standard normal distribution's function and density: Φ within 3e-7 (Abramowitz and Stegun 7.1.26), as on the CPU.
__device__ __forceinline__ float normal(float x, float& density) {
    const float t = __fdividef(1.0f, 1.0f + 0.3275911f * 0.70710678f * fabsf(x)), e = __expf(-0.5f * x * x);
    float p = 1.0614054f;
    p = p * t - 1.453152f;
    p = p * t + 1.4214137f;
    p = p * t - 0.28449673f;
    p = p * t + 0.2548296f;
    const float tail = 0.5f * p * t * e;
    density = 0.3989423f * e;
    return x < 0.0f ? tail : 1.0f - tail;
}

__device__ __forceinline__ float gelu(float x) {
    float density;
    return x * normal(x, density);
}
