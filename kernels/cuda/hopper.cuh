// What only Hopper has, one wrapper an instruction: transaction barriers, the bulk tensor copy engine (TMA), warpgroup matrix
// multiplication (wgmma), register hand-over. Names and operands as in the PTX ISA 9.0, chapters "mbarrier", "cp.async.bulk.tensor",
// "wgmma".

#pragma once

#include <cuda.h>
#include <cuda_bf16.h>
#include <cstdint>

#include "wgmma_operands.cuh"

using bf16 = __nv_bfloat16;

__device__ __forceinline__ uint32_t shared_address(const void* p) { return static_cast<uint32_t>(__cvta_generic_to_shared(p)); }

// A barrier of `arrivals` threads, made by one thread; fence_barrier_init and a __syncthreads() come before its first use.
__device__ __forceinline__ void barrier_init(uint64_t* barrier, int arrivals) {
    asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(shared_address(barrier)), "r"(arrivals));
}

__device__ __forceinline__ void fence_barrier_init() { asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory"); }

__device__ __forceinline__ void barrier_arrive(uint64_t* barrier) {
    asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(shared_address(barrier)) : "memory");
}

// Arrives, and lets the phase end only after `bytes` more bytes have been copied in.
__device__ __forceinline__ void barrier_expect(uint64_t* barrier, int bytes) {
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(barrier)), "r"(bytes) : "memory");
}

// Waits until the phase of this parity has ended.
__device__ __forceinline__ void barrier_wait(uint64_t* barrier, int parity) {
    asm volatile(
        "{\n.reg .pred p;\n"
        "again:\nmbarrier.try_wait.parity.shared::cta.b64 p, [%0], %1;\n"
        "@p bra done;\nbra again;\ndone:\n}\n" ::"r"(shared_address(barrier)), "r"(parity)
        : "memory");
}

// Copies the box at column x, row y of a matrix into shared memory; what lies outside the matrix becomes zero.
__device__ __forceinline__ void tma_load(void* to, const CUtensorMap* map, uint64_t* barrier, int x, int y) {
    asm volatile(
        "cp.async.bulk.tensor.2d.shared::cluster.global.tile.mbarrier::complete_tx::bytes [%0], [%1, {%3, %4}], [%2];" ::"r"(
            shared_address(to)),
        "l"(map), "r"(shared_address(barrier)), "r"(x), "r"(y)
        : "memory");
}

// Copies a box in shared memory to column x, row y, matrix z, or adds it to what is there; what lies outside is left out. Runs on
// after the call; store_commit() closes a group of them, store_wait_read() waits until at most N groups still read shared memory.
template <bool ADD> __device__ __forceinline__ void tma_store(const CUtensorMap* map, const void* from, int x, int y, int z) {
    if constexpr (ADD)
        asm volatile("cp.reduce.async.bulk.tensor.3d.global.shared::cta.add.tile.bulk_group [%0, {%2, %3, %4}], [%1];" ::"l"(map),
                     "r"(shared_address(from)), "r"(x), "r"(y), "r"(z)
                     : "memory");
    else
        asm volatile("cp.async.bulk.tensor.3d.global.shared::cta.tile.bulk_group [%0, {%2, %3, %4}], [%1];" ::"l"(map),
                     "r"(shared_address(from)), "r"(x), "r"(y), "r"(z)
                     : "memory");
}

__device__ __forceinline__ void store_commit() { asm volatile("cp.async.bulk.commit_group;" ::: "memory"); }
template <int N> __device__ __forceinline__ void store_wait_read() { asm volatile("cp.async.bulk.wait_group.read %0;" ::"n"(N) : "memory"); }
// Waits until everything stored so far has arrived.
__device__ __forceinline__ void store_wait() { asm volatile("cp.async.bulk.wait_group 0;" ::: "memory"); }

__device__ __forceinline__ void tma_prefetch(const CUtensorMap* map) {
    asm volatile("prefetch.tensormap [%0];" ::"l"(map) : "memory");
}

// Ordinary writes to shared memory of this thread become visible to wgmma and TMA.
__device__ __forceinline__ void fence_async() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }

// `threads` threads meet at barrier `id` (1 to 15; 0 is __syncthreads()).
__device__ __forceinline__ void meet(int id, int threads) { asm volatile("bar.sync %0, %1;" ::"r"(id), "r"(threads) : "memory"); }

// As meet, without waiting for the others.
__device__ __forceinline__ void come(int id, int threads) { asm volatile("bar.arrive %0, %1;" ::"r"(id), "r"(threads) : "memory"); }

template <int N> __device__ __forceinline__ void registers_up() { asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(N)); }
template <int N> __device__ __forceinline__ void registers_down() { asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(N)); }

// The operand at `p` in shared memory, rows of 128 bytes in the 128-byte swizzle that TMA writes. `lbo` and `sbo` are byte strides:
// K-major (rows are of M or N, 64 elements of K each): sbo from 8 rows to the next 8, lbo not used.
// MN-major (rows are of K, 64 elements of M or N each): sbo from 8 rows to the next 8, lbo from 64 columns to the next 64.
__device__ __forceinline__ uint64_t descriptor(const void* p, uint32_t lbo, uint32_t sbo) {
    const uint64_t address = (shared_address(p) & 0x3ffff) >> 4;
    return address | uint64_t(lbo >> 4) << 16 | uint64_t(sbo >> 4) << 32 | uint64_t(1) << 62;
}

__device__ __forceinline__ void wgmma_fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
__device__ __forceinline__ void wgmma_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
template <int N> __device__ __forceinline__ void wgmma_wait() { asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(N) : "memory"); }

// d[64, N] (+)= A[64, 16] · B[16, N], a warpgroup together. Thread t holds, of columns 8j + 2(t % 4) and the next: d[4j], d[4j + 1] of row
// 16(t / 32) + t % 32 / 4, and d[4j + 2], d[4j + 3] of the row 8 below. TRANSPOSE_x: the operand is MN-major.
template <int TRANSPOSE_A, int TRANSPOSE_B> __device__ __forceinline__ void wgmma_n256(float (&d)[128], uint64_t a, uint64_t b, int accumulate) {
    asm volatile(
        "{\n.reg .pred p;\nsetp.ne.b32 p, %130, 0;\n"
        "wgmma.mma_async.sync.aligned.m64n256k16.f32.bf16.bf16 {" WGMMA_R128 "}, %128, %129, p, 1, 1, %131, %132;\n}\n"
        : WGMMA_D128(d)
        : "l"(a), "l"(b), "r"(accumulate), "n"(TRANSPOSE_A), "n"(TRANSPOSE_B));
}
