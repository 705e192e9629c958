// What dense layers need around cuBLASLt's products.
//
// bias_rows    y[m, n] = bias[n], which the product is then added to            (DenseOps::linear with a bias)
// split_rows   out[m, P] bf16 = [hi | lo | 0] of dy[m, n] f32                   (DenseOps::linear_f32_grad_*)
// stack_twice  out[P, K] bf16 = [w; w; 0] of w[n, K]                            (DenseOps::linear_f32_grad_input)
// add_halves   dw[n, K] += s[..n, :] + s[n..2n, :], s [P, K] f32                (DenseOps::linear_f32_grad_weight)
//
// A tensor core multiplies bf16 only, and an f32 gradient rounded to bf16 would lose the router's small differences. So it goes in two
// parts: hi = bf16(x), lo = bf16(x − hi). x − hi is exact, so hi + lo is x to 16 bits of mantissa (relative error 2⁻¹⁷), and one product
// over both parts, accumulated in f32, is the product of x. P is 2n rounded up to 8, so that rows stay on 16 bytes.
// Bound: memory; small beside the product.

#include "pack.cuh"

constexpr int THREADS = 256;

template <typename Act> __device__ void body_bias_rows(long rows, int columns, const Act* bias, Act* y) {
    for (long i = flat_thread(); i < rows * columns; i += flat_threads()) y[i] = bias[i % columns];
}

#define BIAS_ROWS(Act) long rows, int columns, const Act *bias, Act *y
BOTH(bias_rows, THREADS, BIAS_ROWS, (rows, columns, bias, y))

template <int V> __device__ void split(long rows, int columns, int padded, const float* dy, bf16* out) {
    const int packs = columns / V, rest = padded - 2 * columns;
    for (long i = flat_thread(); i < rows * packs; i += flat_threads()) {
        const long row = i / packs;
        const int c = int(i - row * packs) * V;
        const Pack<float, V> x = load<V>(dy + row * columns + c);
        Pack<bf16, V> hi, lo;
#pragma unroll
        for (int e = 0; e < V; ++e) hi.v[e] = from_f32<bf16>(x.v[e]), lo.v[e] = from_f32<bf16>(x.v[e] - to_f32(hi.v[e]));
        bf16* to = out + row * padded + c;
        store(to, hi), store(to + columns, lo);
    }
    for (long i = flat_thread(); i < rows * rest; i += flat_threads())
        out[i / rest * padded + 2 * columns + i % rest] = from_f32<bf16>(0.0f);
}

extern "C" __global__ void __launch_bounds__(THREADS) split_rows(long rows, int columns, int padded, const float* dy, bf16* out) {
    const bool whole = columns % 4 == 0 && (reinterpret_cast<uintptr_t>(dy) | reinterpret_cast<uintptr_t>(out)) % 16 == 0;
    whole ? split<4>(rows, columns, padded, dy, out) : split<1>(rows, columns, padded, dy, out);
}

extern "C" __global__ void __launch_bounds__(THREADS) stack_twice(int rows, int padded, long width, const bf16* w, bf16* out) {
    const long half = rows * width;
    for (long i = flat_thread(); i < padded * width; i += flat_threads()) {
        out[i] = i < 2 * half ? w[i < half ? i : i - half] : from_f32<bf16>(0.0f);
    }
}

extern "C" __global__ void __launch_bounds__(THREADS) add_halves(long n, const float* s, float* dw) {
    for (long i = flat_thread(); i < n; i += flat_threads()) dw[i] += s[i] + s[n + i];
}
