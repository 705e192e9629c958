// Grouped GEMM on Hopper, bf16 with f32 accumulation: the experts' matrices, all of a rank's experts in one launch.
//
// Group g owns rows offsets[g] .. offsets[g+1] of the row operands; offsets [E + 1] i32 are read on the device. Letters: N rows in all,
// E groups, `out` × `in` one group's matrix w[E, out, in].
//   linear       y[i, out]   = x[i, in] · w[g]ᵀ                           both operands K-major
//   swiglu       h[i, 2F]    = x · w[g]ᵀ, a[i, F] = silu(h[:, :F])·h[:, F:]  a tile holds 128 gate columns and their 128 up columns
//   gelu         h[i, F]     = x · w[g]ᵀ, a[i, F] = h · Φ(h)               experts without a gate
//   grad_input   dx[i, in]   = dy[i, out] · w[g]                          w is MN-major
// Rows outside the groups are never written; they may hold NaN. Any group size, 0 included. `in` and `out` are multiples of 8; bases
// of the operands lie on 16 bytes.
//
// Bound: tensor cores, 2·N·in·out operations; bytes (N·in + N·out + E·in·out)·2. Weight gradients: grouped_grad_weight_sm90.cu.
// A block is one producer warpgroup, of which one thread issues TMA copies, and two consumer warpgroups of 64 × 256 accumulators each; four
// stages of 64 deep tiles. Blocks are persistent (schedule in grouped_schedule.cuh): the copies of the next tile run under the epilogue of
// this one, and a finished tile of rows leaves while the next one's products run. The order of sums is fixed: depth ascending.
// Versions: rows stored from the accumulators before the next tile begins (qwen3-up 1.70 ms with swiglu) → rounded, kept in registers and
// stored under the next tile's products (1.47 ms).

#include "gelu.cuh"
#include "grouped_schedule.cuh"
#include "hopper.cuh"

namespace {

constexpr int BM = 128, BN = 256, BK = 64, STAGES = 4, BAND = 16, LAG = 3;
constexpr int CONSUMERS = 256, THREADS = CONSUMERS + 128;
constexpr int A_BYTES = BM * BK * 2, B_BYTES = BN * BK * 2, STAGE_BYTES = A_BYTES + B_BYTES;
constexpr int BOX_BYTES = 64 * 128; // 64 rows of 64 bf16, as TMA writes them
constexpr int ALIGNMENT = 1024;     // of tiles in the 128-byte swizzle

enum class Form { Linear, Swiglu, Gelu, GradInput };

struct Shared {
    uint8_t* stages;
    uint64_t *full, *empty;
    int* first;

