// Grouped GEMM on Hopper, bf16 with f32 accumulation: the experts' matrices, all of a rank's experts in one launch.
//
// Group g owns rows offsets[g] .. offsets[g+1] of the row operands; offsets [E + 1] i32 are read on the device. Letters: N rows in all,
// E groups, `out` × `in` one group's matrix w[E, out, in].
//   linear       y[i, out]   = x[i, in] · w[g]ᵀ                           both operands K-major
//   swiglu       h[i, 2F]    = x · w[g]ᵀ, a[i, F] = silu(h[:, :F])·h[:, F:]  a tile holds 128 gate columns and their 128 up columns
//   gelu         h[i, F]     = x · w[g]ᵀ, a[i, F] = h · Φ(h)               experts without a gate
//   grad_input   dx[i, in]   = dy[i, out] · w[g]                          w is MN-major
//   grad_swiglu  da[i, F]    = dy[i, out] · w[g], and of it, h[i, 2F] and the weight of row i, dh[i, 2F], a[i, F] and a tile's part of
//                ⟨da, swiglu(h)⟩ (weighted_swiglu_grad, rows.cu), in f32, columns ascending, then a quad
// Rows outside the groups are never written; they may hold NaN. Any group size, 0 included. `in` and `out` are multiples of 8; bases
// of the operands lie on 16 bytes.
//
// Bound: tensor cores, 2·N·in·out operations; bytes (N·in + N·out + E·in·out)·2. Weight gradients: grouped_grad_weight_sm90.cu.
// A block is one producer warpgroup, of which one thread issues TMA copies, and two consumer warpgroups of 64 × 256 accumulators each; four
// stages of 64 deep tiles. Blocks are persistent (schedule in grouped_schedule.cuh): the copies of the next tile run under the epilogue of
// this one, and a finished tile of rows leaves while the next one's products run. The order of sums is fixed: depth ascending.
// Versions: rows stored from the accumulators before the next tile begins (qwen3-up 1.70 ms with swiglu) → rounded, kept in registers and
// stored under the next tile's first products (1.46 ms) → spread over all of them (1.24 ms) → the first to leave the cache (1.5 % less;
// grad_input 3 to 4 % less, linear as before). grad_swiglu of the same layer: two kernels 1.08 ms; h read a part ahead into registers,
// which waits for it (1.32 ms) → into shared memory, two parts ahead (1.00 ms) → 190 instructions a part instead of 270, by a sigmoid
// without the handling of what is out of range and slopes that share a product (0.94 ms). Nothing of the loop over depth may spill: one
// load of local memory in it costs a third of the kernel's time, and forms of the slopes that need one register more than these do.

#include "copies.cuh"
#include "gelu.cuh"
#include "grouped_schedule.cuh"
#include "hopper.cuh"
#include "swiglu.cuh"

namespace {

constexpr int BM = 128, BN = 256, BK = 64, STAGES = 4, BAND = 16, LAG = 3;
constexpr int CONSUMERS = 256, THREADS = CONSUMERS + 128;
constexpr int A_BYTES = BM * BK * 2, B_BYTES = BN * BK * 2, STAGE_BYTES = A_BYTES + B_BYTES;
constexpr int BOX_BYTES = 64 * 128; // 64 rows of 64 bf16, as TMA writes them
constexpr int ALIGNMENT = 1024;     // of tiles in the 128-byte swizzle
constexpr int AHEAD_BYTES = 2 * 2 * CONSUMERS * 16; // of h for the next parts of each thread's two rows: gate and up

enum class Form { Linear, Swiglu, Gelu, GradInput, GradSwiglu };

struct Shared {
    uint8_t *stages, *ahead;
    uint64_t *full, *empty;
    int* first;

