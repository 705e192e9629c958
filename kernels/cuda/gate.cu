// The gate: scores, top-k choice and weights; its backward pass; its balance statistics.                     (ops/routing.rs)
//
// gate: logits [T, E] f32, bias [E] f32 or none → scores [T, E], ids [T, k] i32 descending by score or logit + bias, ties to the lower id,
//   NaN last, of the highest groups only and −1 after those that are enough, if asked; weights [T, k]: the scores, scaled, and first
//   divided by their sum if asked.
// sinkhorn_sums: logits [T, E], bias [E] → per stretch of 32 tokens, Σ softmax(logits + bias) [·, E] f64, for sum_stretches; sinkhorn_step
//   moves the bias by what they lack of an even share.
// gate_grad: scores, ids, dweights [T, k], coefficients [G, E] or none, logits for the z-loss → dlogits [T, E]; with an entropy loss as well.
// weigh: scores, ids → weights, as the gate gives them.
// gate_statistics: per stretch of 32 tokens of a group, counts [·, E], probabilities [·, E], and Σ lse² and Σ entropy [·, 2] as f64,
//   which sum_gate_statistics (statistics.cu) adds up in order.
// Everything f32. E ≤ 512, k ≤ 32. Sums over E: each lane its places ascending, then a butterfly; over k: ascending (gate), butterfly
//   (gate_grad); over tokens: a warp's 4 in f32, then warps ascending and stretches in f64.
// Bound: memory. Bytes = 8·T·E, 8·T·E (12 with z-loss), 8·T·E. One warp a token, its row in registers; the k rounds of the choice are two
// warp reductions each.
// Each kernel comes as NAME_P for rows of up to 32·P experts.

#include "choice.cuh"

constexpr int THREADS = 256;
constexpr int WARPS = THREADS / WARP;
// As the CPU: nothing to an ordinary sum; zero weights instead of NaN where all chosen scores vanish.
constexpr float TINY = 1e-20f;
// Tokens of one block of gate_statistics.
constexpr int STRETCH = 32;

template <int P> __device__ __forceinline__ void softmax(float (&x)[P], int experts) {
    const float most = row_max(x, -INFINITY);
#pragma unroll
    for (int i = 0; i < P; i++) x[i] = i * WARP + lane_id() < experts ? expf(x[i] - most) : 0.0f;
    const float scale = 1.0f / row_sum(x);
#pragma unroll
    for (int i = 0; i < P; i++) x[i] *= scale;
}

template <int P> __device__ __forceinline__ void sigmoid(float (&x)[P], int experts) {
#pragma unroll
    for (int i = 0; i < P; i++) x[i] = i * WARP + lane_id() < experts ? 1.0f / (1.0f + expf(-x[i])) : 0.0f;
}

// Takes out the experts of all groups but the `chosen` ones with the highest sum of their `summed` highest ranks, or of all of them (0).
template <int P>
__device__ __forceinline__ void limit_groups(int experts, int groups, int chosen, int summed, const float (&ranks)[P],
                                             unsigned (&keys)[P]) {
    const int lane = lane_id(), size = experts / groups;
    unsigned mine = NO_KEY;
    for (int g = 0; g < groups; g++) {
        unsigned of_group[P];
#pragma unroll
        for (int i = 0; i < P; i++) of_group[i] = (i * WARP + lane) / size == g ? keys[i] : NO_KEY;
        float rank = 0.0f;
        if (summed == 0) {
#pragma unroll
            for (int i = 0; i < P; i++) rank += of_group[i] != NO_KEY ? ranks[i] : 0.0f;
            rank = warp_sum(rank);
        }
        for (int i = 0; i < min(summed, size); i++) rank += value_of(ranks, take_best(of_group));
        if (lane == g) mine = order_key(rank);
    }
    unsigned allowed = 0;
    for (int i = 0; i < chosen; i++) {
        const unsigned best = __reduce_max_sync(ALL, mine);
        const int group = __ffs(__ballot_sync(ALL, mine == best)) - 1;
        allowed |= 1u << group;
        if (lane == group) mine = NO_KEY;
    }
#pragma unroll
    for (int i = 0; i < P; i++) {
        const int e = i * WARP + lane;
        if (e < experts && !(allowed >> e / size & 1)) keys[i] = NO_KEY;
    }
}

