// What routing sums over tokens, the small losses made of it, and capacity.                                 (ops/routing.rs)
//
// sum_stretches: partial [groups, n, C] f64 → out [groups, C] f32: 32 interleaved sums, ascending, then these ascending.
// sum_gate_statistics: the same of what gate_statistics (gate.cu) leaves: [groups, n, E] twice, and [groups · n, 2].
// balance_loss: counts, prob_sums [L, G, E] → losses [5] += Switch's, devices', cv², difference, entropy; coefficients [L, G, E]; in f64,
//   one block.
// importance: ids, weights [T, k] → per stretch of 32 tokens [·, E] f64, for sum_stretches. importance_grad: dweights += dimportance[id].
// cv_squared: x [E] → loss += weight · var/(mean² + 1e-10), dx [E]; in f64, one block.
// apply_capacity: ids, weights [T, k] → kept [T, k], dropped [E]. One block an expert reads all ids: by weight, a radix selection
//   of the lowest kept key, 8 bits a pass; then in order of tokens, keys above it are kept and as many equal ones as fit.
// drop_second: ids[t, 1] = −1 where 2·weights[t, 1] ≤ uniform[t].
// Bound: latency; small tensors, or rarely used. apply_capacity reads T·k ids E times, from the second-level cache.

#include "common.cuh"

constexpr unsigned ALL = 0xffffffffu;
constexpr int THREADS = 256;
constexpr int WIDE = 1024;
constexpr int STRETCH = 32;
constexpr int MOST_CHOICES = 32;

__device__ __forceinline__ int column_tiles(int columns) { return (columns + WARP - 1) / WARP; }

// Block `block` of [groups, column tiles].
__device__ void sum_tile(int block, int n, int columns, const double* partial, float* out) {
    __shared__ double sums[WARP][WARP + 1];
    const int lane = threadIdx.x % WARP, warp = threadIdx.x / WARP, tiles = column_tiles(columns);
    const long group = block / tiles;
    const int column = block % tiles * WARP + lane;
    double sum = 0.0;
    if (column < columns)
#pragma unroll 4
        for (int i = warp; i < n; i += WARP) sum += partial[(group * n + i) * columns + column];
    sums[warp][lane] = sum;
    __syncthreads();
    if (warp > 0 || column >= columns) return;
    double total = 0.0;
#pragma unroll
    for (int w = 0; w < WARP; w++) total += sums[w][lane];
    out[group * columns + column] = float(total);
}

extern "C" __global__ void __launch_bounds__(WIDE) sum_stretches(int n, int columns, const double* partial, float* out) {
    sum_tile(blockIdx.x, n, columns, partial, out);
}

extern "C" __global__ void __launch_bounds__(WIDE)
    sum_gate_statistics(int groups, int n, int experts, const double* count_parts, const double* prob_parts, const double* parts,
                        float* counts, float* prob_sums, float* sums) {
    const int blocks = groups * column_tiles(experts), block = blockIdx.x;
    if (block < blocks) sum_tile(block, n, experts, count_parts, counts);
    else if (block < 2 * blocks) sum_tile(block - blocks, n, experts, prob_parts, prob_sums);
    else sum_tile(0, groups * n, 2, parts, sums);
}

// Number e of a unit, summed over the layers that are pooled.
struct Unit {
    const float* first;
    long layer;
    int depth;

    __device__ __forceinline__ double operator()(int e) const {
        double sum = 0.0;
        for (int i = 0; i < depth; i++) sum += first[i * layer + e];
        return sum;
    }
};

constexpr int BALANCE_LOSSES = 5;

