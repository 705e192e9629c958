// What tensor-core kernels of sm_80 and later share: tiles in shared memory, warp-wide products (copies into them: copies.cuh).
//
// Owns the swizzle of a tile and the places that a warp's fragments have in it. Addresses of shared memory are u32, as the
// instructions take them.
//
// Fragments of mma.m16n8k16, lane = 4·g + t: A has rows g, g+8 and depths 2t, 2t+1 (+8); B has depths 2t, 2t+1 (+8) of column g; C
// has rows g, g+8 and columns 2t, 2t+1. So C of one product, packed to bf16, is A of the next.

#pragma once

#include "common.cuh"
#include "copies.cuh"

__device__ __forceinline__ uint32_t shared_u32(const void* p) { return uint32_t(__cvta_generic_to_shared(p)); }

// Four 8×8 blocks; lane l gives the address of row l % 8 of block l / 8.
__device__ __forceinline__ void load_blocks(uint32_t (&r)[4], uint32_t at) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(at));
}

// The same, each block transposed.
__device__ __forceinline__ void load_blocks_transposed(uint32_t (&r)[4], uint32_t at) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(at));
}

// c += a · b for 16 rows, 8 columns, 16 deep.
__device__ __forceinline__ void multiply_add(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
                 : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

__device__ __forceinline__ void store_shared(uint32_t at, uint32_t x) {
    asm volatile("st.shared.b32 [%0], %1;" ::"r"(at), "r"(x) : "memory");
}

__device__ __forceinline__ uint4 load_shared16(uint32_t at) {
    uint4 r;
    asm volatile("ld.shared.v4.b32 {%0,%1,%2,%3}, [%4];" : "=r"(r.x), "=r"(r.y), "=r"(r.z), "=r"(r.w) : "r"(at) : "memory");
    return r;
}

__device__ __forceinline__ uint32_t pack(float low, float high) {
    const __nv_bfloat162 r = __floats2bfloat162_rn(low, high);
    return *reinterpret_cast<const uint32_t*>(&r);
}

// A tile in shared memory: rows of D bf16, in chunks of 16 bytes. A chunk's place in its row is its number xor a key of the row,
// chosen so that eight rows' chunks of one number lie in different banks: neither ldmatrix nor 16-byte copies ever conflict.
// A tile begins on 128 bytes; D is a multiple of 32.
template <int D> struct Tile {
    static_assert(D % 32 == 0, "the swizzle moves chunks inside groups of four or eight");
    static constexpr int ROW_BYTES = 2 * D, CHUNKS = D / 8, MASK = D % 64 == 0 ? 7 : 3;

    __device__ static __forceinline__ int key(int row) { return D % 64 == 0 ? row & 7 : (row >> 1) & 3; }

    __device__ static __forceinline__ uint32_t at(uint32_t tile, int row, int chunk) {
        return tile + row * ROW_BYTES + ((chunk ^ key(row)) << 4);
    }

    // From the address of chunk 0 or 1 of a row to that `rows` rows (a multiple of 8) and `chunks` chunks (even) further on.
    __device__ static __forceinline__ uint32_t step(uint32_t from, int rows, int chunks) {
        return (from ^ ((chunks & MASK) << 4)) + (chunks & ~MASK) * 16 + rows * ROW_BYTES;
    }

    // Where this lane's part begins of: the A fragment of 16 rows × 2 chunks of depth; also a transposed pair of B fragments,
    // 16 rows of depth × 2 chunks of columns.
    __device__ static __forceinline__ uint32_t rows16(uint32_t tile, int row, int lane) { return at(tile, row + lane % 16, lane / 16); }

    // The same of a pair of B fragments of 16 columns, which are rows here, × 2 chunks of depth.
    __device__ static __forceinline__ uint32_t columns16(uint32_t tile, int row, int lane) {
        return at(tile, row + lane % 8 + lane / 16 * 8, lane / 8 % 2);
    }

    // Starts copying ROWS rows, `stride` elements apart; rows from `live` on and columns from `width` on become zero.
    template <int ROWS, int THREADS>
    __device__ static __forceinline__ void fetch(uint32_t tile, const bf16* from, int64_t stride, int live, int width) {
        static_assert(ROWS * CHUNKS % THREADS == 0, "every thread copies as many chunks");
#pragma unroll
        for (int i = 0; i < ROWS * CHUNKS / THREADS; ++i) {
            const int item = i * THREADS + int(threadIdx.x), row = item / CHUNKS, chunk = item % CHUNKS;
            const bool there = row < live && chunk * 8 < width;
            copy_async16(at(tile, row, chunk), there ? from + row * stride + chunk * 8 : from, there);
        }
    }

    // Writes a warp's C fragments times a factor for each row half, rounded, over 16 rows of the tile, which only this warp reads.
    template <int N>
    __device__ static __forceinline__ void put(uint32_t tile, int row, int lane, const float (&c)[N][4], float low, float high) {
        __syncwarp();
#pragma unroll
        for (int n = 0; n < N; ++n) {
            store_shared(at(tile, row + lane / 4, n) + lane % 4 * 4, pack(c[n][0] * low, c[n][1] * low));
            store_shared(at(tile, row + lane / 4 + 8, n) + lane % 4 * 4, pack(c[n][2] * high, c[n][3] * high));
        }
    }

    // Copies chunks [0, CHUNKS_OUT) of 16 rows of the tile out, by one warp: the rows before `live`, the columns before `width`.
    template <int CHUNKS_OUT>
    __device__ static __forceinline__ void drain(uint32_t tile, int row, int lane, bf16* to, int64_t stride, int live, int width) {
        static_assert(16 * CHUNKS_OUT % WARP == 0, "every lane copies as many chunks");
#pragma unroll
        for (int i = 0; i < 16 * CHUNKS_OUT / WARP; ++i) {
            const int item = i * WARP + lane, r = row + item / CHUNKS_OUT, chunk = item % CHUNKS_OUT;
            const uint4 x = load_shared16(at(tile, r, chunk));
            if (r < live && chunk * 8 < width) *reinterpret_cast<uint4*>(to + r * stride + chunk * 8) = x;
        }
    }
};
