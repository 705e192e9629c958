// What the attention kernels share: sizes, and where a head's rows are.

#pragma once

#include "common.cuh"

// Passed by value; the host has the same struct.
struct AttentionShape {
    int batch, seq, heads, kv_heads, dim;
    float scale;  // 1/√dim

    // Elements of a fused row: query heads, key heads, value heads.
    __device__ __forceinline__ int64_t width() const { return int64_t(heads + 2 * kv_heads) * dim; }
    // Elements of a row of the result.
    __device__ __forceinline__ int64_t out_width() const { return int64_t(heads) * dim; }
    // First element of a head's column in the rows of sequence b; keys are heads from `heads` on, values from `heads + kv_heads` on.
    __device__ __forceinline__ int64_t at(int b, int head) const { return b * int64_t(seq) * width() + int64_t(head) * dim; }
    __device__ __forceinline__ int64_t out_at(int b, int head) const { return b * int64_t(seq) * out_width() + int64_t(head) * dim; }
    // Of `[B·S, heads]`: the first position's element.
    __device__ __forceinline__ int64_t stat_at(int b, int head) const { return b * int64_t(seq) * heads + head; }
    __device__ __forceinline__ int kv_of(int head) const { return head / (heads / kv_heads); }
};

// The first position from `key` on that no longer sees it: starts ascend.
__device__ __forceinline__ int seen_until(const int* seen_from, int key, int seq) {
    int low = key, high = seq;
    while (low < high) {
        const int middle = (low + high) / 2;
        if (seen_from[middle] <= key) low = middle + 1;
        else high = middle;
    }
    return low;
}
