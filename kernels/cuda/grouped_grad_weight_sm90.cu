// Weight gradients of the experts' matrices on Hopper, all of a rank's experts in one launch; bf16 with f32 sums.
//
//   dw[g, out, in] (+)= Σ_i dy[i, out] x[i, in], f32, over the rows i = offsets[g] .. offsets[g+1] of each group g
// Letters and rules as in grouped_gemm_sm90.cu. A group without rows gets zeros, or is left alone where sums are added.
//
// Bound: tensor cores, 2·N·in·out operations, where groups are deep; bytes (N·in + N·out)·2 and 4 (or 8 where it adds) a weight, where not.
// A tile is 128 × 192 and belongs to one of two consumer warpgroups, whose mainloops alternate: while one stores its tile, through shared
// memory by TMA, the other has the tensor cores. The last columns of a matrix are 64 or 128 wide where that is all there is. One thread copies operands, four
// stages of 64 rows; a warp zeroes rows beyond the group's end. Blocks ask for their next tile one ahead, so that they stay close
// together in L2 whatever the groups' sizes. The order of sums is fixed: rows ascending.
// Versions, of torch._grouped_mm's rate, geometric mean of 18 cases: a tile of 128 × 256 for both warpgroups 0.96 → a tile each 0.97 →
// tiles asked for 1.01 → four stages instead of five 1.03 (docs/benchmarks.md).

#include "grouped_schedule.cuh"
#include "wgmma_transposed.cuh"

namespace {

constexpr int BM = 128, BN = 192, BK = 64, STAGES = 4, BAND = 16;
constexpr int CONSUMERS = 256, THREADS = CONSUMERS + 128;
constexpr int BOX_BYTES = 64 * 128; // 64 rows of 64 bf16, as TMA writes them
constexpr int A_BYTES = BM / 64 * BOX_BYTES, STAGE_BYTES = A_BYTES + BN / 64 * BOX_BYTES;
constexpr int OUT_BYTES = 16 * 128; // 16 rows of 32 f32, a box that leaves a consumer warp
constexpr int ALIGNMENT = 1024;     // of boxes in the 128-byte swizzle
constexpr int ASKED = 4;            // tiles that the producer may be ahead

struct Shared {
    uint8_t *stages, *out;
    uint64_t *full, *empty, *repaired, *told, *heard;
    int* tiles;