    __device__ explicit Shared(uint8_t* raw) {
        const uint32_t offset = (ALIGNMENT - shared_address(raw) % ALIGNMENT) % ALIGNMENT;
        stages = raw + offset;
        ahead = stages + STAGES * STAGE_BYTES;
        full = reinterpret_cast<uint64_t*>(ahead + AHEAD_BYTES);
        empty = full + STAGES;
        first = reinterpret_cast<int*>(empty + STAGES);
    }
    __device__ uint8_t* a(int stage) const { return stages + stage * STAGE_BYTES; }
    __device__ uint8_t* b(int stage) const { return a(stage) + A_BYTES; }
};

// A stage and the parity of its phase.
struct Cursor {
    int stage = 0, parity = 0;
    __device__ void advance() {
        if (++stage == STAGES) stage = 0, parity ^= 1;
    }
};

struct Sizes {
    const int* offsets;
    int groups;
    int n; // output columns: Linear out, Swiglu and Gelu F, GradInput in, GradSwiglu F
    int k; // depth: Linear, Swiglu and Gelu in, GradInput and GradSwiglu out

    __device__ int column_tiles(int width = BN) const { return (n + width - 1) / width; }
};

template <Form FORM> __device__ RowSchedule<BM, BAND> schedule(const Sizes& s, const int* first) {
    return {s.offsets, first, s.groups, s.column_tiles(FORM == Form::Swiglu ? BN / 2 : BN)};
}

__device__ int depth_blocks(const Sizes& s) { return (s.k + BK - 1) / BK; }

// One thread copies all tiles of this block, stage after stage.
template <Form FORM>
__device__ void produce(const Shared& shared, const Sizes& s, const CUtensorMap* map_a, const CUtensorMap* map_b) {
    tma_prefetch(map_a);
    tma_prefetch(map_b);
    auto tiles = schedule<FORM>(s, shared.first);
    const int blocks = depth_blocks(s);
    Cursor at;
    for (int index = blockIdx.x; index < tiles.tiles(); index += gridDim.x) {
        const Tile tile = tiles.at(index);
        for (int block = 0; block < blocks; ++block, at.advance()) {
            barrier_wait(&shared.empty[at.stage], at.parity ^ 1);
            uint64_t* full = &shared.full[at.stage];
            uint8_t *a = shared.a(at.stage), *b = shared.b(at.stage);
            barrier_expect(full, STAGE_BYTES);
            const int depth = block * BK;
            tma_load(a, map_a, full, depth, tile.start + tile.m * BM);
            if constexpr (FORM == Form::Linear || FORM == Form::Gelu) {
                tma_load(b, map_b, full, depth, tile.group * s.n + tile.n * BN);
            } else if constexpr (FORM == Form::Swiglu) {
                const int gate = tile.group * 2 * s.n + tile.n * (BN / 2);
                tma_load(b, map_b, full, depth, gate);
                tma_load(b + B_BYTES / 2, map_b, full, depth, gate + s.n);
            } else {
#pragma unroll
                for (int i = 0; i < BN / 64; ++i)
                    tma_load(b + i * BOX_BYTES, map_b, full, tile.n * BN + i * 64, tile.group * s.k + depth);
            }
        }
    }
}

// Multiplies one stage into the accumulators: four steps of 16 deep.
template <Form FORM, bool FRESH> __device__ __forceinline__ void multiply(float (&d)[128], const uint8_t* a, const uint8_t* b) {
    constexpr int TB = FORM == Form::GradInput || FORM == Form::GradSwiglu;
    const uint64_t da = descriptor(a, 16, 1024), db = descriptor(b, TB ? BOX_BYTES : 16, 1024);
    // Bytes to the next 16 of depth: inside a row, or 16 rows on. In the descriptor's units of 16 bytes.
    constexpr uint64_t NEXT_A = 32 / 16, NEXT_B = (TB ? 16 * 128 : 32) / 16;
    wgmma_fence();
#pragma unroll
    for (int i = 0; i < BK / 16; ++i) wgmma_n256<0, TB>(d, da + i * NEXT_A, db + i * NEXT_B, !(FRESH && i == 0));
    wgmma_commit();
}

__device__ __forceinline__ uint32_t packed(float x, float y) {
    const __nv_bfloat162 both = __floats2bfloat162_rn(x, y);
    return *reinterpret_cast<const uint32_t*>(&both);
}

// Word i of lane q of a quad becomes word q of lane i.
__device__ __forceinline__ void transpose_quad(uint32_t (&v)[4], int q) {
#pragma unroll
    for (int i = 0; i < 4; i += 2) {
        const uint32_t sent = q & 1 ? v[i] : v[i + 1];
        const uint32_t got = __shfl_xor_sync(0xffffffffu, sent, 1);
        if (q & 1) v[i] = got; else v[i + 1] = got;
    }
#pragma unroll
    for (int i = 0; i < 2; ++i) {
        const uint32_t sent = q & 2 ? v[i] : v[i + 2];
        const uint32_t got = __shfl_xor_sync(0xffffffffu, sent, 2);
        if (q & 2) v[i] = got; else v[i + 2] = got;
    }
}

// x · sigmoid(x) by one special-function operation instead of two; its relative error of 2⁻¹¹ is below bf16's rounding.
__device__ __forceinline__ float silu(float x) {
    float t;
    asm("tanh.approx.f32 %0, %1;" : "=f"(t) : "f"(0.5f * x));
    return 0.5f * x * (1.0f + t);
}

// What a tile becomes, and what that takes beside it.
struct Operands {
    bf16* y; // [N, n]; Swiglu h [N, 2F], Gelu h [N, F], GradSwiglu dh [N, 2F]
    bf16* a; // Swiglu, Gelu, GradSwiglu [N, F]
    // GradSwiglu:
    const bf16* h;      // [N, 2F]
    const int* origin;  // [N]
    const float* weights;
    float* dots; // [N, column tiles]
};

// A finished tile of bf16 rows that is still to be stored: rounded, it takes half the registers, and leaves in parts while the products of
// the next tile run. Word 2j + half holds columns 8j + 2(t % 4) and the next of the accumulators' row, or of the row 8 below.
struct Pending {
    uint32_t words[BN / 4];
    int row, left; // the upper of this thread's rows, and how many its group has from there on
    int part;      // the next one to be stored
    int column;    // the first that this thread has in it
    // GradSwiglu, of the two rows: the gate's weight, and the product of da with the activations so far.
    float weight[2], dot[2];

