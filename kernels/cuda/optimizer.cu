// AdamW (Loshchilov and Hutter 2019), one fused pass over a parameter and its state.           (OptimizerOps::adamw)
//
// grad, m, v, master f32, compute bf16 or f32, all [n]; the gradient is scaled by the clipping factor and left zero. Without a master
// (null) the f32 compute copy is updated itself. Element by element, so the order of nothing matters.
// Bound: memory. Bytes of an element: 8 each for gradient, m, v and master, read and written; 2 for a bf16 compute copy, written.

#include "pack.cuh"

constexpr int THREADS = 256, V = 4;

// The factors of one step, worked out by the host in f64.
struct Step {
    float grad_scale, keep, beta1_rest, beta2, beta2_rest, root_correction, eps, rate;
};

__device__ __forceinline__ float updated(const Step& s, float grad, float& m, float& v, float weight) {
    const float g = grad * s.grad_scale;
    m += (g - m) * s.beta1_rest;
    v = v * s.beta2 + g * g * s.beta2_rest;
    return weight * s.keep - s.rate * m / (sqrtf(v) * s.root_correction + s.eps);
}

template <typename Act, int N> __device__ __forceinline__ void update(const Step& s, long i, float* grad, float* m, float* v, float* master, Act* compute) {
    Pack<float, N> g = load<N>(grad + i), a = load<N>(m + i), b = load<N>(v + i), w;
    Pack<Act, N> c;
    if (master) {
        w = load<N>(master + i);
    } else {
        c = load<N>(compute + i);
#pragma unroll
        for (int e = 0; e < N; ++e) w.v[e] = to_f32(c.v[e]);
    }
#pragma unroll
    for (int e = 0; e < N; ++e) {
        w.v[e] = updated(s, g.v[e], a.v[e], b.v[e], w.v[e]);
        g.v[e] = 0.0f, c.v[e] = from_f32<Act>(w.v[e]);
    }
    store(grad + i, g), store(m + i, a), store(v + i, b), store(compute + i, c);
    if (master) store(master + i, w);
}

template <typename Act> __device__ void body_adamw(Step step, Cut cut, float* grad, float* m, float* v, float* master, Act* compute) {
    for (long i = flat_thread(); i < cut.packs; i += flat_threads()) {
        update<Act, V>(step, cut.head + i * V, grad, m, v, master, compute);
    }
    for (long r = flat_thread(); r < cut.outside(V); r += flat_threads()) {
        update<Act, 1>(step, cut.index(r, V), grad, m, v, master, compute);
    }
}

#define ADAMW(Act) Step step, Cut cut, float *grad, float *m, float *v, float *master, Act *compute
BOTH(adamw, THREADS, ADAMW, (step, cut, grad, m, v, master, compute))
