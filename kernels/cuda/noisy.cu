// Noisy top-k gating (Shazeer et al. 2017): the perturbed logits, the smooth load, and their backward pass.    (ops/routing.rs)
//
// noisy_logits: clean, raw, noise [T, E] f32 → noisy [T, E] f32, and per stretch of 32 tokens Σ Φ((clean − threshold)/std) [·, E] f64, which
//   sum_stretches (statistics.cu) adds up in order. noisy_logits_grad: also noisy, dnoisy [T, E], dload [E] → dclean, draw [T, E].
// The threshold of an expert is the k-th highest of the others' noisy logits: that of the last chosen, or for the chosen the
// next one. Margins, Φ and gradients in f64. E ≤ 512.
// Bound: f64 arithmetic; written for exactness, one warp a token.

#include "choice.cuh"

constexpr int THREADS = 256;
constexpr int WARPS = THREADS / WARP;
constexpr int STRETCH = 32;
// Rows of up to 512 experts.
constexpr int P = 16;
constexpr float LEAST_STD = 0.01f;

__device__ __forceinline__ float deviation(float raw) { return fmaxf(raw, 0.0f) + log1pf(expf(-fabsf(raw))) + LEAST_STD; }

struct Thresholds {
    // Which of the lane's experts are chosen, as bits.
    unsigned chosen;
    // The experts whose noisy logits are the thresholds: of those that are not chosen, of those that are.
    int outside, inside;
    float outside_value, inside_value;

    __device__ float of(int i) const { return chosen >> i & 1 ? inside_value : outside_value; }
};

__device__ Thresholds thresholds(int experts, int top_k, const float (&noisy)[P]) {
    unsigned keys[P];
#pragma unroll
    for (int i = 0; i < P; i++) keys[i] = i * WARP + lane_id() < experts ? order_key(noisy[i]) : NO_KEY;
    Thresholds found = {};
    for (int j = 0; j < top_k; j++) {
        found.outside = take_best(keys);
        if (found.outside % WARP == lane_id()) found.chosen |= 1u << found.outside / WARP;
    }
    found.inside = take_best(keys);
    found.outside_value = value_of(noisy, found.outside);
    found.inside_value = value_of(noisy, found.inside);
    return found;
}

extern "C" __global__ void __launch_bounds__(THREADS)
    noisy_logits(int tokens, int experts, int top_k, const float* clean, const float* raw, const float* noise, float* noisy,
                 double* load) {
    __shared__ double sums[WARPS][P * WARP];
    const int warp = warp_id(), lane = lane_id(), first = blockIdx.x * STRETCH;
    double sum[P] = {};
    for (int t = first + warp; t < min(first + STRETCH, tokens); t += WARPS) {
        const long row = long(t) * experts;
        float c[P], std[P], x[P];
        load_row(clean + row, experts, 0.0f, c);
        load_row(raw + row, experts, 0.0f, std);
        load_row(noise + row, experts, 0.0f, x);
#pragma unroll
        for (int i = 0; i < P; i++) {
            std[i] = deviation(std[i]);
            x[i] = c[i] + x[i] * std[i];
        }
        store_row(noisy + row, experts, x);
        if (top_k == experts) {
#pragma unroll
            for (int i = 0; i < P; i++) sum[i] += 1.0;
            continue;
        }
        const Thresholds limits = thresholds(experts, top_k, x);
#pragma unroll
        for (int i = 0; i < P; i++)
            if (i * WARP + lane < experts) sum[i] += normcdf((double(c[i]) - double(limits.of(i))) / double(std[i]));
    }
#pragma unroll
    for (int i = 0; i < P; i++) sums[warp][i * WARP + lane] = sum[i];
    __syncthreads();
    for (int e = threadIdx.x; e < experts; e += THREADS) {
        double total = 0.0;
        for (int w = 0; w < WARPS; w++) total += sums[w][e];
        load[long(blockIdx.x) * experts + e] = total;
    }
}

// With z = (clean − threshold)/std: what a load's gradient makes of clean, and −z times it of std.
__device__ __forceinline__ double load_slope(float clean, float threshold, double std, float dload, double& dstd) {
    const double z = (double(clean) - double(threshold)) / std;
    const double slope = double(dload) * exp(-0.5 * z * z) * 0.39894228040143267794 / std;
    // Far from its threshold an expert has no slope; 0 · ∞ must not become NaN.
    dstd = slope == 0.0 ? 0.0 : -slope * z;
    return slope;
}

// A threshold is a noisy logit, which hands the gradient it gets on to its own clean logit and std.
extern "C" __global__ void __launch_bounds__(THREADS)
    noisy_logits_grad(int tokens, int experts, int top_k, const float* clean, const float* raw, const float* noise,
                      const float* noisy, const float* dnoisy, const float* dload, float* dclean, float* draw) {
    const int t = blockIdx.x * WARPS + warp_id(), lane = lane_id();
    if (t >= tokens) return;
    const long row = long(t) * experts;
    float x[P];
    load_row(noisy + row, experts, 0.0f, x);
    const bool bounded = top_k < experts;
    const Thresholds limits = bounded ? thresholds(experts, top_k, x) : Thresholds{};
    double inside = 0.0, outside = 0.0, dstd;
    for (int i = 0; bounded && i < P; i++) {
        const int e = i * WARP + lane;
        if (e >= experts) continue;
        const double slope = load_slope(clean[row + e], limits.of(i), deviation(raw[row + e]), dload[e], dstd);
        (limits.chosen >> i & 1 ? inside : outside) -= slope;
    }
    inside = warp_sum(inside);
    outside = warp_sum(outside);
    for (int i = 0; i < P; i++) {
        const int e = i * WARP + lane;
        if (e >= experts) continue;
        double slope = 0.0, through = dnoisy[row + e];
        dstd = 0.0;
        if (bounded) {
            slope = load_slope(clean[row + e], limits.of(i), deviation(raw[row + e]), dload[e], dstd);
            if (e == limits.inside) through += inside;
            if (e == limits.outside) through += outside;
        }
        dclean[row + e] = float(slope + through);
        draw[row + e] = float((dstd + through * noise[row + e]) / (1.0 + exp(-double(raw[row + e]))));
    }
}
