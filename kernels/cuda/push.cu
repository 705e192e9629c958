// Rows into the memory of other GPUs: each rank stores its rows where they are wanted and says so, and is through once all have told
// it that theirs have come.
//
// Row i < N belongs to the peer p with starts[p] ≤ i < starts[p + 1], and goes to its row i − starts[p] of rows[p]; numbers that go
// along, to the same row of ids[p] and weights[p]. It is
// push_rows: from[index[i]], or from[i], of from [·, width], index [N] i32 or none; along: ids [N, k] i32 or none, weights [N, k] f32
//   or none.                                                                                        Bytes: 2·N·width·size.
// push_sums: Σ_j weights[i, j]·y[slots[i, j]], in f32 and ascending order, of y [·, width], slots [N, k] i32 (−1: none), weights [N, k]
//   f32 or none, k ≤ 32; along: along [N, k] f32 or none, to weights[p].                  Bytes: (N + slots that are rows)·width·size.
//
// Bound: the link, for what goes to other peers. Peers are served in turn, row by row, so that no one is everybody's first and this
// rank's own rows leave no gap on the link. Rows are moved in packs of 16 bytes and exported as NAME_wide…; widths or addresses off 16
// bytes take two bytes or one element at a time.
//
// Order (PTX memory model): a block's stores come before its ticket (barrier, system fence), the tickets before the marks (system
// fence, release), a mark before what is launched behind the kernel of the peer that acquired it. `mark` grows with every push of the
// group; 0: nobody is told and nobody is waited for. A wait ends when `halt`, a word of the host's memory, is not 0: then what came is
// anything.
//
// A product that is launched in the same moment takes every multiprocessor before a push has one, however urgent its stream; give_way in
// front of the product lets the push begin. It is a courtesy, not an order: it has an end of its own.

#include "reduce.cuh"

constexpr int MOST_PEERS = 16;
constexpr int THREADS = 512;

// As kernels/src/cuda/peers.rs lays it out.
struct Peers {
    uint64_t rows[MOST_PEERS], ids[MOST_PEERS], weights[MOST_PEERS];
    // [ranks] u32 at each peer: what each rank has told it.
    uint64_t marks[MOST_PEERS];
    int starts[MOST_PEERS + 1];
    int ranks, me;
    unsigned mark;
    // The number of this push among those of its queue.
    unsigned turn;
};

// What pushes of one queue share.
struct Desk {
    // Blocks that are through; 0 before and after.
    unsigned tickets;
    int unused;
    // The last push that has begun.
    unsigned begun;
};

__device__ __forceinline__ void tell(uint64_t marks, int me, unsigned mark) {
    asm volatile("st.release.sys.global.u32 [%0], %1;" ::"l"(marks + 4ull * me), "r"(mark) : "memory");
}

__device__ __forceinline__ unsigned told(uint64_t marks, int rank) {
    unsigned mark;
    asm volatile("ld.acquire.sys.global.u32 %0, [%1];" : "=r"(mark) : "l"(marks + 4ull * rank) : "memory");
    return mark;
}

// One warp copies a row.
template <typename P> __device__ __forceinline__ void copy_row(int packs, const P* from, P* to) {
    constexpr int FLIGHT = 8;
    int pack = threadIdx.x % WARP;
    for (; pack + (FLIGHT - 1) * WARP < packs; pack += FLIGHT * WARP) {
        P held[FLIGHT];
#pragma unroll
        for (int i = 0; i < FLIGHT; i++) held[i] = from[pack + i * WARP];
#pragma unroll
        for (int i = 0; i < FLIGHT; i++) to[pack + i * WARP] = held[i];
    }
    for (; pack < packs; pack += WARP) to[pack] = from[pack];
}

// The last block to come here tells every peer, and waits for all of them. All threads call it.
__device__ void meet(const Peers& peers, Desk* desk, const volatile int* halt) {
    __shared__ bool last;
    __syncthreads();
    if (threadIdx.x == 0) {
        __threadfence_system();
        last = atomicAdd(&desk->tickets, 1) == gridDim.x - 1;
        if (last) desk->tickets = 0;
        __threadfence_system();
    }
    __syncthreads();
    const int peer = threadIdx.x;
    if (!last || peer >= peers.ranks) return;
    tell(peers.marks[peer], peers.me, peers.mark);
    for (unsigned looks = 1; int(told(peers.marks[peers.me], peer) - peers.mark) < 0; ++looks)
        if (looks % 256 == 0 && *halt != 0) return;
}