    __device__ explicit Shared(uint8_t* raw) {
        const uint32_t offset = (ALIGNMENT - shared_address(raw) % ALIGNMENT) % ALIGNMENT;
        stages = raw + offset;
        full = reinterpret_cast<uint64_t*>(stages + STAGES * STAGE_BYTES);
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
    int n; // output columns: Linear out, Swiglu and Gelu F, GradInput in
    int k; // depth: GradInput out, the others in
};

template <Form FORM> __device__ RowSchedule<BM, BAND> schedule(const Sizes& s, const int* first) {
    constexpr int COLUMNS = FORM == Form::Swiglu ? BN / 2 : BN;
    return {s.offsets, first, s.groups, (s.n + COLUMNS - 1) / COLUMNS};
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
    constexpr int TB = FORM == Form::GradInput;
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

struct Outputs {
    bf16* y; // [N, n]; Swiglu h [N, 2F], Gelu h [N, F]
    bf16* a; // Swiglu and Gelu [N, F]
};

// A finished tile of bf16 rows that is still to be stored: rounded, it takes half the registers, and leaves while the products of the next
// tile run. Word 2j + half holds columns 8j + 2(t % 4) and the next of the accumulators' row, or of the row 8 below.
struct Pending {
    uint32_t words[BN / 4];
    Tile tile;
    bool any = false;
};

constexpr int PARTS = 4;

__device__ __forceinline__ void round_up(Pending& pending, const float (&d)[128], const Tile& tile) {
#pragma unroll
    for (int i = 0; i < BN / 4; ++i) pending.words[i] = packed(d[2 * i], d[2 * i + 1]);
    pending.tile = tile;
    pending.any = true;
}

__device__ __forceinline__ uint32_t gelu_of(uint32_t both) {
    const float2 x = __bfloat1622float2(*reinterpret_cast<const __nv_bfloat162*>(&both));
    return packed(gelu(x.x), gelu(x.y));
}

// Stores 32 columns of two rows, or their GELU, 16 bytes a lane: words of four chunks of 8 columns from CHUNK on.
template <int CHUNK, bool GELU = false> __device__ __forceinline__ void store_32(const uint32_t (&words)[BN / 4], bf16* out, long stride, int column, int columns, int row, int rows) {
    const int q = threadIdx.x % 4, at = column + 8 * q;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
        uint32_t v[4];
#pragma unroll
        for (int i = 0; i < 4; ++i) v[i] = GELU ? gelu_of(words[2 * (CHUNK + i) + half]) : words[2 * (CHUNK + i) + half];
        transpose_quad(v, q);
        const int r = row + 8 * half;
        if (r < rows && at < columns) *reinterpret_cast<uint4*>(out + r * stride + at) = make_uint4(v[0], v[1], v[2], v[3]);
    }
}

__device__ __forceinline__ uint32_t gated(uint32_t gate, uint32_t up) {
    const float2 g = __bfloat1622float2(*reinterpret_cast<const __nv_bfloat162*>(&gate)), u = __bfloat1622float2(*reinterpret_cast<const __nv_bfloat162*>(&up));
    return packed(silu(g.x) * u.x, silu(g.y) * u.y);
}

// Stores 32 columns of h and of their GELU, four chunks from CHUNK on.
template <int CHUNK> __device__ __forceinline__ void store_with_gelu(const Pending& pending, const Sizes& s, const Outputs& out, int row) {
    const Tile& tile = pending.tile;
    const int column = tile.n * BN + 8 * CHUNK;
    store_32<CHUNK>(pending.words, out.y + long(tile.start) * s.n, s.n, column, s.n, row, tile.rows);
    // From the rounded values, which the backward pass will see.
    store_32<CHUNK, true>(pending.words, out.a + long(tile.start) * s.n, s.n, column, s.n, row, tile.rows);
}

// Stores a quarter of a pending tile.
template <Form FORM, int PART> __device__ __forceinline__ void store(const Pending& pending, const Sizes& s, const Outputs& out, int group_of_threads, int thread) {
    const Tile& tile = pending.tile;
    const int row = tile.m * BM + group_of_threads * 64 + thread / 32 * 16 + thread % 32 / 4;
    if constexpr (FORM == Form::Swiglu) {
        constexpr int GATE = PART * 4, UP = GATE + BN / 16;
        const int column = tile.n * (BN / 2) + 8 * GATE;
        bf16* h = out.y + long(tile.start) * 2 * s.n;
        store_32<GATE>(pending.words, h, 2 * s.n, column, s.n, row, tile.rows);
        store_32<UP>(pending.words, h + s.n, 2 * s.n, column, s.n, row, tile.rows);
        // From the rounded values, which the backward pass will see.
        uint32_t a[BN / 4];
#pragma unroll
        for (int i = 0; i < 8; ++i) a[i] = gated(pending.words[2 * GATE + i], pending.words[2 * UP + i]);
        store_32<0>(a, out.a + long(tile.start) * s.n, s.n, column, s.n, row, tile.rows);
    } else if constexpr (FORM == Form::Gelu) {
        store_with_gelu<8 * PART>(pending, s, out, row);
        store_with_gelu<8 * PART + 4>(pending, s, out, row);
    } else {
        constexpr int FIRST = PART * (BN / 8 / PARTS);
        bf16* y = out.y + long(tile.start) * s.n;
        store_32<FIRST>(pending.words, y, s.n, tile.n * BN + 8 * FIRST, s.n, row, tile.rows);
        store_32<FIRST + 4>(pending.words, y, s.n, tile.n * BN + 8 * FIRST + 32, s.n, row, tile.rows);
    }
}

// As above, the part known at run time: registers need their numbers at compile time.
template <Form FORM> __device__ __forceinline__ void store_part(int part, const Pending& pending, const Sizes& s, const Outputs& out, int group_of_threads, int thread) {
    if (part == 0) store<FORM, 0>(pending, s, out, group_of_threads, thread);
    else if (part == 1) store<FORM, 1>(pending, s, out, group_of_threads, thread);
    else if (part == 2) store<FORM, 2>(pending, s, out, group_of_threads, thread);
    else if (part == 3) store<FORM, 3>(pending, s, out, group_of_threads, thread);
}

template <Form FORM> __device__ void consume(const Shared& shared, const Sizes& s, const Outputs& out) {
    const int thread = threadIdx.x % 128, group_of_threads = threadIdx.x / 128 - 1;
    auto tiles = schedule<FORM>(s, shared.first);
    const int blocks = depth_blocks(s);
    Cursor at;
    Pending pending;
    // One warpgroup goes LAG blocks ahead: while one is busy with a finished tile the other has the tensor cores.
    bool leads = group_of_threads == 0;
    if (!leads) meet(1, CONSUMERS);
    for (int index = blockIdx.x; index < tiles.tiles(); index += gridDim.x) {
        const Tile tile = tiles.at(index);
        float d[128];
        // The A operand of this warpgroup is its own box; the stage of a block is given back when the next one is under way.
        const auto arrive_at = [&](int block) {
            if (leads && block == min(LAG, blocks - 1)) come(1, CONSUMERS), leads = false;
            barrier_wait(&shared.full[at.stage], at.parity);
        };
        arrive_at(0);
        multiply<FORM, true>(d, shared.a(at.stage) + group_of_threads * BOX_BYTES, shared.b(at.stage));
        int before = at.stage;
        at.advance();
        if (pending.any) store_part<FORM>(0, pending, s, out, group_of_threads, thread);
        for (int block = 1; block < blocks; ++block) {
            arrive_at(block);
            multiply<FORM, false>(d, shared.a(at.stage) + group_of_threads * BOX_BYTES, shared.b(at.stage));
            if (pending.any && block < PARTS) store_part<FORM>(block, pending, s, out, group_of_threads, thread);
            wgmma_wait<1>();
            if (thread % 32 == 0) barrier_arrive(&shared.empty[before]);
            before = at.stage;
            at.advance();
        }
        wgmma_wait<0>();
        if (thread % 32 == 0) barrier_arrive(&shared.empty[before]);
        if (pending.any)
            for (int part = blocks; part < PARTS; ++part) store_part<FORM>(part, pending, s, out, group_of_threads, thread);
        round_up(pending, d, tile);
    }
    if (leads) come(1, CONSUMERS);
    if (pending.any) {
#pragma unroll
        for (int part = 0; part < PARTS; ++part) store_part<FORM>(part, pending, s, out, group_of_threads, thread);
    }
}

template <Form FORM> __device__ void run(const CUtensorMap* map_a, const CUtensorMap* map_b, const Sizes& s, const Outputs& out) {
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
        registers_down<40>();
        if (threadIdx.x == 0) produce<FORM>(shared, s, map_a, map_b);
    } else {
        registers_up<232>();
        consume<FORM>(shared, s, out);
    }
}

} // namespace

