// Which tile of a grouped GEMM a block works on next. Persistent blocks take every gridDim.x-th tile; all that depends on the
// groups' sizes is read on the device.
//
// Two kinds of groups, as in Mixture-of-Experts layers:
// - Rows: the output's rows are grouped (forward, input gradient). Group g has ⌈rows/BM⌉ × ⌈n/BN⌉ tiles; an empty group has none.
// - Depth: the reduction is grouped (weight gradient). Every group has ⌈m/BM⌉ × ⌈n/BN⌉ tiles, each as deep as the group has rows.
//
// Inside a group, tiles go in bands of BAND row tiles, down the band and then to the next column: blocks that run at the same time
// then share rows of one operand and columns of the other in the L2 cache.

#pragma once

#include <cstdint>

constexpr int MOST_GROUPS = 1024;

struct Tile {
    int group;
    int m;     // row tile inside the group
    int n;     // column tile
    int start; // first row of the group
    int rows;  // rows of the group
};

template <int BAND> __device__ __forceinline__ void place(Tile& tile, int local, int row_tiles, int column_tiles) {
    const int band = local / (BAND * column_tiles);
    const int height = min(BAND, row_tiles - band * BAND);
    const int inside = local - band * BAND * column_tiles;
    tile.m = band * BAND + inside % height;
    tile.n = inside / height;
}

// Grouped rows. `first[g]` in shared memory is the number of row tiles before group g.
template <int BM, int BAND> struct RowSchedule {
    const int* offsets;
    const int* first;
    int groups, column_tiles;
    int group = 0;

    // Fills `first[groups + 1]` with the first warp. Ends without a barrier.
    static __device__ void prepare(int* first, const int* offsets, int groups) {
        if (threadIdx.x >= 32) return;
        const int lane = threadIdx.x;
        int before = 0;
        for (int base = 0; base < groups; base += 32) {
            const int g = base + lane;
            int tiles = g < groups ? (offsets[g + 1] - offsets[g] + BM - 1) / BM : 0;
            int sum = tiles;
#pragma unroll
            for (int d = 1; d < 32; d *= 2) {
                const int other = __shfl_up_sync(0xffffffffu, sum, d);
                if (lane >= d) sum += other;
            }
            if (g < groups) first[g] = before + sum - tiles;
            before += __shfl_sync(0xffffffffu, sum, 31);
        }
        if (lane == 0) first[groups] = before;
    }

    __device__ int tiles() const { return first[groups] * column_tiles; }

    // Tiles are asked for in ascending order.
    __device__ Tile at(int index) {
        while (index >= first[group + 1] * column_tiles) ++group;
        Tile tile;
        tile.group = group;
        tile.start = offsets[group];
        tile.rows = offsets[group + 1] - tile.start;
        place<BAND>(tile, index - first[group] * column_tiles, first[group + 1] - first[group], column_tiles);
        return tile;
    }
};

// Grouped depth.
template <int BAND> struct DepthSchedule {
    const int* offsets;
    int groups, row_tiles, column_tiles;

    __device__ int tiles() const { return groups * row_tiles * column_tiles; }

    __device__ Tile at(int index) {
        const int each = row_tiles * column_tiles;
        Tile tile;
        tile.group = index / each;
        tile.start = offsets[tile.group];
        tile.rows = offsets[tile.group + 1] - tile.start;
        place<BAND>(tile, index - tile.group * each, row_tiles, column_tiles);
        return tile;
    }
};
