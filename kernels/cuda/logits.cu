// A router's logits before the gate: rows that fold into one, random factors, noise.                          (ops/logits.rs)
//
// fold_groups: raw [T, G + E] f32 → logits [T, E]: raw_e − lse(e's group) + raw_g − lse(groups). fold_groups_grad: dlogits → draw.
// fold_routers: raw [T, R·E], tags [T] → logits [T, E]: the row of the token's tag. fold_routers_grad: dlogits → draw, 0 elsewhere.
// random_factors: y[n] = x[n] · r, or y += x · r; r from splitmix64 of the element's place: the CPU's numbers to the bit.
// random_numbers: y[n] f32 uniform from the same numbers, or normal from two of them each (Box–Muller).
// One warp a token; lanes over a group's experts, ascending, then a butterfly. Bound: memory. Bytes = 4·T·(width + E), 4·T·(2·width + E),
// 2 or 3 elements each, 4·n; small beside the router's product.

#include "choice.cuh"

constexpr int THREADS = 256;
constexpr int WARPS = THREADS / WARP;

__device__ __forceinline__ float log_sum_exp(const float* x, int n) {
    float most = -INFINITY, sum = 0.0f;
    for (int i = lane_id(); i < n; i += WARP) most = fmaxf(most, x[i]);
    most = warp_max(most);
    for (int i = lane_id(); i < n; i += WARP) sum += expf(x[i] - most);
    return most + logf(warp_sum(sum));
}

extern "C" __global__ void __launch_bounds__(THREADS) fold_groups(int tokens, int experts, int groups, const float* raw, float* logits) {
    const int t = blockIdx.x * WARPS + warp_id(), size = experts / groups;
    if (t >= tokens) return;
    raw += long(t) * (groups + experts), logits += long(t) * experts;
    const float all = log_sum_exp(raw, groups);
    for (int g = 0; g < groups; g++) {
        const float* members = raw + groups + g * size;
        const float shift = raw[g] - all - log_sum_exp(members, size);
        for (int i = lane_id(); i < size; i += WARP) logits[g * size + i] = members[i] + shift;
    }
}

extern "C" __global__ void __launch_bounds__(THREADS)
    fold_groups_grad(int tokens, int experts, int groups, const float* raw, const float* dlogits, float* draw) {
    const int t = blockIdx.x * WARPS + warp_id(), size = experts / groups;
    if (t >= tokens) return;
    raw += long(t) * (groups + experts), draw += long(t) * (groups + experts), dlogits += long(t) * experts;
    const float all = log_sum_exp(raw, groups);
    float total = 0.0f;
    for (int e = lane_id(); e < experts; e += WARP) total += dlogits[e];
    total = warp_sum(total);
    for (int g = 0; g < groups; g++) {
        const float *members = raw + groups + g * size, *d = dlogits + g * size;
        const float lse = log_sum_exp(members, size);
        float sum = 0.0f;
        for (int i = lane_id(); i < size; i += WARP) sum += d[i];
        sum = warp_sum(sum);
        for (int i = lane_id(); i < size; i += WARP) draw[groups + g * size + i] = d[i] - expf(members[i] - lse) * sum;
        if (lane_id() == 0) draw[g] = sum - expf(raw[g] - all) * total;
    }
}

extern "C" __global__ void __launch_bounds__(THREADS)
    fold_routers(int tokens, int experts, int routers, const float* raw, const int* tags, float* logits) {
    const int t = blockIdx.x * WARPS + warp_id();
    if (t >= tokens) return;
    raw += (long(t) * routers + tags[t]) * experts;
    for (int e = lane_id(); e < experts; e += WARP) logits[long(t) * experts + e] = raw[e];
}

extern "C" __global__ void __launch_bounds__(THREADS)
    fold_routers_grad(int tokens, int experts, int routers, const int* tags, const float* dlogits, float* draw) {
    const int t = blockIdx.x * WARPS + warp_id();
    if (t >= tokens) return;
    draw += long(t) * routers * experts;
    for (int r = 0; r < routers; r++)
        for (int e = lane_id(); e < experts; e += WARP)
            draw[r * experts + e] = r == tags[t] ? dlogits[long(t) * experts + e] : 0.0f;
}

// The place's number: 24 bits in [0, 1).
__device__ __forceinline__ float uniform(unsigned long long seed, unsigned long long place) {
    unsigned long long x = seed + (place + 1) * 0x9e3779b97f4a7c15ull;
    x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9ull;
    x = (x ^ (x >> 27)) * 0x94d049bb133111ebull;
    return float((x ^ (x >> 31)) >> 40) * (1.0f / (1 << 24));
}

template <typename Act>
__device__ void body_random_factors(long n, unsigned long long seed, unsigned long long first, int dropout, float size, int add,
                                    const Act* x, Act* y) {
    for (long i = blockIdx.x * long(THREADS) + threadIdx.x; i < n; i += gridDim.x * long(THREADS)) {
        const float u = uniform(seed, first + i);
        // As the CPU rounds, without fused multiplications.
        const float factor =
            dropout ? (u < size ? 0.0f : 1.0f / (1.0f - size)) : __fadd_rn(1.0f - size, __fmul_rn(2.0f * size, u));
        const float value = __fmul_rn(to_f32(x[i]), factor);
        y[i] = from_f32<Act>(add ? to_f32(y[i]) + value : value);
    }
}

#define PARAMS(Act) long n, unsigned long long seed, unsigned long long first, int dropout, float size, int add, const Act *x, Act *y
BOTH(random_factors, THREADS, PARAMS, (n, seed, first, dropout, size, add, x, y))

extern "C" __global__ void __launch_bounds__(THREADS)
    random_numbers(long n, unsigned long long seed, unsigned long long first, int normal, float deviation, float* y) {
    for (long i = blockIdx.x * long(THREADS) + threadIdx.x; i < n; i += gridDim.x * long(THREADS)) {
        if (!normal) {
            y[i] = uniform(seed, first + i);
            continue;
        }
        const float radius = sqrtf(-2.0f * logf(1.0f - uniform(seed, 2 * (first + i))));
        y[i] = deviation * (radius * cosf(6.2831853f * uniform(seed, 2 * (first + i) + 1)));
    }
}