    __device__ __forceinline__ bool holds(int half) const { return 8 * half < left; }
};

// Parts of a tile: 64 columns, or 32 of half of the rows where they are worked on, which takes its time: those are spread over the next
// tile's depth, so that what is read and written does not come in bursts.
template <Form FORM> constexpr bool SPREAD = FORM == Form::Swiglu || FORM == Form::GradSwiglu;
template <Form FORM> constexpr int PARTS = FORM == Form::GradSwiglu ? 16 : FORM == Form::Swiglu ? 8 : 4;

// A lane's 16 bytes of 32 columns: words of four chunks of 8 columns from `CHUNK` on.
template <int CHUNK> __device__ __forceinline__ uint4 row_pack(const uint32_t (&words)[BN / 4], int half) {
    uint32_t v[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) v[i] = words[2 * (CHUNK + i) + half];
    transpose_quad(v, threadIdx.x % 4);
    return make_uint4(v[0], v[1], v[2], v[3]);
}

// Results are too large to be found in a cache again, so they may leave it first. GradSwiglu is 2 to 4 % slower by that.
template <Form FORM> __device__ __forceinline__ void put(bf16* to, const uint4& pack) {
    if constexpr (FORM == Form::GradSwiglu) *reinterpret_cast<uint4*>(to) = pack;
    else __stcs(reinterpret_cast<uint4*>(to), pack);
}

__device__ __forceinline__ float2 both(uint32_t word) { return __bfloat1622float2(*reinterpret_cast<const __nv_bfloat162*>(&word)); }

// GELU of two elements, from the rounded values, which the backward pass will see.
__device__ __forceinline__ uint32_t gelu_of(uint32_t word) {
    const float2 x = both(word);
    return packed(gelu(x.x), gelu(x.y));
}

__device__ __forceinline__ uint32_t gated(uint32_t gate, uint32_t up) {
    const float2 g = both(gate), u = both(up);
    return packed(silu(g.x) * u.x, silu(g.y) * u.y);
}

// Two elements of a row's SwiGLU backward: gate, up and da become their gradients and the weighted activation.
__device__ __forceinline__ void grade(uint32_t& gate, uint32_t& up, uint32_t& da, float weight, float& dot) {
    const float2 g = both(gate), u = both(up), d = both(da);
    float2 dg, du;
    const float a0 = swiglu(g.x, u.x), a1 = swiglu(g.y, u.y);
    swiglu_slopes(g.x, u.x, weight * d.x, dg.x, du.x);
    swiglu_slopes(g.y, u.y, weight * d.y, dg.y, du.y);
    dot += d.x * a0;
    dot += d.y * a1;
    gate = packed(dg.x, dg.y), up = packed(du.x, du.y), da = packed(weight * a0, weight * a1);
}

// GradSwiglu: this thread's own place in shared memory for the gate that a part in its upper or lower row needs, and behind all threads'
// gates the same for the up projection.
__device__ __forceinline__ uint8_t* place_of(const Shared& shared, int half) { return shared.ahead + (half * 2 * CONSUMERS + threadIdx.x - 128) * 16; }

// Has the h of a part come to its place. One group of copies a part.
__device__ __forceinline__ void fetch(const Pending& pending, int half, int column, const Shared& shared, const Sizes& s, const Operands& to) {
    const bool there = pending.holds(half) && column < s.n;
    const bf16* h = to.h + (there ? long(pending.row + 8 * half) * 2 * s.n + column : 0);
    const uint32_t place = shared_address(place_of(shared, half));
    copy_async16(place, h, there);
    copy_async16(place + CONSUMERS * 16, h + s.n, there);
    copies_end_group();
}

// Stores a part of a pending tile and goes on to the next.
template <Form FORM, int PART> __device__ __forceinline__ void store(Pending& pending, const Shared& shared, const Sizes& s, const Operands& to) {
    const int column = pending.column;
    if (!SPREAD<FORM>) pending.column += 64;
    else if (PART % 2 == 1) pending.column += 32;
    if constexpr (FORM == Form::Swiglu) {
        constexpr int GATE = PART / 2 * 4, UP = GATE + BN / 16, HALF = PART % 2;
        const uint4 gate = row_pack<GATE>(pending.words, HALF), up = row_pack<UP>(pending.words, HALF);
        if (pending.holds(HALF) && column < s.n) {
            const long row = pending.row + 8 * HALF;
            put<FORM>(to.y + 2 * row * s.n + column, gate);
            put<FORM>(to.y + (2 * row + 1) * s.n + column, up);
            // From the rounded values, which the backward pass will see.
            put<FORM>(to.a + row * s.n + column, make_uint4(gated(gate.x, up.x), gated(gate.y, up.y), gated(gate.z, up.z), gated(gate.w, up.w)));
        }
    } else if constexpr (FORM == Form::GradSwiglu) {
        constexpr int HALF = PART % 2;
        const long row = pending.row + 8 * HALF;
        uint4 da = row_pack<PART / 2 * 4>(pending.words, HALF);
        copies_wait<PART + 1 < PARTS<FORM> ? 1 : 0>();
        if (pending.holds(HALF) && column < s.n) {
            const float weight = pending.weight[HALF];
            float& dot = pending.dot[HALF];
            const uint8_t* h = place_of(shared, HALF);
            uint4 gate = *reinterpret_cast<const uint4*>(h), up = *reinterpret_cast<const uint4*>(h + CONSUMERS * 16);
            grade(gate.x, up.x, da.x, weight, dot);
            grade(gate.y, up.y, da.y, weight, dot);
            grade(gate.z, up.z, da.z, weight, dot);
            grade(gate.w, up.w, da.w, weight, dot);
            put<FORM>(to.y + 2 * row * s.n + column, gate);
            put<FORM>(to.y + (2 * row + 1) * s.n + column, up);
            put<FORM>(to.a + row * s.n + column, da);
        }
        if constexpr (PART + 2 < PARTS<FORM>) fetch(pending, HALF, column + 32, shared, s, to);
        if constexpr (PART + 1 == PARTS<FORM>) {
#pragma unroll
            for (int half = 0; half < 2; ++half) {
                float dot = pending.dot[half];
                dot += __shfl_xor_sync(0xffffffffu, dot, 1);
                dot += __shfl_xor_sync(0xffffffffu, dot, 2);
                if (threadIdx.x % 4 == 0 && pending.holds(half)) to.dots[long(pending.row + 8 * half) * s.column_tiles() + column / BN] = dot;
            }
        }
    } else {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            const int half = i % 2, at = column + i / 2 * 32;
            const uint4 pack = i < 2 ? row_pack<PART * 8>(pending.words, half) : row_pack<PART * 8 + 4>(pending.words, half);
            if (!pending.holds(half) || at >= s.n) continue;
            const long place = long(pending.row + 8 * half) * s.n + at;
            put<FORM>(to.y + place, pack);
            if constexpr (FORM == Form::Gelu)
                put<FORM>(to.a + place, make_uint4(gelu_of(pack.x), gelu_of(pack.y), gelu_of(pack.z), gelu_of(pack.w)));
        }
    }
}

