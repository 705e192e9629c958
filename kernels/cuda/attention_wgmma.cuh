// The warpgroup products of attention on Hopper: scores from shared memory, and weights in registers times values. Fragments of A in
// registers are those of mma.cuh, a warp's 16 of the 64 rows; so is d, as d[4·n + i] for its fragment c[n][i].

#pragma once

#include "hopper.cuh"
#include "mma.cuh"

// d[64, N] (+)= A[64, 16] · B[16, N], both in shared memory and K-major.
__device__ __forceinline__ void wgmma_scores(float (&d)[32], uint64_t a, uint64_t b, int accumulate) {
    asm volatile(
        "{\n.reg .pred p;\nsetp.ne.b32 p, %34, 0;\n"
        "wgmma.mma_async.sync.aligned.m64n64k16.f32.bf16.bf16 {" WGMMA_R32 "}, %32, %33, p, 1, 1, 0, 0;\n}\n"
        : WGMMA_D32(d, 0)
        : "l"(a), "l"(b), "r"(accumulate));
}

__device__ __forceinline__ void wgmma_scores(float (&d)[64], uint64_t a, uint64_t b, int accumulate) {
    asm volatile(
        "{\n.reg .pred p;\nsetp.ne.b32 p, %66, 0;\n"
        "wgmma.mma_async.sync.aligned.m64n128k16.f32.bf16.bf16 {" WGMMA_R64 "}, %64, %65, p, 1, 1, 0, 0;\n}\n"
        : WGMMA_D64(d)
        : "l"(a), "l"(b), "r"(accumulate));
}

// d[64, N] += A[64, 16] · B[16, N]; B is in shared memory, MN-major.
__device__ __forceinline__ void wgmma_values(float (&d)[32], const uint32_t (&a)[4], uint64_t b) {
    asm volatile(
        "wgmma.mma_async.sync.aligned.m64n64k16.f32.bf16.bf16 {" WGMMA_R32 "}, "
        "{%32, %33, %34, %35}, %36, 1, 1, 1, 1;\n"
        : WGMMA_D32(d, 0)
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b));
}

__device__ __forceinline__ void wgmma_values(float (&d)[64], const uint32_t (&a)[4], uint64_t b) {
    asm volatile(
        "wgmma.mma_async.sync.aligned.m64n128k16.f32.bf16.bf16 {" WGMMA_R64 "}, "
        "{%64, %65, %66, %67}, %68, 1, 1, 1, 1;\n"
        : WGMMA_D64(d)
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b));
}

// After a wait for the product into d: nothing that reads d may come before.
template <int N> __device__ __forceinline__ void hold(float (&d)[N]) {
#pragma unroll
    for (int i = 0; i < N; ++i) asm volatile("" : "+f"(d[i])::"memory");
}

// C fragments of 64 × N, packed: the A fragments of a product that is N deep.
template <int N> __device__ __forceinline__ void pack_left(uint32_t (&a)[N / 16][4], const float (&c)[N / 2]) {
#pragma unroll
    for (int n = 0; n < N / 8; ++n) {
        a[n / 2][n % 2 * 2] = pack(c[4 * n], c[4 * n + 1]);
        a[n / 2][n % 2 * 2 + 1] = pack(c[4 * n + 2], c[4 * n + 3]);
    }
}

// ROWS rows of D bf16 as wgmma reads them: panels of 64 columns, rows of 128 bytes in the 128-byte swizzle, which is Tile<64>'s. Begins
// on 1024 bytes.
template <int D, int ROWS> struct Panels {
    static constexpr int COUNT = D / 64, PANEL_BYTES = ROWS * 128, BYTES = COUNT * PANEL_BYTES;

    // Starts copying the rows by 256 threads; rows from `live` on and columns from `width` on become zero.
    __device__ static __forceinline__ void fetch(unsigned char* to, const bf16* from, int64_t stride, int live, int width) {
#pragma unroll
        for (int panel = 0; panel < COUNT; ++panel) {
            Tile<64>::fetch<ROWS, 256>(shared_u32(to) + panel * PANEL_BYTES, from + panel * 64, stride, live, width - panel * 64);
        }
    }

    // The operand whose depth is columns `depth` to depth + 15, rows from `row` (a multiple of 8) on.
    __device__ static __forceinline__ uint64_t by_columns(const unsigned char* at, int row, int depth) {
        return descriptor(at + depth / 64 * PANEL_BYTES + depth % 64 * 2 + row * 128, 0, 1024);
    }

    // The operand whose depth is rows `depth` to depth + 15, all columns.
    __device__ static __forceinline__ uint64_t by_rows(const unsigned char* at, int depth) {
        return descriptor(at + depth * 128, PANEL_BYTES, 1024);
    }

    // Writes a warp's 16 of 64 × D sums, each row half times its factor, through rows `row` on of the panels to `to`: the rows before
    // `live`, the columns before `width`.
    __device__ static __forceinline__ void store(unsigned char* at, int row, int lane, const float (&sums)[D / 2], float low, float high,
                                                 bf16* to, int64_t stride, int live, int width) {
#pragma unroll
        for (int panel = 0; panel < COUNT; ++panel) {
            const uint32_t tile = shared_u32(at) + panel * PANEL_BYTES;
            float c[8][4];
#pragma unroll
            for (int i = 0; i < 32; ++i) c[i / 4][i % 4] = sums[panel * 32 + i];
            Tile<64>::put(tile, row, lane, c, low, high);
            __syncwarp();
            Tile<64>::drain<8>(tile, row, lane, to + panel * 64, stride, live, width - panel * 64);
        }
    }
};
