// Embedding: out[t] = table[ids[t]], and dtable[ids[t]] += dout[t], tokens ascending.        (DenseOps::embedding, embedding_grad)
//
// ids [T] i32, table [V, H], out and dout [T, H], dtable [V, H] f32. An id that the table does not have gives a row of NaN, and no
// gradient: the host cannot see it, and nothing outside the table may be touched.
//
// The gradient without float atomics, in three kernels over a scratch:
// token_order  sorts tokens by (id, token): a token's place is the number of those before it, counted over all pairs. T² comparisons:
//              for a batch's tokens less than the rows' traffic, and no pass over the vocabulary.
// id_chunks    one block for each run of up to CHUNK tokens of one id: sums their rows ascending. An id's only run goes to dtable, else
//              into partial.
// id_totals    adds the partial sums of an id ascending. So an id that half the batch has is summed by many blocks.
// A run that starts at place p has partial row 2·(p / CHUNK), plus one if it is its id's first: of ids with several runs at most one
// ends and one begins in CHUNK places, so rows never collide.
// Bound: memory, T·H of dout read, f32 gradient rows of the ids at hand read and written.

#include "pack.cuh"

constexpr int THREADS = 256, CHUNK = 32;

template <typename Act, int V> __device__ void gather(int tokens, int h, int vocab, const int* ids, const Act* table, Act* out) {
    const unsigned per_row = h / V;
    const long items = long(tokens) * per_row;
    for (long i = flat_thread(); i < items; i += flat_threads()) {
        const unsigned t = unsigned(i) / per_row, c = unsigned(i) % per_row;
        const int id = ids[t];
        Pack<Act, V> pack;
        if (unsigned(id) < unsigned(vocab)) {
            pack = load<V>(table + long(id) * h + long(c) * V);
        } else {
#pragma unroll
            for (int e = 0; e < V; ++e) pack.v[e] = from_f32<Act>(__int_as_float(0x7fffffff));
        }
        store(out + i * V, pack);
    }
}

template <typename Act>
__device__ void body_embedding(int tokens, int h, int vocab, const int* ids, const Act* table, Act* out, int packed) {
    packed ? gather<Act, FULL<Act>>(tokens, h, vocab, ids, table, out) : gather<Act, 1>(tokens, h, vocab, ids, table, out);
}

#define EMBEDDING(Act) int tokens, int h, int vocab, const int *ids, const Act *table, Act *out, int packed
BOTH(embedding, THREADS, EMBEDDING, (tokens, h, vocab, ids, table, out, packed))

// A block has the places of 32 tokens to find; each of its warps counts in its part of every tile of ids.
constexpr int TILE = 2048, WARPS = THREADS / WARP, PART = TILE / WARPS;

// An id as it is sorted: those that the table does not have come last.
__device__ __forceinline__ int sort_key(int id, int vocab) { return unsigned(id) < unsigned(vocab) ? id : vocab; }

// keys[place], starts[place] (where the key's tokens begin), order[place] (the token).
extern "C" __global__ void __launch_bounds__(THREADS)
    token_order(int tokens, int vocab, const int* ids, int* keys, int* starts, int* order) {
    __shared__ alignas(16) int tile[TILE];
    __shared__ int counts[2][WARPS][WARP];
    const int lane = threadIdx.x % WARP, warp = threadIdx.x / WARP, first = blockIdx.x * WARP, mine = first + lane;
    const int key = mine < tokens ? sort_key(ids[mine], vocab) : vocab;
    int less = 0, equal = 0;
    for (int base = 0; base < tokens; base += TILE) {
        __syncthreads();
        for (int i = threadIdx.x; i < TILE; i += THREADS) {
            tile[i] = base + i < tokens ? sort_key(ids[base + i], vocab) : 0x7fffffff;
        }
        __syncthreads();
#pragma unroll 4
        for (int i = warp * PART; i < (warp + 1) * PART; i += 4) {
            const int4 other = *reinterpret_cast<const int4*>(tile + i);
            less += (other.x < key) + (other.y < key) + (other.z < key) + (other.w < key);
            // Four ids lie wholly before, inside or after the block's tokens, since both are cut at multiples of four.
            const int t = base + i;
            if (t < first) {
                equal += (other.x == key) + (other.y == key) + (other.z == key) + (other.w == key);
            } else if (t < first + WARP) {
                equal += (other.x == key && t < mine) + (other.y == key && t + 1 < mine) + (other.z == key && t + 2 < mine) +
                         (other.w == key && t + 3 < mine);
            }
        }
    }
    counts[0][warp][lane] = less, counts[1][warp][lane] = equal;
    __syncthreads();
    if (warp > 0 || mine >= tokens) return;
    less = equal = 0;
    for (int w = 0; w < WARPS; ++w) less += counts[0][w][lane], equal += counts[1][w][lane];
    keys[less + equal] = key, starts[less + equal] = less, order[less + equal] = mine;
}