// Stores the next part of a pending tile: registers need their numbers at compile time.
template <Form FORM, int PART = 0> __device__ __forceinline__ void store_next(Pending& pending, const Shared& shared, const Sizes& s, const Operands& to) {
    if constexpr (PART < PARTS<FORM>) {
        if (pending.part == PART) store<FORM, PART>(pending, shared, s, to), pending.part = PART + 1;
        else store_next<FORM, PART + 1>(pending, shared, s, to);
    }
}

template <Form FORM> __device__ __forceinline__ void round_up(Pending& pending, const float (&d)[128], const Tile& tile, const Shared& shared, const Sizes& s, const Operands& to) {
#pragma unroll
    for (int i = 0; i < BN / 4; ++i) pending.words[i] = packed(d[2 * i], d[2 * i + 1]);
    const int row = tile.m * BM + threadIdx.x / 32 % 4 * 16 + threadIdx.x % 32 / 4 + (threadIdx.x / 128 - 1) * 64;
    pending.row = tile.start + row, pending.left = tile.rows - row;
    pending.column = tile.n * (FORM == Form::Swiglu ? BN / 2 : BN) + threadIdx.x % 4 * 8;
    pending.part = 0;
    if constexpr (FORM == Form::GradSwiglu) {
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            pending.weight[half] = pending.holds(half) ? to.weights[to.origin[pending.row + 8 * half]] : 0.0f;
            pending.dot[half] = 0.0f;
        }
        fetch(pending, 0, pending.column, shared, s, to);
        fetch(pending, 1, pending.column, shared, s, to);
    }
}