// A warp a unit. What is the same for all experts is left out of the slopes of losses that are functions of mean probabilities.
extern "C" __global__ void __launch_bounds__(WIDE)
    balance_loss(int layers, int groups, int experts, int pooled, float f_scale, float p_scale, float loss_scale, int devices,
                 float least_entropy, float on_switch, float on_devices, float on_importance, float on_difference,
                 float on_entropy, const float* counts, const float* prob_sums, double* losses, float* coefficients) {
    __shared__ double scratch[WARP];
    const int lane = threadIdx.x % WARP, units = pooled ? groups : layers * groups, depth = pooled ? layers : 1;
    const int size = experts / devices;
    const long layer = long(groups) * experts;
    double sums[BALANCE_LOSSES] = {};
    for (int u = threadIdx.x / WARP; u < units; u += WIDE / WARP) {
        const Unit count{counts + long(u) * experts, layer, depth}, prob{prob_sums + long(u) * experts, layer, depth};
        double all_counts = 0.0, tokens = 0.0, entropy = 0.0;
        for (int e = lane; e < experts; e += WARP) all_counts += count(e), tokens += prob(e);
        all_counts = warp_sum(all_counts), tokens = warp_sum(tokens);
        for (int e = lane; e < experts; e += WARP) {
            const double part = tokens > 0.0 ? prob(e) / tokens : 0.0;
            if (part > 0.0) entropy -= part * log(part);
        }
        entropy = warp_sum(entropy);
        const double weight = tokens * p_scale, even = 1.0 / experts, lacking = fmax(0.0, least_entropy - entropy);
        // cv² = Σ (P − 1/E)² · E² / (E − 1).
        const double variation = experts > 1 ? double(experts) * experts / (experts - 1) : 0.0;
        for (int e = lane; e < experts; e += WARP) {
            const double c = count(e), p = prob(e);
            // Counts are whole numbers, so that their sums are the same in any order.
            double on_device = devices > 1 ? 0.0 : all_counts;
            if (devices > 1)
                for (int i = e / size * size; i < (e / size + 1) * size; i++) on_device += count(i);
            const double part = tokens > 0.0 ? p / tokens : 0.0, used = all_counts > 0.0 ? c / all_counts : 0.0;
            const double of_switch = experts * c * f_scale, of_device = devices * on_device * f_scale;
            sums[0] += of_switch * p * p_scale;
            sums[1] += of_device * p * p_scale;
            sums[2] += weight * (part - even) * (part - even) * variation;
            sums[3] += weight * (used - part) * (used - part);
            double slope = on_switch * of_switch + on_devices * of_device + on_importance * 2.0 * (part - even) * variation -
                           on_difference * 2.0 * (used - part);
            if (on_entropy != 0.0f && part > 0.0 && lacking > 0.0) slope += on_entropy * log(part);
            for (int i = 0; i < depth; i++) coefficients[long(u) * experts + i * layer + e] = float(slope * p_scale);
        }
        if (lane == 0) sums[4] += weight * lacking;
    }
    for (int i = 0; i < BALANCE_LOSSES; i++) {
        const double sum = block_sum(sums[i], scratch);
        if (threadIdx.x == 0) losses[i] += loss_scale * sum;
    }
}

extern "C" __global__ void __launch_bounds__(THREADS)
    importance(int tokens, int experts, int top_k, const int* ids, const float* weights, double* partial) {
    __shared__ int chosen[STRETCH * MOST_CHOICES];
    __shared__ float weight[STRETCH * MOST_CHOICES];
    const int first = blockIdx.x * STRETCH * top_k, choices = min(STRETCH * top_k, tokens * top_k - first);
    for (int i = threadIdx.x; i < choices; i += THREADS) {
        chosen[i] = ids[first + i];
        weight[i] = weights[first + i];
    }
    __syncthreads();
    for (int e = threadIdx.x; e < experts; e += THREADS) {
        double sum = 0.0;
        for (int i = 0; i < choices; i++)
            if (chosen[i] == e) sum += weight[i];
        partial[long(blockIdx.x) * experts + e] = sum;
    }
}

extern "C" __global__ void __launch_bounds__(THREADS)
    importance_grad(int choices, const int* ids, const float* dimportance, float* dweights) {
    for (int i = blockIdx.x * THREADS + threadIdx.x; i < choices; i += gridDim.x * THREADS)
        if (ids[i] >= 0) dweights[i] += dimportance[ids[i]];
}

