// Element-wise layers, computed in f32 and rounded once.
//
// add                y[n] += x[n]                                               (DenseOps::add, DenseOps::add_f32)
// activation         y[n] = f(x), f by its number: relu, gelu, silu, tanh          (DenseOps::activation)
// activation_grad    dx[n] = dy · f'(x)                                          (DenseOps::activation_grad)
// swiglu             a[rows, F] = silu(h[:, ..F]) · h[:, F..], h [rows, 2F]      (DenseOps::swiglu)
// swiglu_grad        dh[rows, 2F] from da[rows, F] and h                        (DenseOps::swiglu_grad)
// sigmoid_gate       out[T, H] += sigmoid(gate[T]) · shared[T, H], gate f32     (DenseOps::sigmoid_gate)
// sigmoid_gate_grad  dshared[T, H] = sigmoid(gate) · dout; dgate[T] f32 = ⟨dout, shared⟩ · s(1 − s)   (DenseOps::sigmoid_gate_grad)
//
// Rows from `*live` on are neither read nor written. The one sum, dgate, is one warp's: each lane over its packs ascending, then a
// butterfly. Bound: memory; in packs of 16 bytes, bytes = 3n, 2n, 3n, 3·rows·F, 5·rows·F, 3·T·H, 3·T·H elements. `packed` is 0 where rows are
// not whole packs: then element by element.

#include "gelu.cuh"
#include "pack.cuh"
#include "swiglu.cuh"

constexpr int THREADS = 256;

// One pack of each operand a thread and turn: at full occupancy the loads of 2048 threads are more than the memory's latency needs.
template <typename Act> __device__ void body_add(const Act* x, Act* y, Cut cut) {
    constexpr int V = FULL<Act>;
    for (long i = flat_thread(); i < cut.packs; i += flat_threads()) {
        const Pack<Act, V> a = load<V>(x + cut.head + i * V);
        Pack<Act, V> b = load<V>(y + cut.head + i * V);
#pragma unroll
        for (int e = 0; e < V; ++e) b.v[e] = from_f32<Act>(to_f32(b.v[e]) + to_f32(a.v[e]));
        store(y + cut.head + i * V, b);
    }
    for (long r = flat_thread(); r < cut.outside(V); r += flat_threads()) {
        const long i = cut.index(r, V);
        y[i] = from_f32<Act>(to_f32(y[i]) + to_f32(x[i]));
    }
}

// Numbers as in kernels/src/cuda/dense.rs. Comparisons let NaN through.
enum Kind { RELU, GELU, SILU, TANH };

template <Kind K> __device__ __forceinline__ float activated(float x) {
    if constexpr (K == RELU) return x < 0.0f ? 0.0f : x;
    if constexpr (K == GELU) return gelu(x);
    if constexpr (K == SILU) return x * sigmoid(x);
    return tanhf(x);
}

// dy · f'(x). Of x·s with s = sigmoid(x): s·(1 + x·(1 − s)).
template <Kind K> __device__ __forceinline__ float sloped(float x, float dy) {
    if constexpr (K == RELU) return x <= 0.0f ? 0.0f : dy;
    if constexpr (K == TANH) {
        const float t = tanhf(x);
        return dy * (1.0f - t * t);
    }
    if constexpr (K == GELU) {
        float density;
        const float below = normal(x, density);
        return dy * (below + x * density);
    }
    const float s = sigmoid(x);
    return dy * (s * (1.0f + x * (1.0f - s)));
}

template <Kind K, typename Act> __device__ void activate(const Act* x, Act* y, Cut cut) {
    constexpr int V = FULL<Act>;
    for (long i = flat_thread(); i < cut.packs; i += flat_threads()) {
        Pack<Act, V> a = load<V>(x + cut.head + i * V);
#pragma unroll
        for (int e = 0; e < V; ++e) a.v[e] = from_f32<Act>(activated<K>(to_f32(a.v[e])));
        store(y + cut.head + i * V, a);
    }
    for (long r = flat_thread(); r < cut.outside(V); r += flat_threads()) {
        const long i = cut.index(r, V);
        y[i] = from_f32<Act>(activated<K>(to_f32(x[i])));
    }
}

