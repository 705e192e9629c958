// Rotary embedding in place: (a, b) = (x[i], x[i + D/2]) → (a·cos − b·sin, b·cos + a·sin), in f32          (AttentionOps::rotary)
//
// qkv [T, W] f32 or bf16, of which the first `heads` heads of D turn (queries and keys); cos, sin [S, D/2] f32; the position of
// token t is t % S. `sign` −1 turns back. Each element is read and written by one thread: same bits every run.
// Bound: memory. Bytes = 2 · T · heads · D · (2 or 4): values are not touched; the angles stay in the caches.
// A thread turns N pairs: 16 bytes of either half where D/2 and the addresses allow it (rotary), otherwise one (rotary_single).

#include "common.cuh"

template <typename Act, int N>
__device__ void turn(Act* qkv, const float* cos, const float* sin, float sign, int tokens, int seq, int heads, int half, int64_t width) {
    const unsigned pieces = half / N, items = heads * pieces, all = unsigned(tokens) * items;
    for (unsigned i = blockIdx.x * blockDim.x + threadIdx.x; i < all; i += gridDim.x * blockDim.x) {
        const unsigned token = i / items, item = i % items, head = item / pieces, column = item % pieces * N;
        Act* first = qkv + token * width + int64_t(head) * 2 * half + column;
        const float* c = cos + int64_t(token % seq) * half + column;
        const float* s = sin + int64_t(token % seq) * half + column;
        if constexpr (N == 1) {
            const float a = to_f32(first[0]), b = to_f32(first[half]), turned = sign * s[0];
            first[0] = from_f32<Act>(a * c[0] - b * turned);
            first[half] = from_f32<Act>(b * c[0] + a * turned);
        } else {
            Vec<Act> low = load16(first), high = load16(first + half);
#pragma unroll
            for (int v = 0; v < N; v += 4) {
                const Vec<float> cosines = load16(c + v), sines = load16(s + v);
#pragma unroll
                for (int k = 0; k < 4; ++k) {
                    const float a = to_f32(low.v[v + k]), b = to_f32(high.v[v + k]), turned = sign * sines.v[k];
                    low.v[v + k] = from_f32<Act>(a * cosines.v[k] - b * turned);
                    high.v[v + k] = from_f32<Act>(b * cosines.v[k] + a * turned);
                }
            }
            store16(first, low);
            store16(first + half, high);
        }
    }
}

#define ROTARY(NAME, Act, N)                                                                                             \
    extern "C" __global__ void __launch_bounds__(256) NAME(Act* qkv, const float* cos, const float* sin, float sign,      \
                                                           int tokens, int seq, int heads, int half, int64_t width) {     \
        turn<Act, N>(qkv, cos, sin, sign, tokens, seq, heads, half, width);                                               \
    }
ROTARY(rotary_f32, float, 4)
ROTARY(rotary_bf16, bf16, 8)
ROTARY(rotary_single_f32, float, 1)
ROTARY(rotary_single_bf16, bf16, 1)