template <typename Act, int V>
__device__ void chunk_sum(int tokens, int h, int vocab, const int* keys, const int* starts, const int* order, const Act* dout,
                          float* partial, float* dtable) {
    const int place = blockIdx.x, key = keys[place], start = starts[place], lane = threadIdx.x % WARP;
    if (key >= vocab || (place - start) % CHUNK != 0) return;
    // Each warp finds out for itself how long the run is; a lane knows one of its tokens.
    const bool of_run = place + lane < tokens && keys[place + lane] == key;
    const int token = of_run ? order[place + lane] : 0;
    const int n = __popc(__ballot_sync(0xffffffffu, of_run));
    const bool only = place == start && (place + CHUNK >= tokens || keys[place + CHUNK] != key);
    const int column = (blockIdx.y * THREADS + threadIdx.x) * V;
    const bool inside = column < h;
    float sum[V] = {};
    for (int base = 0; base < n; base += 4) {
        Pack<Act, V> x[4];
#pragma unroll
        for (int j = 0; j < 4; ++j) {
            const int t = __shfl_sync(0xffffffffu, token, (base + j) % CHUNK);
            if (inside && base + j < n) x[j] = load<V>(dout + long(t) * h + column);
        }
#pragma unroll
        for (int j = 0; j < 4; ++j) {
            if (base + j >= n) break;
#pragma unroll
            for (int e = 0; e < V; ++e) sum[e] += to_f32(x[j].v[e]);
        }
    }
    if (!inside) return;
    if (only) {
        add_to<V>(dtable + long(key) * h + column, sum);
    } else {
        set_to<V>(partial + (2 * long(place / CHUNK) + (place == start)) * h + column, sum);
    }
}

template <typename Act>
__device__ void body_id_chunks(int tokens, int h, int vocab, const int* keys, const int* starts, const int* order, const Act* dout,
                               float* partial, float* dtable, int packed) {
    packed ? chunk_sum<Act, FULL<Act>>(tokens, h, vocab, keys, starts, order, dout, partial, dtable)
           : chunk_sum<Act, 1>(tokens, h, vocab, keys, starts, order, dout, partial, dtable);
}

#define ID_CHUNKS(Act)                                                                                                   \
    int tokens, int h, int vocab, const int *keys, const int *starts, const int *order, const Act *dout, float *partial,  \
        float *dtable, int packed
BOTH(id_chunks, THREADS, ID_CHUNKS, (tokens, h, vocab, keys, starts, order, dout, partial, dtable, packed))

// Block (x, y): the id with several runs that begins in CHUNK places number x, if there is one; 256 columns.
extern "C" __global__ void __launch_bounds__(THREADS)
    id_totals(int tokens, int h, int vocab, const int* keys, const int* starts, const float* partial, float* dtable) {
    const int lane = threadIdx.x % WARP, at = blockIdx.x * CHUNK + lane;
    const bool begins = at + CHUNK < tokens && starts[at] == at && keys[at + CHUNK] == keys[at];
    const unsigned found = __ballot_sync(0xffffffffu, begins);
    if (found == 0) return;
    const int start = blockIdx.x * CHUNK + __ffs(found) - 1, key = keys[start];
    if (key >= vocab) return;
    int runs = 0;
    for (int base = 0;; base += WARP) {
        const long run = start + long(base + lane) * CHUNK;
        const unsigned more = __ballot_sync(0xffffffffu, run < tokens && keys[run] == key);
        runs += __popc(more);
        if (more != 0xffffffffu) break;
    }
    const int column = blockIdx.y * THREADS + threadIdx.x;
    if (column >= h) return;
    const float* rows = partial + 2 * long(blockIdx.x) * h + column;
    float sum = rows[h];
#pragma unroll 8
    for (int run = 1; run < runs; ++run) sum += rows[2 * long(run) * h];
    dtable[long(key) * h + column] += sum;
}