template <int P>
__device__ void gate(int tokens, int experts, int top_k, int is_sigmoid, int renormalize, float scale, int by_logit, int groups,
                     int groups_chosen, int summed, float enough, int least, const float* logits, const float* bias,
                     float* scores, int* ids, float* weights) {
    const int t = blockIdx.x * WARPS + warp_id(), lane = lane_id();
    if (t >= tokens) return;
    float x[P];
    load_row(logits + long(t) * experts, experts, -INFINITY, x);
    float ranks[P];
    if (by_logit)
#pragma unroll
        for (int i = 0; i < P; i++) ranks[i] = x[i];
    if (is_sigmoid) sigmoid(x, experts);
    else softmax(x, experts);
    store_row(scores + long(t) * experts, experts, x);

    unsigned keys[P];
#pragma unroll
    for (int i = 0; i < P; i++) {
        const int e = i * WARP + lane;
        if (!by_logit) ranks[i] = x[i];
        if (bias && e < experts) ranks[i] += bias[e];
        keys[i] = e < experts ? order_key(ranks[i]) : NO_KEY;
    }
    if (groups > 1) limit_groups(experts, groups, groups_chosen, summed, ranks, keys);
    const float probability = is_sigmoid && least < top_k ? 1.0f / (row_sum(x) + TINY) : 1.0f;
    int id = -1;
    float weight = 0.0f, sum = 0.0f;
    for (int j = 0; j < top_k; j++) {
        if (j >= least && sum * probability >= enough) break;
        const int chosen = take_best(keys);
        const float score = value_of(x, chosen);
        sum += score;
        if (lane == j) id = chosen, weight = score;
    }
    const float factor = renormalize ? scale / (sum + TINY) : scale;
    if (lane < top_k) {
        ids[long(t) * top_k + lane] = id;
        weights[long(t) * top_k + lane] = weight * factor;
    }
}

// ln Σ exp(logits). The softmax scores already hold it: the highest is exp(max − lse).
template <int P> __device__ __forceinline__ float log_sum_exp(const float (&logits)[P], const float (&scores)[P], int is_sigmoid) {
    const float most = row_max(logits, -INFINITY);
    if (!is_sigmoid) return most - logf(row_max(scores, 0.0f));
    float sum = 0.0f;
#pragma unroll
    for (int i = 0; i < P; i++) sum += expf(logits[i] - most);
    return most + logf(warp_sum(sum));
}

// Lane j < k: the gradient of the score of choice j, through scale and renormalisation: with w = s / Σ s, ∂w_j/∂s_i = (δ_ij − w_j) / Σ s.
__device__ __forceinline__ float choice_grad(bool chosen, float score, float dweight, int renormalize, float scale) {
    if (!renormalize) return scale * dweight;
    const float inverse = 1.0f / (warp_sum(chosen ? score : 0.0f) + TINY);
    const float mean = warp_sum(chosen ? score * inverse * dweight : 0.0f);
    return scale * inverse * (dweight - mean);
}

template <int P>
__device__ void gate_grad(int tokens, int experts, int top_k, int is_sigmoid, int renormalize, float scale, float z_scale,
                          float entropy_scale, int tokens_per_group, const float* logits, const float* scores, const int* ids,
                          const float* dweights, const float* coefficients, float* dlogits) {
    const int t = blockIdx.x * WARPS + warp_id(), lane = lane_id();
    if (t >= tokens) return;
    float s[P], grad[P] = {};
    load_row(scores + long(t) * experts, experts, 0.0f, s);

    const int id = lane < top_k ? ids[long(t) * top_k + lane] : -1;
    const float dweight = id >= 0 ? dweights[long(t) * top_k + lane] : 0.0f;
    const float score = id >= 0 ? scores[long(t) * experts + id] : 0.0f;
    const float dscore = choice_grad(id >= 0, score, dweight, renormalize, scale);
    for (int j = 0; j < top_k; j++) {
        const int e = __shfl_sync(ALL, id, j);
        const float d = __shfl_sync(ALL, dscore, j);
#pragma unroll
        for (int i = 0; i < P; i++)
            if (i * WARP + lane == e) grad[i] += d;
    }

    if (coefficients) {
        float c[P], factor = 1.0f, mean = 0.0f;
        load_row(coefficients + long(t / tokens_per_group) * experts, experts, 0.0f, c);
        if (is_sigmoid) {
            factor = 1.0f / (row_sum(s) + TINY);
#pragma unroll
            for (int i = 0; i < P; i++) mean += s[i] * factor * c[i];
            mean = warp_sum(mean);
        }
#pragma unroll
        for (int i = 0; i < P; i++) grad[i] += factor * (c[i] - mean);
    }

    // ∂H/∂score_e = factor · (−ln p_e − H), p = factor · score.
    if (entropy_scale != 0.0f) {
        const float factor = is_sigmoid ? 1.0f / (row_sum(s) + TINY) : 1.0f;
        float sum = 0.0f, surprise[P];
#pragma unroll
        for (int i = 0; i < P; i++) {
            surprise[i] = s[i] > 0.0f ? -logf(s[i] * factor) : 0.0f;
            sum += s[i] * factor * surprise[i];
        }
        sum = warp_sum(sum);
#pragma unroll
        for (int i = 0; i < P; i++)
            if (s[i] > 0.0f) grad[i] += entropy_scale * factor * (surprise[i] - sum);
    }

    float mean = 0.0f;
    if (!is_sigmoid) {
#pragma unroll
        for (int i = 0; i < P; i++) mean += s[i] * grad[i];
        mean = warp_sum(mean);
    }
#pragma unroll
    for (int i = 0; i < P; i++) grad[i] = is_sigmoid ? grad[i] * s[i] * (1.0f - s[i]) : s[i] * (grad[i] - mean);

    // ∂(lse²)/∂logit_e = 2 · lse · softmax_e.
    if (z_scale != 0.0f) {
        float l[P];
        load_row(logits + long(t) * experts, experts, -INFINITY, l);
        const float lse = log_sum_exp(l, s, is_sigmoid), factor = 2.0f * z_scale * lse;
#pragma unroll
        for (int i = 0; i < P; i++) grad[i] += factor * (is_sigmoid ? expf(l[i] - lse) : s[i]);
    }
    store_row(dlogits + long(t) * experts, experts, grad);
}