    __device__ explicit Shared(uint8_t* raw) {
        stages = raw + (ALIGNMENT - shared_address(raw) % ALIGNMENT) % ALIGNMENT;
        out = stages + STAGES * STAGE_BYTES;
        full = reinterpret_cast<uint64_t*>(out + CONSUMERS / 32 * OUT_BYTES);
        empty = full + STAGES;
        repaired = empty + STAGES;
        told = repaired + STAGES;
        heard = told + ASKED;
        tiles = reinterpret_cast<int*>(heard + ASKED);
    }
    __device__ uint8_t* a(int stage) const { return stages + stage * STAGE_BYTES; }
    __device__ uint8_t* b(int stage) const { return a(stage) + A_BYTES; }
};

// A place in a ring of SIZE and the parity of its phase.
template <int SIZE> struct Ring {
    int place = 0, parity = 0;
    __device__ void advance(int n = 1) {
        place += n;
        parity ^= place / SIZE & 1;
        place %= SIZE;
    }
};

struct Sizes {
    const int* offsets;
    int groups, rows, columns; // of a group's matrix
};

__device__ DepthSchedule<BAND> schedule(const Sizes& s) {
    return {s.offsets, s.groups, (s.rows + BM - 1) / BM, (s.columns + BN - 1) / BN};
}

__device__ int depth_blocks(const Tile& tile) { return (tile.rows + BK - 1) / BK; }

// Boxes of 64 columns that a tile has.
__device__ int boxes(const Sizes& s, const Tile& tile) {
    return min(BN / 64, (s.columns - tile.n * BN + 63) / 64);
}

// The next tile's number, as the producer told it to all warps. One lane reads it, the one that says so.
__device__ int hear(const Shared& shared, Ring<ASKED>& turn) {
    int index = 0;
    if (threadIdx.x % 32 == 0) {
        barrier_wait(&shared.told[turn.place], turn.parity);
        index = shared.tiles[turn.place];
        barrier_arrive(&shared.heard[turn.place]);
    }
    turn.advance();
    return __shfl_sync(0xffffffffu, index, 0);
}

// One thread copies all tiles of this block, stage after stage. `next` counts the tiles that blocks have asked for.
__device__ void produce(const Shared& shared, const Sizes& s, const CUtensorMap* map_a, const CUtensorMap* map_b, int* next) {
    tma_prefetch(map_a);
    tma_prefetch(map_b);
    auto tiles = schedule(s);
    Ring<STAGES> at;
    Ring<ASKED> turn;
    for (int index = blockIdx.x, after;; index = after) {
        barrier_wait(&shared.heard[turn.place], turn.parity ^ 1);
        shared.tiles[turn.place] = index;
        barrier_arrive(&shared.told[turn.place]);
        turn.advance();
        if (index >= tiles.tiles()) return;
        after = atomicAdd(next, 1) + gridDim.x;
        const Tile tile = tiles.at(index);
        const int blocks = depth_blocks(tile), wide = boxes(s, tile);
        for (int block = 0; block < blocks; ++block, at.advance()) {
            barrier_wait(&shared.empty[at.place], at.parity ^ 1);
            uint64_t* full = &shared.full[at.place];
            barrier_expect(full, A_BYTES + wide * BOX_BYTES);
            const int row = tile.start + block * BK;
#pragma unroll
            for (int i = 0; i < BM / 64; ++i) tma_load(shared.a(at.place) + i * BOX_BYTES, map_a, full, tile.m * BM + i * 64, row);
#pragma unroll
            for (int i = 0; i < BN / 64; ++i)
                if (i < wide) tma_load(shared.b(at.place) + i * BOX_BYTES, map_b, full, tile.n * BN + i * 64, row);
        }
    }
}

// The rows of a group's last block that are not its own are set to zero in both operands, since a sum runs over them: a warp of the
// producer's warpgroup does it, so that the consumers need not meet.
__device__ void repair(const Shared& shared, const Sizes& s) {
    auto tiles = schedule(s);
    const int lane = threadIdx.x % 32;
    Ring<STAGES> at;
    Ring<ASKED> turn;
    for (int index; (index = hear(shared, turn)) < tiles.tiles();) {
        const Tile tile = tiles.at(index);
        const int blocks = depth_blocks(tile), valid = tile.rows % BK, wide = BM / 64 + boxes(s, tile);
        for (int block = 0; block < blocks; ++block, at.advance()) {
            // Every block is waited for and given back, so that no phase is taken for the one before the last.
            barrier_wait(&shared.full[at.place], at.parity);
            if (valid != 0 && block + 1 == blocks) {
                for (int box = 0; box < wide; ++box)
                    for (int byte = valid * 128 + lane * 16; byte < BOX_BYTES; byte += 32 * 16)
                        *reinterpret_cast<uint4*>(shared.a(at.place) + box * BOX_BYTES + byte) = make_uint4(0, 0, 0, 0);
                fence_async();
                __syncwarp();
                if (lane == 0) barrier_arrive(&shared.repaired[at.place]);
            }
            if (lane == 0) barrier_arrive(&shared.empty[at.place]);
        }
    }
}

// 128 × 192 sums: the upper 64 rows and the lower ones.
using Sums = float[2][BN / 2];

// Multiplies one stage into the sums: four steps of 16 deep.
template <int N, bool FRESH> __device__ __forceinline__ void multiply(Sums& d, const uint8_t* a, const uint8_t* b) {
    constexpr uint64_t NEXT = 16 * 128 / 16; // 16 rows on, in the descriptor's units of 16 bytes
    const uint64_t da = descriptor(a, BOX_BYTES, 1024), db = descriptor(b, BOX_BYTES, 1024);
    wgmma_fence();
#pragma unroll
    for (int i = 0; i < BK / 16; ++i)
#pragma unroll
        for (int h = 0; h < 2; ++h)
            wgmma_transposed(Columns<N>{}, d[h], da + h * (BOX_BYTES / 16) + i * NEXT, db + i * NEXT, !(FRESH && i == 0));
    wgmma_commit();
}

// A tile's products. Before the last block the other warpgroup is let in (`other` is its barrier); a stage is given back when the
// products of the next one are under way.
template <int N>
__device__ __forceinline__ void accumulate(Sums& d, const Shared& shared, Ring<STAGES>& at, int blocks, bool partial, int& repaired, int other) {
    const auto arrive_at = [&](int block) {
        barrier_wait(&shared.full[at.place], at.parity);
        if (block + 1 == blocks) come(other, CONSUMERS);
        if (partial && block + 1 == blocks) {
            barrier_wait(&shared.repaired[at.place], repaired >> at.place & 1);
            repaired ^= 1 << at.place;
        }
    };
    const auto give_back = [&](int stage) {
        if (threadIdx.x % 32 == 0) barrier_arrive(&shared.empty[stage]);
    };
    arrive_at(0);
    multiply<N, true>(d, shared.a(at.place), shared.b(at.place));
    int before = at.place;
    at.advance();
    for (int block = 1; block < blocks; ++block) {
        arrive_at(block);
        multiply<N, false>(d, shared.a(at.place), shared.b(at.place));
        wgmma_wait<1>();
        give_back(before);
        before = at.place;
        at.advance();
    }
    wgmma_wait<0>();
    give_back(before);
}

struct Outputs {
    const CUtensorMap* dw; // [E, rows, columns] f32
    bool add;              // to what is there
};

// The warp's box of shared memory goes to 16 rows and 32 columns of its tile: rows of the upper or lower half, number `box` of the columns.
__device__ __forceinline__ void send(const Outputs& out, const uint8_t* from, const Tile& tile, int warp, int half, int box) {
    const int x = tile.n * BN + box * 32, y = tile.m * BM + half * 64 + warp % 4 * 16;
    if (out.add) tma_store<true>(out.dw, from, x, y, tile.group);
    else tma_store<false>(out.dw, from, x, y, tile.group);
    store_commit();
}

// The gradient of a group without rows, where it replaces what was there.
__device__ void store_zeros(uint8_t* to, const Outputs& out, const Tile& tile, int warp, int lane) {
    if (lane == 0) store_wait_read<0>();
    __syncwarp();
    for (int at = lane * 16; at < OUT_BYTES; at += 32 * 16) *reinterpret_cast<uint4*>(to + at) = make_uint4(0, 0, 0, 0);
    fence_async();
    __syncwarp();
    if (lane == 0)
        for (int box = 0; box < BN / 32; ++box) send(out, to, tile, warp, 0, box), send(out, to, tile, warp, 1, box);
}

// A warp's sums leave through its shared memory, a box after the other. Nobody else adds to these elements in this launch, so that adding
// in memory keeps the order of sums.
__device__ __forceinline__ void store(const Sums& d, uint8_t* to, const Sizes& s, const Outputs& out, const Tile& tile, int warp, int lane) {
    const int row = lane / 4, q = lane % 4, odd = row & 1;
#pragma unroll
    for (int half = 0; half < 2; ++half)
#pragma unroll
        for (int box = 0; box < BN / 32; ++box) {
            if (tile.n * BN + box * 32 >= s.columns) continue;
            if (lane == 0) store_wait_read<0>();
            __syncwarp();
#pragma unroll
            for (int lower = 0; lower < 2; ++lower)
#pragma unroll
                for (int j = 0; j < 4; ++j) {
                    // Odd rows are two chunks of columns ahead, so that 16 lanes reach all banks.
                    const int even_at = 4 * (box * 4 + j) + 2 * lower, odd_at = 4 * (box * 4 + (j ^ 2)) + 2 * lower;
                    const float2 v = odd ? make_float2(d[half][odd_at], d[half][odd_at + 1]) : make_float2(d[half][even_at], d[half][even_at + 1]);
                    const int chunk = (2 * (j ^ 2 * odd) + q / 2) ^ row; // 16-byte chunks are swizzled as TMA expects
                    *reinterpret_cast<float2*>(to + (row + 8 * lower) * 128 + chunk * 16 + q % 2 * 8) = v;
                }
            fence_async();
            __syncwarp();
            if (lane == 0) send(out, to, tile, warp, half, box);
        }
}

__device__ void consume(const Shared& shared, const Sizes& s, const Outputs& out) {
    const int warp = threadIdx.x / 32 - 4, lane = threadIdx.x % 32, mine = warp / 4;
    uint8_t* box = shared.out + warp * OUT_BYTES;
    auto tiles = schedule(s);
    Ring<STAGES> at;
    Ring<ASKED> turn;
    int repaired = 0; // a bit a stage: the parity of its next repair
    int owner = 0;    // whose tile it is
    if (mine == 1) come(1, CONSUMERS);
    for (int index; (index = hear(shared, turn)) < tiles.tiles(); owner ^= 1) {
        const Tile tile = tiles.at(index);
        const int blocks = depth_blocks(tile);
        const bool partial = tile.rows % BK != 0;
        if (owner != mine) {
            at.advance(blocks);
            if (partial) repaired ^= 1 << (at.place + STAGES - 1) % STAGES;
            continue;
        }
        meet(1 + mine, CONSUMERS);
        if (blocks == 0) {
            come(2 - mine, CONSUMERS);
            if (!out.add) store_zeros(box, out, tile, warp, lane);
            continue;
        }
        Sums d;
        const int wide = boxes(s, tile);
        if (wide == 3) accumulate<192>(d, shared, at, blocks, partial, repaired, 2 - mine);
        else if (wide == 2) accumulate<128>(d, shared, at, blocks, partial, repaired, 2 - mine);
        else accumulate<64>(d, shared, at, blocks, partial, repaired, 2 - mine);
        store(d, box, s, out, tile, warp, lane);
    }
    if (lane == 0) store_wait();
}

} // namespace

