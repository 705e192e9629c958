// Causal attention for any type and head width, forward and backward: attention.cu's contract, one warp a row.
//                                                                                     (AttentionOps::attention, attention_grad)
// What f32 runs on (parity: no TF32), and bf16 where a head is wider than 256, no multiple of 8, or off 16 bytes. All arithmetic
// in f32 (probabilities are not rounded), sums over ascending keys, or heads and queries: same bits every run.
// Bound: arithmetic units and L1, far from either's rate; it is meant for small models.
//
// A lane takes one of 32 keys (or queries) and makes its whole dot products, then lanes share out the columns of the sums. The
// row's own vectors and its sums lie in shared memory as f32.

#include "attention.cuh"

constexpr int PLAIN_WARPS = 4;

// A head's elements in a row of `a`, times those in shared memory.
template <typename Act> __device__ __forceinline__ float dot(const Act* a, const float* b, int dim) {
    float sum = 0.f;
    for (int d = 0; d < dim; ++d) sum = fmaf(to_f32(a[d]), b[d], sum);
    return sum;
}

// A warp's shared memory: 64 values that lanes exchange, then `vectors` of `dim`.
__device__ __forceinline__ float* warp_memory(int vectors, int dim) {
    extern __shared__ float plain_shared[];
    return plain_shared + threadIdx.x / WARP * (64 + vectors * dim);
}

template <typename Act>
__device__ void body_attention_plain(const Act* qkv, const int* starts, Act* out, float* lse, AttentionShape shape) {
    const int lane = threadIdx.x % WARP, head = blockIdx.y, dim = shape.dim;
    const int64_t token = int64_t(blockIdx.x) * PLAIN_WARPS + threadIdx.x / WARP;
    if (token >= int64_t(shape.batch) * shape.seq) return;
    const int b = token / shape.seq, position = token % shape.seq, kv = shape.kv_of(head);
    const int64_t width = shape.width();
    const Act* query = qkv + shape.at(b, head) + position * width;
    const Act* keys = qkv + shape.at(b, shape.heads + kv);
    const Act* values = keys + shape.kv_heads * dim;
    float *weights = warp_memory(2, dim), *q = weights + 64, *sums = q + dim;
    for (int d = lane; d < dim; d += WARP) q[d] = to_f32(query[d]), sums[d] = 0.f;
    __syncwarp();
    float most = -INFINITY, total = 0.f;
    for (int from = starts ? starts[token] : 0; from <= position; from += WARP) {
        const int key = from + lane, count = min(WARP, position + 1 - from);
        const float score = lane < count ? dot(keys + key * width, q, dim) * shape.scale : -INFINITY;
        const float peak = fmaxf(most, warp_max(score)), fade = expf(most - peak);
        const float weight = lane < count ? expf(score - peak) : 0.f;
        weights[lane] = weight;
        total = total * fade + warp_sum(weight);
        most = peak;
        __syncwarp();
        for (int d = lane; d < dim; d += WARP) {
            float sum = sums[d] * fade;
            for (int i = 0; i < count; ++i) sum = fmaf(weights[i], to_f32(values[(from + i) * width + d]), sum);
            sums[d] = sum;
        }
        __syncwarp();
    }
    for (int d = lane; d < dim; d += WARP) out[token * shape.out_width() + head * dim + d] = from_f32<Act>(sums[d] / total);
    if (lane == 0) lse[token * shape.heads + head] = most + logf(total);
}

// delta [B·S, heads] = Σ dout·out of each head; also dq.
template <typename Act>
__device__ void body_attention_grad_queries_plain(const Act* qkv, const int* starts, const Act* out, const float* lse, const Act* dout,
                                                  float* delta, Act* dqkv, AttentionShape shape) {
    const int lane = threadIdx.x % WARP, head = blockIdx.y, dim = shape.dim;
    const int64_t token = int64_t(blockIdx.x) * PLAIN_WARPS + threadIdx.x / WARP;
    if (token >= int64_t(shape.batch) * shape.seq) return;
    const int b = token / shape.seq, position = token % shape.seq, kv = shape.kv_of(head);
    const int64_t width = shape.width(), row = token * shape.out_width() + int64_t(head) * dim;
    const Act* query = qkv + shape.at(b, head) + position * width;
    const Act* keys = qkv + shape.at(b, shape.heads + kv);
    const Act* values = keys + shape.kv_heads * dim;
    float *weights = warp_memory(3, dim), *q = weights + 64, *grad = q + dim, *sums = grad + dim;
    float mean = 0.f;
    for (int d = lane; d < dim; d += WARP) {
        q[d] = to_f32(query[d]), grad[d] = to_f32(dout[row + d]), sums[d] = 0.f;
        mean = fmaf(grad[d], to_f32(out[row + d]), mean);
    }
    mean = warp_sum(mean);
    if (lane == 0) delta[token * shape.heads + head] = mean;
    __syncwarp();
    const float log_sum = lse[token * shape.heads + head];
    for (int from = starts ? starts[token] : 0; from <= position; from += WARP) {
        const int key = from + lane, count = min(WARP, position + 1 - from);
        float ds = 0.f;
        if (lane < count) {
            const float p = expf(dot(keys + key * width, q, dim) * shape.scale - log_sum);
            ds = p * (dot(values + key * width, grad, dim) - mean);
        }
        weights[lane] = ds;
        __syncwarp();
        for (int d = lane; d < dim; d += WARP) {
            float sum = sums[d];
            for (int i = 0; i < count; ++i) sum = fmaf(weights[i], to_f32(keys[(from + i) * width + d]), sum);
            sums[d] = sum;
        }
        __syncwarp();
    }
    Act* to = dqkv + shape.at(b, head) + position * width;
    for (int d = lane; d < dim; d += WARP) to[d] = from_f32<Act>(sums[d] * shape.scale);
}