template <Form FORM> __device__ void consume(const Shared& shared, const Sizes& s, const Operands& to) {
    const int thread = threadIdx.x % 128, group_of_threads = threadIdx.x / 128 - 1;
    auto tiles = schedule<FORM>(s, shared.first);
    const int blocks = depth_blocks(s);
    // Blocks of depth from one part of the tile before to the next.
    const int every = SPREAD<FORM> ? max(1, (blocks - 2) / (PARTS<FORM> - 1)) : 1;
    Cursor at;
    Pending pending;
    pending.part = PARTS<FORM>;
    // One warpgroup goes LAG blocks ahead: while one is busy with a finished tile the other has the tensor cores.
    bool leads = group_of_threads == 0;
    if (!leads) meet(1, CONSUMERS);
    for (int index = blockIdx.x;; index += gridDim.x) {
        const bool any = index < tiles.tiles();
        Tile tile;
        float d[128];
        if (any) {
            tile = tiles.at(index);
            int due = 1;
            // The A operand of this warpgroup is its own box; the stage of a block is given back when the next one is under way.
            const auto arrive_at = [&](int block) {
                if (leads && block == min(LAG, blocks - 1)) come(1, CONSUMERS), leads = false;
                barrier_wait(&shared.full[at.stage], at.parity);
            };
            arrive_at(0);
            multiply<FORM, true>(d, shared.a(at.stage) + group_of_threads * BOX_BYTES, shared.b(at.stage));
            int before = at.stage;
            at.advance();
            for (int block = 1; block < blocks; ++block) {
                arrive_at(block);
                multiply<FORM, false>(d, shared.a(at.stage) + group_of_threads * BOX_BYTES, shared.b(at.stage));
                if (block == due) store_next<FORM>(pending, shared, s, to), due += every;
                wgmma_wait<1>();
                if (thread % 32 == 0) barrier_arrive(&shared.empty[before]);
                before = at.stage;
                at.advance();
            }
            wgmma_wait<0>();
            if (thread % 32 == 0) barrier_arrive(&shared.empty[before]);
        }
        while (pending.part < PARTS<FORM>) store_next<FORM>(pending, shared, s, to);
        if (!any) break;
        round_up<FORM>(pending, d, tile, shared, s, to);
    }
    if (leads) come(1, CONSUMERS);
}