// `asked` is two integers, zero before and after: tiles that blocks have asked for, and blocks that are done.
extern "C" __global__ void __launch_bounds__(THREADS, 1)
    grouped_grad_weight_sm90(const __grid_constant__ CUtensorMap dy, const __grid_constant__ CUtensorMap x,
                             const __grid_constant__ CUtensorMap dw, const int* offsets, int groups, int rows, int columns, int add, int* asked) {
    extern __shared__ uint8_t raw[];
    const Shared shared(raw);
    const Sizes s{offsets, groups, rows, columns};
    if (threadIdx.x == 0) {
        for (int i = 0; i < STAGES; ++i) {
            barrier_init(&shared.full[i], 1);
            barrier_init(&shared.repaired[i], 1);
            barrier_init(&shared.empty[i], CONSUMERS / 64 + 1);
        }
        for (int i = 0; i < ASKED; ++i) {
            barrier_init(&shared.told[i], 1);
            barrier_init(&shared.heard[i], CONSUMERS / 32 + 1);
        }
        fence_barrier_init();
    }
    __syncthreads();
    if (threadIdx.x < 128) {
        registers_down<40>();
        if (threadIdx.x == 0) {
            produce(shared, s, &dy, &x, asked);
            // The last block to be done leaves the counters as it found them.
            __threadfence();
            if (atomicAdd(asked + 1, 1) + 1 == gridDim.x) asked[0] = asked[1] = 0;
        } else if (threadIdx.x / 32 == 1) {
            repair(shared, s);
        }
    } else {
        registers_up<232>();
        consume(shared, s, Outputs{&dw, add != 0});
    }
}