// dk and dv of one position and key/value head.
template <typename Act>
__device__ void body_attention_grad_keys_plain(const Act* qkv, const int* starts, const float* lse, const float* delta,
                                               const Act* dout, Act* dqkv, AttentionShape shape) {
    const int lane = threadIdx.x % WARP, kv = blockIdx.y, dim = shape.dim, group = shape.heads / shape.kv_heads;
    const int64_t token = int64_t(blockIdx.x) * PLAIN_WARPS + threadIdx.x / WARP;
    if (token >= int64_t(shape.batch) * shape.seq) return;
    const int b = token / shape.seq, position = token % shape.seq;
    const int64_t width = shape.width(), out_width = shape.out_width(), at = shape.at(b, shape.heads + kv) + position * width;
    const int* seen_from = starts ? starts + int64_t(b) * shape.seq : nullptr;
    float *weights = warp_memory(4, dim), *k = weights + 64, *v = k + dim, *dk = v + dim, *dv = dk + dim;
    for (int d = lane; d < dim; d += WARP) {
        k[d] = to_f32(qkv[at + d]), v[d] = to_f32(qkv[at + shape.kv_heads * dim + d]), dk[d] = dv[d] = 0.f;
    }
    __syncwarp();
    for (int head = kv * group; head < (kv + 1) * group; ++head) {
        const Act* queries = qkv + shape.at(b, head);
        const Act* grads = dout + shape.out_at(b, head);
        for (int from = position; from < shape.seq; from += WARP) {
            if (seen_from && seen_from[from] > position) break;  // starts ascend: nor does anybody after see this key
            const int query = from + lane, count = min(WARP, shape.seq - from);
            float p = 0.f, ds = 0.f;
            if (lane < count && (!seen_from || seen_from[query] <= position)) {
                const int64_t stat = shape.stat_at(b, head) + int64_t(query) * shape.heads;
                p = expf(dot(queries + query * width, k, dim) * shape.scale - lse[stat]);
                ds = p * (dot(grads + query * out_width, v, dim) - delta[stat]);
            }
            weights[lane] = p, weights[WARP + lane] = ds;
            __syncwarp();
            for (int d = lane; d < dim; d += WARP) {
                float key_sum = dk[d], value_sum = dv[d];
                for (int i = 0; i < count; ++i) {
                    value_sum = fmaf(weights[i], to_f32(grads[(from + i) * out_width + d]), value_sum);
                    key_sum = fmaf(weights[WARP + i], to_f32(queries[(from + i) * width + d]), key_sum);
                }
                dk[d] = key_sum, dv[d] = value_sum;
            }
            __syncwarp();
        }
    }
    for (int d = lane; d < dim; d += WARP) {
        dqkv[at + d] = from_f32<Act>(dk[d] * shape.scale);
        dqkv[at + shape.kv_heads * dim + d] = from_f32<Act>(dv[d]);
    }
}

#define FORWARD(Act) const Act *qkv, const int *starts, Act *out, float *lse, AttentionShape shape
#define GRAD_QUERIES(Act)                                                                                                \
    const Act *qkv, const int *starts, const Act *out, const float *lse, const Act *dout, float *delta, Act *dqkv,        \
        AttentionShape shape
#define GRAD_KEYS(Act)                                                                                                   \
    const Act *qkv, const int *starts, const float *lse, const float *delta, const Act *dout, Act *dqkv, AttentionShape shape
BOTH(attention_plain, 128, FORWARD, (qkv, starts, out, lse, shape))
BOTH(attention_grad_queries_plain, 128, GRAD_QUERIES, (qkv, starts, out, lse, dout, delta, dqkv, shape))
BOTH(attention_grad_keys_plain, 128, GRAD_KEYS, (qkv, starts, lse, delta, dout, dqkv, shape))
