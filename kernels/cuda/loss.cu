// Softmax cross-entropy.                                              (LossOps::cross_entropy, LossOps::cross_entropy_loss)
//
// logits [rows, V], targets [rows] i32 (−1: none) → losses [rows] f32 = log Σ exp(logits) − logits[target], in nats, 0 without a target;
// cross_entropy also overwrites the logits by (softmax − onehot) · scale, 0 without a target. A target that V does not have gives NaN
// in both: the host cannot see it, and nothing outside the row may be touched.
//
// One block a row, one pass for the largest logit and the sum of exponentials together, in f32: a thread's elements ascending, then a
// butterfly, then warps. The first `kept` packs stay in shared memory for the second pass, the rest is found in the L2 cache, so the
// logits are read once from memory and written once. Rows begin anywhere: up to the first 16 bytes, and after the last, element by
// element, so any V will do.
// Bound: memory, bytes = 2 · rows · V elements (1 for the loss alone).
// Versions, 4096 × 32000 bf16 on an H100, of the copy rate: two blocks of 512 threads a multiprocessor, exp2f 0.89, without its handling of
// subnormal results 0.93 → blocks of 384 with 62 registers a thread, of which again two fit, 0.82 to 0.84 → with 56, of which three do, 0.91
// → four packs in flight instead of three 0.92.

#include <cfloat>

#include "pack.cuh"

constexpr int MOST_THREADS = 1024;
// So few that a multiprocessor's 65,536 are enough for three blocks of 384 threads. Bounds of a block's threads would not do: they are
// 1024 for the longest rows, which allows 64.
constexpr int MOST_REGISTERS = 56;

// Largest value so far, and the sum of exponentials less it. The least is finite, so that −inf less it is no NaN.
struct Softmax {
    float most = -FLT_MAX, sum = 0.0f;

    __device__ __forceinline__ void raise(float to) {
        if (to > most) sum *= fast_exp2((most - to) * LOG2_E), most = to;
    }
    __device__ __forceinline__ void take(float x) {
        raise(x);
        sum += fast_exp2((x - most) * LOG2_E);
    }
    template <typename Act, int V> __device__ __forceinline__ void take(const Pack<Act, V>& pack) {
        float largest = to_f32(pack.v[0]);
#pragma unroll
        for (int e = 1; e < V; ++e) largest = fmaxf(largest, to_f32(pack.v[e]));
        raise(largest);
#pragma unroll
        for (int e = 0; e < V; ++e) sum += fast_exp2((to_f32(pack.v[e]) - most) * LOG2_E);
    }
};

template <bool GRAD, typename Act>
__device__ void row_loss(int vocab, float scale, const int* targets, Act* logits, float* losses, int kept) {
    constexpr int V = FULL<Act>, FLIGHT = 4;
    extern __shared__ __align__(16) unsigned char keep_bytes[];
    __shared__ float scratch[WARP];
    auto* keep = reinterpret_cast<Pack<Act, V>*>(keep_bytes);
    Act* row = logits + long(blockIdx.x) * vocab;
    const int target = targets[blockIdx.x], threads = blockDim.x;
    const int head = min(vocab, int(-(reinterpret_cast<uintptr_t>(row) / sizeof(Act)) % V)), packs = (vocab - head) / V;
    const int single = vocab - packs * V;
    Act* body = row + head;

    if (target < 0 || target >= vocab) {
        const float value = target == -1 ? 0.0f : __int_as_float(0x7fffffff);
        if (GRAD) {
            for (int i = threadIdx.x; i < vocab; i += threads) row[i] = from_f32<Act>(value);
        }
        if (threadIdx.x == 0) losses[blockIdx.x] = value;
        return;
    }
    const float chosen = to_f32(row[target]);
    Softmax mine;
    for (int base = threadIdx.x; base < packs; base += threads * FLIGHT) {
        Pack<Act, V> x[FLIGHT];
#pragma unroll
        for (int u = 0; u < FLIGHT; ++u) {
            if (base + u * threads < packs) x[u] = load<V>(body + long(base + u * threads) * V);
        }
#pragma unroll
        for (int u = 0; u < FLIGHT; ++u) {
            const int i = base + u * threads;
            if (i < packs) {
                mine.take(x[u]);
                if (GRAD && i < kept) keep[i] = x[u];
            }
        }
    }
    for (int r = threadIdx.x; r < single; r += threads) mine.take(to_f32(row[r < head ? r : r + packs * V]));
    const float most = block_max(mine.most, scratch, -FLT_MAX);
    const float sum = block_sum(mine.sum * fast_exp2((mine.most - most) * LOG2_E), scratch);
    if (threadIdx.x == 0) losses[blockIdx.x] = logf(sum) - (chosen - most);
    if (!GRAD) return;

    const float factor = scale / sum;
    for (int base = threadIdx.x; base < packs; base += threads * FLIGHT) {
        Pack<Act, V> x[FLIGHT];
#pragma unroll
        for (int u = 0; u < FLIGHT; ++u) {
            const int i = base + u * threads;
            if (i < packs) x[u] = i < kept ? keep[i] : load<V>(body + long(i) * V);
        }
#pragma unroll
        for (int u = 0; u < FLIGHT; ++u) {
            const int i = base + u * threads;
            if (i >= packs) continue;
            const int chosen_here = target - head - i * V;
#pragma unroll
            for (int e = 0; e < V; ++e) {
                const float p = fast_exp2((to_f32(x[u].v[e]) - most) * LOG2_E) * factor;
                x[u].v[e] = from_f32<Act>(e == chosen_here ? p - scale : p);
            }
            store(body + long(i) * V, x[u]);
        }
    }
    for (int r = threadIdx.x; r < single; r += threads) {
        const int i = r < head ? r : r + packs * V;
        const float p = fast_exp2((to_f32(row[i]) - most) * LOG2_E) * factor;
        row[i] = from_f32<Act>(i == target ? p - scale : p);
    }
}

template <typename Act>
__device__ void body_cross_entropy(int vocab, float scale, const int* targets, Act* logits, float* losses, int kept) {
    row_loss<true>(vocab, scale, targets, logits, losses, kept);
}

template <typename Act> __device__ void body_cross_entropy_loss(int vocab, const int* targets, const Act* logits, float* losses) {
    row_loss<false>(vocab, 0.0f, targets, const_cast<Act*>(logits), losses, 0);
}

#define CROSS_ENTROPY(Act) int vocab, float scale, const int *targets, Act *logits, float *losses, int kept
#define CROSS_ENTROPY_LOSS(Act) int vocab, const int *targets, const Act *logits, float *losses
BOTH_WITHIN(cross_entropy, __maxnreg__(MOST_REGISTERS), CROSS_ENTROPY, (vocab, scale, targets, logits, losses, kept))
BOTH(cross_entropy_loss, MOST_THREADS, CROSS_ENTROPY_LOSS, (vocab, targets, logits, losses))
