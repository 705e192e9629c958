// Elements that are loaded and stored together: 16 bytes where rows allow it, one where they do not.
//
// Owns the two ways a tensor is walked. By rows: every row is a whole number of packs, which the host has checked (width, strides and
// addresses), else packs of one. Flat: `head` elements up to the first multiple of 16 bytes, `packs` whole packs, and the rest.

#pragma once

#include "common.cuh"

template <typename T, int V> struct alignas(V * sizeof(T)) Pack {
    T v[V];
};

template <int V, typename T> __device__ __forceinline__ Pack<T, V> load(const T* p) {
    return *reinterpret_cast<const Pack<T, V>*>(p);
}

template <int V, typename T> __device__ __forceinline__ void store(T* p, const Pack<T, V>& pack) {
    *reinterpret_cast<Pack<T, V>*>(p) = pack;
}

// Packs that are read or written once, and need not stay in the caches.
template <int V, typename T> __device__ __forceinline__ Pack<T, V> load_once(const T* p) {
    if constexpr (V == 1) return load<V>(p);
    Pack<T, V> pack;
    *reinterpret_cast<uint4*>(pack.v) = __ldcs(reinterpret_cast<const uint4*>(p));
    return pack;
}

template <int V, typename T> __device__ __forceinline__ void store_once(T* p, const Pack<T, V>& pack) {
    if constexpr (V == 1) store(p, pack);
    else __stcs(reinterpret_cast<uint4*>(p), *reinterpret_cast<const uint4*>(pack.v));
}

// Elements of a full pack.
template <typename T> constexpr int FULL = 16 / sizeof(T);

// V sums in f32 are added to a gradient at `to`, by 16 bytes where V allows it.
template <int V> __device__ __forceinline__ void add_to(float* to, const float (&sum)[V]) {
    constexpr int F = V < 4 ? V : 4;
#pragma unroll
    for (int i = 0; i < V; i += F) {
        Pack<float, F> old = load<F>(to + i);
#pragma unroll
        for (int j = 0; j < F; ++j) old.v[j] += sum[i + j];
        store(to + i, old);
    }
}

template <int V> __device__ __forceinline__ void set_to(float* to, const float (&sum)[V]) {
    constexpr int F = V < 4 ? V : 4;
#pragma unroll
    for (int i = 0; i < V; i += F) {
        Pack<float, F> pack;
#pragma unroll
        for (int j = 0; j < F; ++j) pack.v[j] = sum[i + j];
        store(to + i, pack);
    }
}

// How the host cut a flat tensor. `packs` is 0 where operands do not reach 16 bytes together.
struct Cut {
    long n, head, packs;

    // Elements outside of whole packs, and the index of number `r` of them.
    __device__ __forceinline__ long outside(int pack) const { return n - packs * pack; }
    __device__ __forceinline__ long index(long r, int pack) const { return r < head ? r : r + packs * pack; }
};

__device__ __forceinline__ long flat_thread() { return blockIdx.x * long(blockDim.x) + threadIdx.x; }
__device__ __forceinline__ long flat_threads() { return gridDim.x * long(blockDim.x); }