// −Σ p ln p of a token's probabilities; for softmax scores lse − Σ p·logit, without a logarithm an expert.
template <int P>
__device__ __forceinline__ float entropy(const float (&logits)[P], const float (&scores)[P], float lse, float factor,
                                         int is_sigmoid) {
    float sum = 0.0f;
#pragma unroll
    for (int i = 0; i < P; i++) {
        const float p = scores[i] * factor;
        if (p > 0.0f) sum -= p * (is_sigmoid ? logf(p) : logits[i]);
    }
    return warp_sum(sum) + (is_sigmoid ? 0.0f : lse);
}

// Block (group, stretch of it) sums its tokens; a stretch beyond the last token is zero.
template <int P>
__device__ void gate_statistics(int tokens, int experts, int top_k, int is_sigmoid, int tokens_per_group, int stretches,
                                const float* logits, const float* scores, const int* ids, double* counts, double* probs,
                                double* totals) {
    __shared__ float sums[WARPS][P * WARP];
    __shared__ int chosen[P * WARP];
    __shared__ double z_sums[WARPS], entropies[WARPS];
    const int lane = lane_id(), warp = warp_id();
    const long group = blockIdx.x / stretches, stretch = blockIdx.x % stretches;
    const long first = group * tokens_per_group + stretch * STRETCH;
    const int length = int(max(0L, min(min(first + STRETCH, (group + 1) * tokens_per_group), long(tokens)) - first));
    for (int e = threadIdx.x; e < P * WARP; e += THREADS) chosen[e] = 0;
    __syncthreads();
    for (int i = threadIdx.x; i < length * top_k; i += THREADS) {
        const int e = ids[first * top_k + i];
        if (e >= 0 && e < experts) atomicAdd(&chosen[e], 1);
    }
    float sum[P] = {};
    double z_sum = 0.0, entropy_sum = 0.0;
    for (int i = warp; i < length; i += WARPS) {
        float l[P], s[P];
        load_row(logits + (first + i) * experts, experts, -INFINITY, l);
        load_row(scores + (first + i) * experts, experts, 0.0f, s);
        const float factor = is_sigmoid ? 1.0f / (row_sum(s) + TINY) : 1.0f;
#pragma unroll
        for (int p = 0; p < P; p++) sum[p] += s[p] * factor;
        const float lse = log_sum_exp(l, s, is_sigmoid);
        z_sum += double(lse) * lse;
        entropy_sum += entropy(l, s, lse, factor, is_sigmoid);
    }
#pragma unroll
    for (int p = 0; p < P; p++) sums[warp][p * WARP + lane] = sum[p];
    if (lane == 0) z_sums[warp] = z_sum, entropies[warp] = entropy_sum;
    __syncthreads();
    for (int e = threadIdx.x; e < experts; e += THREADS) {
        double total = 0.0;
        for (int w = 0; w < WARPS; w++) total += sums[w][e];
        counts[long(blockIdx.x) * experts + e] = chosen[e];
        probs[long(blockIdx.x) * experts + e] = total;
    }
    if (threadIdx.x == 0) {
        double z = 0.0, entropy = 0.0;
        for (int w = 0; w < WARPS; w++) z += z_sums[w], entropy += entropies[w];
        totals[2 * blockIdx.x] = z, totals[2 * blockIdx.x + 1] = entropy;
    }
}