extern "C" __global__ void __launch_bounds__(THREADS) cv_squared(int n, float weight, float coefficient, const float* x, double* loss, float* dx) {
    __shared__ double scratch[WARP];
    if (n < 2) {
        if (threadIdx.x < n) dx[threadIdx.x] = 0.0f;
        return;
    }
    double sum = 0.0;
    for (int e = threadIdx.x; e < n; e += THREADS) sum += x[e];
    const double mean = block_sum(sum, scratch) / n;
    sum = 0.0;
    for (int e = threadIdx.x; e < n; e += THREADS) sum += (x[e] - mean) * (x[e] - mean);
    const double variance = block_sum(sum, scratch) / (n - 1), divisor = mean * mean + 1e-10;
    const double through_mean = 2.0 * mean * variance / (n * divisor * divisor);
    for (int e = threadIdx.x; e < n; e += THREADS)
        dx[e] = float(weight * coefficient * (2.0 * (x[e] - mean) / ((n - 1) * divisor) - through_mean));
    if (threadIdx.x == 0) *loss += weight * variance / divisor;
}

// Weights as unsigned numbers of the same order; NaN is the lowest weight there is.
__device__ __forceinline__ unsigned weight_key(float weight) {
    const unsigned bits = __float_as_uint(weight != weight ? -INFINITY : weight);
    return bits >> 31 ? ~bits : bits | 0x80000000u;
}

extern "C" __global__ void __launch_bounds__(WIDE)
    apply_capacity(int choices, int per_expert, int by_weight, const int* ids, const float* weights, int* kept, float* dropped) {
    __shared__ int held[WARP], histogram[256], next_digit, next_room;
    const int expert = blockIdx.x, lane = threadIdx.x % WARP, warp = threadIdx.x / WARP;
    int mine = 0;
    for (int i = threadIdx.x; i < choices; i += WIDE) {
        mine += ids[i] == expert;
        if (expert == 0 && ids[i] < 0) kept[i] = ids[i];
    }
    const int wanted = block_sum(mine, held);
    if (threadIdx.x == 0) dropped[expert] = float(max(0, wanted - per_expert));

    // Keys above `lowest` are kept, and `room` of those that equal it. Unranked, all keys are 0.
    const bool ranked = by_weight && per_expert > 0 && wanted > per_expert;
    unsigned lowest = 0, decided = 0;
    int room = per_expert;
    for (int shift = 24; ranked && shift >= 0; shift -= 8) {
        for (int d = threadIdx.x; d < 256; d += WIDE) histogram[d] = 0;
        __syncthreads();
        for (int i = threadIdx.x; i < choices; i += WIDE) {
            if (ids[i] != expert) continue;
            const unsigned key = weight_key(weights[i]);
            if ((key & decided) == lowest) atomicAdd(&histogram[key >> shift & 255], 1);
        }
        __syncthreads();
        if (threadIdx.x == 0) {
            int digit = 255, left = room;
            while (digit > 0 && histogram[digit] < left) left -= histogram[digit--];
            next_digit = digit, next_room = left;
        }
        __syncthreads();
        lowest |= unsigned(next_digit) << shift, decided |= 255u << shift, room = next_room;
    }

    for (int first = 0; first < choices; first += WIDE) {
        const int i = first + threadIdx.x;
        const bool here = i < choices && ids[i] == expert;
        const unsigned key = here && ranked ? weight_key(weights[i]) : 0;
        const bool tied = here && key == lowest;
        const unsigned ties = __ballot_sync(ALL, tied);
        __syncthreads();
        if (lane == 0) held[warp] = __popc(ties);
        __syncthreads();
        const int before = warp_sum(lane < warp ? held[lane] : 0) + __popc(ties & ((1u << lane) - 1));
        if (here) kept[i] = key > lowest || (tied && before < room) ? expert : -1;
        room -= warp_sum(held[lane]);
    }
}

extern "C" __global__ void __launch_bounds__(THREADS)
    drop_second(int tokens, int top_k, const float* uniform, const float* weights, int* ids) {
    for (int t = blockIdx.x * THREADS + threadIdx.x; t < tokens; t += gridDim.x * THREADS)
        if (2.0f * weights[long(t) * top_k + 1] <= uniform[t]) ids[long(t) * top_k + 1] = -1;
}