// Has each warp store its share of rows: `store(row, peer, there)`, there: the row of the peer's memory. All threads call it.
template <typename Store>
__device__ __forceinline__ void share_rows(const Peers& peers, Desk* desk, const volatile int* halt, Store store) {
    // Blocks begin in order.
    if (blockIdx.x == gridDim.x - 1 && threadIdx.x == 0) *const_cast<volatile unsigned*>(&desk->begun) = peers.turn;
    const int warps = gridDim.x * (THREADS / WARP), ranks = peers.ranks;
    int most = 0;
    for (int peer = 0; peer < ranks; ++peer) most = max(most, peers.starts[peer + 1] - peers.starts[peer]);
    for (int i = (blockIdx.x * THREADS + threadIdx.x) / WARP; i < most * ranks; i += warps) {
        const int there = i / ranks, peer = (peers.me + 1 + i % ranks) % ranks, row = peers.starts[peer] + there;
        if (row < peers.starts[peer + 1]) store(row, peer, long(there));
    }
    if (peers.mark != 0) meet(peers, desk, halt);
}

template <typename P>
__device__ __forceinline__ void push_rows(const Peers& peers, int packs, const int* index, const P* from, int k, const int* ids,
                                          const float* weights, Desk* desk, const volatile int* halt) {
    const int lane = threadIdx.x % WARP;
    share_rows(peers, desk, halt, [&](int row, int peer, long there) {
        copy_row(packs, from + long(index ? index[row] : row) * packs, reinterpret_cast<P*>(peers.rows[peer]) + there * packs);
        if (lane >= k) return;
        if (ids) reinterpret_cast<int*>(peers.ids[peer])[there * k + lane] = ids[long(row) * k + lane];
        if (weights) reinterpret_cast<float*>(peers.weights[peer])[there * k + lane] = weights[long(row) * k + lane];
    });
}

template <typename Act, int N>
__device__ __forceinline__ void push_sums(const Peers& peers, int width, int k, const int* slots, const float* weights, const Act* y,
                                          const float* along, Desk* desk, const volatile int* halt) {
    share_rows(peers, desk, halt, [&](int row, int peer, long there) {
        const long at = long(row) * k;
        Act* to = reinterpret_cast<Act*>(peers.rows[peer]) + there * width;
        reduce_row<Act, N>(k, width, slots + at, weights ? weights + at : nullptr, y, to);
        const int lane = threadIdx.x % WARP;
        if (along && lane < k) reinterpret_cast<float*>(peers.weights[peer])[there * k + lane] = along[at + lane];
    });
}

#define ROWS(NAME, PACK)                                                                                                          \
    extern "C" __global__ void __launch_bounds__(THREADS, 2)                                                                      \
        NAME(const __grid_constant__ Peers peers, int packs, const int* index, const PACK* from, int k, const int* ids,           \
             const float* weights, Desk* desk, const int* halt) {                                                                 \
        push_rows<PACK>(peers, packs, index, from, k, ids, weights, desk, halt);                                                  \
    }
ROWS(push_rows_wide, uint4)
ROWS(push_rows, uint16_t)

#define SUMS(NAME, ACT, N)                                                                                                        \
    extern "C" __global__ void __launch_bounds__(THREADS, 2)                                                                      \
        NAME(const __grid_constant__ Peers peers, int width, int k, const int* slots, const float* weights, const ACT* y,         \
             const float* along, Desk* desk, const int* halt) {                                                                   \
        push_sums<ACT, N>(peers, width, k, slots, weights, y, along, desk, halt);                                                 \
    }
SUMS(push_sums_wide_f32, float, 4)
SUMS(push_sums_wide_bf16, bf16, 8)
SUMS(push_sums_f32, float, 1)
SUMS(push_sums_bf16, bf16, 1)

__device__ __forceinline__ uint64_t nanoseconds() {
    uint64_t now;
    asm volatile("mov.u64 %0, %globaltimer;" : "=l"(now));
    return now;
}

// One thread. Ends when push number `turn` of the queue that `desk` is of has begun, and after `patience` nanoseconds.
extern "C" __global__ void give_way(const volatile Desk* desk, unsigned turn, uint64_t patience) {
    const uint64_t end = nanoseconds() + patience;
    while (int(desk->begun - turn) < 0 && nanoseconds() < end) {}
}