// Block `stretch` sums softmax(logits + bias) over its tokens.
template <int P> __device__ void sinkhorn_sums(int tokens, int experts, const float* logits, const float* bias, double* sums) {
    __shared__ float of_warps[WARPS][P * WARP];
    const int lane = lane_id(), warp = warp_id();
    const int first = blockIdx.x * STRETCH, length = min(STRETCH, tokens - first);
    float b[P], sum[P] = {};
    load_row(bias, experts, 0.0f, b);
    for (int i = warp; i < length; i += WARPS) {
        float x[P];
        load_row(logits + long(first + i) * experts, experts, -INFINITY, x);
#pragma unroll
        for (int p = 0; p < P; p++) x[p] += b[p];
        softmax(x, experts);
#pragma unroll
        for (int p = 0; p < P; p++) sum[p] += x[p];
    }
#pragma unroll
    for (int p = 0; p < P; p++) of_warps[warp][p * WARP + lane] = sum[p];
    __syncthreads();
    for (int e = threadIdx.x; e < experts; e += THREADS) {
        double total = 0.0;
        for (int w = 0; w < WARPS; w++) total += of_warps[w][e];
        sums[long(blockIdx.x) * experts + e] = total;
    }
}

extern "C" __global__ void __launch_bounds__(THREADS) weigh(int tokens, int experts, int top_k, int renormalize, float scale,
                                                           const float* scores, const int* ids, float* weights) {
    const int t = blockIdx.x * WARPS + warp_id(), lane = lane_id();
    if (t >= tokens) return;
    const int id = lane < top_k ? ids[long(t) * top_k + lane] : -1;
    const float score = id >= 0 ? scores[long(t) * experts + id] : 0.0f;
    float sum = 0.0f;
    for (int j = 0; j < top_k; j++) sum += __shfl_sync(ALL, score, j);
    if (lane < top_k) weights[long(t) * top_k + lane] = score * (renormalize ? scale / (sum + TINY) : scale);
}

// bias += ln(share / sum); an expert of no token at all keeps its own.
extern "C" __global__ void __launch_bounds__(THREADS) sinkhorn_step(int experts, float share, const float* sums, float* bias) {
    const int e = blockIdx.x * THREADS + threadIdx.x;
    if (e < experts && sums[e] > 0.0f) bias[e] += logf(share / sums[e]);
}

#define SIZED(NAME, P, PARAMS, ARGS)                                                                                       \
    extern "C" __global__ void __launch_bounds__(THREADS) NAME##_##P PARAMS { NAME<P> ARGS; }
#define ALL_SIZES(NAME, PARAMS, ARGS)                                                                                      \
    SIZED(NAME, 1, PARAMS, ARGS)                                                                                           \
    SIZED(NAME, 2, PARAMS, ARGS)                                                                                           \
    SIZED(NAME, 4, PARAMS, ARGS)                                                                                           \
    SIZED(NAME, 8, PARAMS, ARGS)                                                                                           \
    SIZED(NAME, 16, PARAMS, ARGS)

ALL_SIZES(gate,
          (int tokens, int experts, int top_k, int is_sigmoid, int renormalize, float scale, int by_logit, int groups,
           int groups_chosen, int summed, float enough, int least, const float* logits, const float* bias, float* scores,
           int* ids, float* weights),
          (tokens, experts, top_k, is_sigmoid, renormalize, scale, by_logit, groups, groups_chosen, summed, enough, least,
           logits, bias, scores, ids, weights))
ALL_SIZES(sinkhorn_sums, (int tokens, int experts, const float* logits, const float* bias, double* sums),
          (tokens, experts, logits, bias, sums))
ALL_SIZES(gate_grad,
          (int tokens, int experts, int top_k, int is_sigmoid, int renormalize, float scale, float z_scale,
           float entropy_scale, int tokens_per_group, const float* logits, const float* scores, const int* ids, const float* dweights,
           const float* coefficients, float* dlogits),
          (tokens, experts, top_k, is_sigmoid, renormalize, scale, z_scale, entropy_scale, tokens_per_group, logits, scores, ids,
           dweights, coefficients, dlogits))
ALL_SIZES(gate_statistics,
          (int tokens, int experts, int top_k, int is_sigmoid, int tokens_per_group, int stretches, const float* logits,
           const float* scores, const int* ids, double* counts, double* probs, double* totals),
          (tokens, experts, top_k, is_sigmoid, tokens_per_group, stretches, logits, scores, ids, counts, probs,
           totals))