template <Form FORM> __device__ void run(const CUtensorMap* map_a, const CUtensorMap* map_b, const Sizes& s, const Operands& to) {
    extern __shared__ uint8_t raw[];
    const Shared shared(raw);
    RowSchedule<BM, BAND>::prepare(shared.first, s.offsets, s.groups);
    if (threadIdx.x == 0) {
        for (int i = 0; i < STAGES; ++i) {
            barrier_init(&shared.full[i], 1);
            barrier_init(&shared.empty[i], CONSUMERS / 32);
        }
        fence_barrier_init();
    }
    __syncthreads();
    if (threadIdx.x < 128) {
        registers_down<24>();
        if (threadIdx.x == 0) produce<FORM>(shared, s, map_a, map_b);
    } else {
        registers_up<240>();
        consume<FORM>(shared, s, to);
    }
}

} // namespace

#define GROUPED extern "C" __global__ void __launch_bounds__(THREADS, 1)

GROUPED grouped_linear_sm90(const __grid_constant__ CUtensorMap x, const __grid_constant__ CUtensorMap w, const int* offsets, int groups,
                            int n, int k, bf16* y) {
    run<Form::Linear>(&x, &w, Sizes{offsets, groups, n, k}, Operands{y});
}

GROUPED grouped_swiglu_sm90(const __grid_constant__ CUtensorMap x, const __grid_constant__ CUtensorMap w, const int* offsets, int groups,
                            int f, int k, bf16* h, bf16* a) {
    run<Form::Swiglu>(&x, &w, Sizes{offsets, groups, f, k}, Operands{h, a});
}

GROUPED grouped_gelu_sm90(const __grid_constant__ CUtensorMap x, const __grid_constant__ CUtensorMap w, const int* offsets, int groups,
                          int f, int k, bf16* h, bf16* a) {
    run<Form::Gelu>(&x, &w, Sizes{offsets, groups, f, k}, Operands{h, a});
}

GROUPED grouped_grad_input_sm90(const __grid_constant__ CUtensorMap dy, const __grid_constant__ CUtensorMap w, const int* offsets,
                                int groups, int n, int k, bf16* dx) {
    run<Form::GradInput>(&dy, &w, Sizes{offsets, groups, n, k}, Operands{dx});
}

GROUPED grouped_grad_swiglu_sm90(const __grid_constant__ CUtensorMap dy, const __grid_constant__ CUtensorMap w, const int* offsets, int groups,
                                 int f, int k, const bf16* h, const int* origin, const float* weights, bf16* dh, bf16* a, float* dots) {
    run<Form::GradSwiglu>(&dy, &w, Sizes{offsets, groups, f, k}, Operands{dh, a, h, origin, weights, dots});
}