#define GROUPED extern "C" __global__ void __launch_bounds__(THREADS, 1)

GROUPED grouped_linear_sm90(const __grid_constant__ CUtensorMap x, const __grid_constant__ CUtensorMap w, const int* offsets, int groups,
                            int n, int k, bf16* y) {
    run<Form::Linear>(&x, &w, Sizes{offsets, groups, n, k}, Outputs{y, nullptr});
}

GROUPED grouped_swiglu_sm90(const __grid_constant__ CUtensorMap x, const __grid_constant__ CUtensorMap w, const int* offsets, int groups,
                            int f, int k, bf16* h, bf16* a) {
    run<Form::Swiglu>(&x, &w, Sizes{offsets, groups, f, k}, Outputs{h, a});
}

GROUPED grouped_gelu_sm90(const __grid_constant__ CUtensorMap x, const __grid_constant__ CUtensorMap w, const int* offsets, int groups,
                          int f, int k, bf16* h, bf16* a) {
    run<Form::Gelu>(&x, &w, Sizes{offsets, groups, f, k}, Outputs{h, a});
}

GROUPED grouped_grad_input_sm90(const __grid_constant__ CUtensorMap dy, const __grid_constant__ CUtensorMap w, const int* offsets,
                                int groups, int n, int k, bf16* dx) {
    run<Form::GradInput>(&dy, &w, Sizes{offsets, groups, n, k}, Outputs{dx, nullptr});
}