template <Kind K, typename Act> __device__ void activate_grad(const Act* x, const Act* dy, Act* dx, Cut cut) {
    constexpr int V = FULL<Act>;
    for (long i = flat_thread(); i < cut.packs; i += flat_threads()) {
        const Pack<Act, V> a = load<V>(x + cut.head + i * V);
        Pack<Act, V> d = load<V>(dy + cut.head + i * V);
#pragma unroll
        for (int e = 0; e < V; ++e) d.v[e] = from_f32<Act>(sloped<K>(to_f32(a.v[e]), to_f32(d.v[e])));
        store(dx + cut.head + i * V, d);
    }
    for (long r = flat_thread(); r < cut.outside(V); r += flat_threads()) {
        const long i = cut.index(r, V);
        dx[i] = from_f32<Act>(sloped<K>(to_f32(x[i]), to_f32(dy[i])));
    }
}

template <typename Act> __device__ void body_activation(int kind, const Act* x, Act* y, Cut cut) {
    switch (kind) {
    case RELU: return activate<RELU>(x, y, cut);
    case GELU: return activate<GELU>(x, y, cut);
    case SILU: return activate<SILU>(x, y, cut);
    default: return activate<TANH>(x, y, cut);
    }
}

template <typename Act> __device__ void body_activation_grad(int kind, const Act* x, const Act* dy, Act* dx, Cut cut) {
    switch (kind) {
    case RELU: return activate_grad<RELU>(x, dy, dx, cut);
    case GELU: return activate_grad<GELU>(x, dy, dx, cut);
    case SILU: return activate_grad<SILU>(x, dy, dx, cut);
    default: return activate_grad<TANH>(x, dy, dx, cut);
    }
}

template <typename Act, int V> __device__ void swiglu_rows(int rows, int f, const Act* h, Act* a) {
    const unsigned per_row = f / V;
    const long items = long(rows) * per_row;
    for (long i = flat_thread(); i < items; i += flat_threads()) {
        // The row, by a division of 32 bits: the host keeps items below 2³².
        const Act* p = h + i * V + long(unsigned(i) / per_row) * f;
        const Pack<Act, V> gate = load<V>(p);
        Pack<Act, V> up = load<V>(p + f);
#pragma unroll
        for (int e = 0; e < V; ++e) up.v[e] = from_f32<Act>(swiglu(to_f32(gate.v[e]), to_f32(up.v[e])));
        store(a + i * V, up);
    }
}

template <typename Act, int V> __device__ void swiglu_grad_rows(int rows, int f, const Act* da, const Act* h, Act* dh) {
    const unsigned per_row = f / V;
    const long items = long(rows) * per_row;
    for (long i = flat_thread(); i < items; i += flat_threads()) {
        const long at = i * V + long(unsigned(i) / per_row) * f;
        Pack<Act, V> gate = load<V>(h + at), up = load<V>(h + at + f);
        const Pack<Act, V> slope = load<V>(da + i * V);
#pragma unroll
        for (int e = 0; e < V; ++e) {
            float dgate, dup;
            swiglu_slopes(to_f32(gate.v[e]), to_f32(up.v[e]), to_f32(slope.v[e]), dgate, dup);
            gate.v[e] = from_f32<Act>(dgate), up.v[e] = from_f32<Act>(dup);
        }
        store(dh + at, gate), store(dh + at + f, up);
    }
}

template <typename Act, int V> __device__ void gate_rows(int tokens, int h, const float* gate, const Act* shared, Act* out) {
    const unsigned per_row = h / V;
    const long items = long(tokens) * per_row;
    for (long i = flat_thread(); i < items; i += flat_threads()) {
        const Pack<Act, V> x = load<V>(shared + i * V);
        Pack<Act, V> y = load<V>(out + i * V);
        const float s = sigmoid(gate[unsigned(i) / per_row]);
#pragma unroll
        for (int e = 0; e < V; ++e) y.v[e] = from_f32<Act>(to_f32(y.v[e]) + s * to_f32(x.v[e]));
        store(out + i * V, y);
    }
}

