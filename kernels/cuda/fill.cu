// Fill: x[i] = value, for elements of 2, 4 or 8 bytes given as bits.                                     (Device::fill)
// Bound: memory, n · bytes written.

#include "common.cuh"

template <typename T> __device__ void fill(T* x, T value, long n) {
    for (long i = blockIdx.x * long(blockDim.x) + threadIdx.x; i < n; i += long(gridDim.x) * blockDim.x) x[i] = value;
}

extern "C" __global__ void __launch_bounds__(256) fill_b16(uint16_t* x, uint16_t value, long n) { fill(x, value, n); }
extern "C" __global__ void __launch_bounds__(256) fill_b32(uint32_t* x, uint32_t value, long n) { fill(x, value, n); }
extern "C" __global__ void __launch_bounds__(256) fill_b64(uint64_t* x, uint64_t value, long n) { fill(x, value, n); }
