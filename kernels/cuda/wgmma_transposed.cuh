// The warpgroup products of weight gradients on Hopper: both operands in shared memory and MN-major, of three widths, the narrow ones for a
// matrix's last columns. d[64, N] (+)= A[64, 16] · B[16, N]; d as in wgmma_n256 (hopper.cuh), the first N / 2 of it.

#pragma once

#include "hopper.cuh"

template <int N> struct Columns {};

__device__ __forceinline__ void wgmma_transposed(Columns<192>, float (&d)[96], uint64_t a, uint64_t b, int accumulate) {
    asm volatile(
        "{\n.reg .pred p;\nsetp.ne.b32 p, %98, 0;\n"
        "wgmma.mma_async.sync.aligned.m64n192k16.f32.bf16.bf16 {" WGMMA_R96 "}, %96, %97, p, 1, 1, 1, 1;\n}\n"
        : WGMMA_D96(d)
        : "l"(a), "l"(b), "r"(accumulate));
}

__device__ __forceinline__ void wgmma_transposed(Columns<128>, float (&d)[96], uint64_t a, uint64_t b, int accumulate) {
    asm volatile(
        "{\n.reg .pred p;\nsetp.ne.b32 p, %66, 0;\n"
        "wgmma.mma_async.sync.aligned.m64n128k16.f32.bf16.bf16 {" WGMMA_R64 "}, %64, %65, p, 1, 1, 1, 1;\n}\n"
        : WGMMA_D64(d)
        : "l"(a), "l"(b), "r"(accumulate));
}

__device__ __forceinline__ void wgmma_transposed(Columns<64>, float (&d)[96], uint64_t a, uint64_t b, int accumulate) {
    asm volatile(
        "{\n.reg .pred p;\nsetp.ne.b32 p, %34, 0;\n"
        "wgmma.mma_async.sync.aligned.m64n64k16.f32.bf16.bf16 {" WGMMA_R32 "}, %32, %33, p, 1, 1, 1, 1;\n}\n"
        : WGMMA_D32(d, 0)
        : "l"(a), "l"(b), "r"(accumulate));
}