// One warp a token.
template <typename Act, int V>
__device__ void gate_grad_rows(int tokens, int h, const Act* dout, const float* gate, const Act* shared, Act* dshared, float* dgate) {
    const int lane = threadIdx.x % WARP, packs = h / V;
    for (long t = flat_thread() / WARP; t < tokens; t += flat_threads() / WARP) {
        const float s = sigmoid(gate[t]);
        float dot = 0.0f;
        for (int i = lane; i < packs; i += WARP) {
            const long at = t * h + i * V;
            Pack<Act, V> dy = load<V>(dout + at);
            const Pack<Act, V> x = load<V>(shared + at);
#pragma unroll
            for (int e = 0; e < V; ++e) {
                const float d = to_f32(dy.v[e]);
                dot += d * to_f32(x.v[e]);
                dy.v[e] = from_f32<Act>(s * d);
            }
            store(dshared + at, dy);
        }
        dot = warp_sum(dot);
        if (lane == 0) dgate[t] = dot * s * (1.0f - s);
    }
}

template <typename Act> __device__ void body_swiglu(int bound, const int* live, int f, const Act* h, Act* a, int packed) {
    const int rows = live_rows(bound, live);
    packed ? swiglu_rows<Act, FULL<Act>>(rows, f, h, a) : swiglu_rows<Act, 1>(rows, f, h, a);
}

template <typename Act>
__device__ void body_swiglu_grad(int bound, const int* live, int f, const Act* da, const Act* h, Act* dh, int packed) {
    const int rows = live_rows(bound, live);
    packed ? swiglu_grad_rows<Act, FULL<Act>>(rows, f, da, h, dh) : swiglu_grad_rows<Act, 1>(rows, f, da, h, dh);
}

template <typename Act> __device__ void body_sigmoid_gate(int tokens, int h, const float* gate, const Act* shared, Act* out, int packed) {
    packed ? gate_rows<Act, FULL<Act>>(tokens, h, gate, shared, out) : gate_rows<Act, 1>(tokens, h, gate, shared, out);
}

template <typename Act>
__device__ void body_sigmoid_gate_grad(int tokens, int h, const Act* dout, const float* gate, const Act* shared, Act* dshared, float* dgate,
                               int packed) {
    packed ? gate_grad_rows<Act, FULL<Act>>(tokens, h, dout, gate, shared, dshared, dgate)
           : gate_grad_rows<Act, 1>(tokens, h, dout, gate, shared, dshared, dgate);
}

#define ADD(Act) const Act *x, Act *y, Cut cut
#define ACTIVATION(Act) int kind, const Act *x, Act *y, Cut cut
#define ACTIVATION_GRAD(Act) int kind, const Act *x, const Act *dy, Act *dx, Cut cut
#define SWIGLU(Act) int bound, const int *live, int f, const Act *h, Act *a, int packed
#define SWIGLU_GRAD(Act) int bound, const int *live, int f, const Act *da, const Act *h, Act *dh, int packed
#define GATE(Act) int tokens, int h, const float *gate, const Act *shared, Act *out, int packed
#define GATE_GRAD(Act)                                                                                                   \
    int tokens, int h, const Act *dout, const float *gate, const Act *shared, Act *dshared, float *dgate, int packed

BOTH(add, THREADS, ADD, (x, y, cut))
BOTH(activation, THREADS, ACTIVATION, (kind, x, y, cut))
BOTH(activation_grad, THREADS, ACTIVATION_GRAD, (kind, x, dy, dx, cut))
BOTH(swiglu, THREADS, SWIGLU, (bound, live, f, h, a, packed))
BOTH(swiglu_grad, THREADS, SWIGLU_GRAD, (bound, live, f, da, h, dh, packed))
BOTH(sigmoid_gate, THREADS, GATE, (tokens, h, gate, shared, out, packed))
BOTH(sigmoid_gate_grad, THREADS, GATE_GRAD, (tokens, h, dout, gate, shared, dshared, dgate, packed))
