// The lightning indexer: twins of localv4/kernels/index_keys.py, index_codes.py, index_scores.py.
//
// For one token `index_scores` writes scores as floats, and `index_select` chooses among them, so
// `index_rank` has nothing to do. The scratch memory is the CPU's: the query as fragments, weights of
// the heads of whole tiles, and where the CPU would have scores of so many heads, scores.

#include "indexer.cuh"
#include "top_entries.cuh"

constexpr int INDEX_WARPS = 8;
constexpr int CHOOSE_THREADS = 512;

// The parts of the scratch memory of a token.
struct IndexScratch {
    uint4 *fragments;
    float *weights, *scores;
    int tiles;

    __device__ IndexScratch(void *memory, i64 heads, i64 n) {
        tiles = (int)(heads + HEADS - 1) / HEADS;
        fragments = (uint4 *)memory;
        weights = (float *)(fragments + tiles * HEADS * n / 4);
        scores = weights + tiles * HEADS;
    }
};

// Entries that token t sees. Words: context, ratio.
__device__ inline int visible_entries(const Words &op, i64 token) {
    return (int)((op.at(1) + token + 1) / op.number(2));
}

// Choose among scores if there is a choice; all threads of a block.
__device__ inline void choose(TopMemory &memory, int *chosen, i64 *count, const float *scores, int visible, int top_k) {
    if (visible > top_k)
        write_top(memory, chosen, scores, visible, top_k);
    else
        for (int i = threadIdx.x; i < visible; i += blockDim.x) chosen[i] = i;
    if (threadIdx.x == 0) *count = min(visible, top_k);
}

// --- one token ---

// Words: x, heads, n, cos, sin, pairs, weights, factor, scratch. A warp for each head of whole tiles.
template <typename Index>
__device__ inline void index_query(const Words &op) {
    __shared__ float rows[INDEX_WARPS][MOST_CHANNELS];
    IndexScratch scratch(op.address<void>(9), op.number(2), op.number(3));
    int warp = threadIdx.x / 32, warps = blockDim.x / 32;
    write_index_query<Index>(scratch.fragments, scratch.weights, rows[warp], op.block() * warps + warp, op.blocks() * warps,
                             op.address<float>(1), (int)op.number(2), (int)op.number(3), op.address<float>(4),
                             op.address<float>(5), (int)op.number(6), op.address<float>(7), op.real(8));
}

// Words: context, ratio, top_k, heads, n, entries, scratch, pairs. As many warps as there are.
template <typename Index>
__device__ inline void index_scores(const Words &op) {
    int n = (int)op.number(5), visible = visible_entries(op, 0);
    if (visible <= op.number(3)) return;
    IndexScratch scratch(op.address<void>(7), op.number(4), n);
    IndexQuery query = {scratch.fragments, scratch.weights, scratch.tiles, n, 2 * (int)op.number(8)};
    int warp = (blockIdx.x * blockDim.x + threadIdx.x) / 32, warps = gridDim.x * blockDim.x / 32;
    for (int first = warp * Index::KEYS; first < visible; first += warps * Index::KEYS)
        score_entries<Index>(scratch.scores, query, op.cell<u8>(6), first, visible - 1);
}

// Words: context, ratio, top_k, heads, n, scratch, chosen, counts. One block of
// CHOOSE_THREADS.
BOUNDED_KERNEL(__launch_bounds__(CHOOSE_THREADS, 1), index_select) {
    __shared__ TopMemory memory;
    IndexScratch scratch(op.address<void>(6), op.number(4), op.number(5));
    choose(memory, op.address<int>(7), op.address<i64>(8), scratch.scores, visible_entries(op, 0), (int)op.number(3));
}

// --- many tokens ---

// Words: context, ratio, top_k, heads, n, entries, x, its row stride, tokens, cos, sin, pairs,
// weights, their row stride, factor, chosen, counts, scratch, bytes of it. Blocks take tokens in
// turn; each has word 19 of bytes for scores.
template <typename Index>
__device__ inline void index_choose(const Words &op) {
    __shared__ union Memory {
        float rows[CHOOSE_THREADS / 32][MOST_CHANNELS / 2];
        TopMemory top;
        __device__ Memory() {}
    } shared;
    DYNAMIC_SHARED(query_memory);
    int heads = (int)op.number(4), n = (int)op.number(5), pairs = (int)op.number(12), top_k = (int)op.number(3);
    int warp = threadIdx.x / 32, warps = blockDim.x / 32, tiles = (heads + HEADS - 1) / HEADS;
    uint4 *fragments = (uint4 *)query_memory;
    float *weights = (float *)(query_memory + fragment_bytes<Index>(tiles, n));
    float *scores = (float *)(op.address<u8>(21) + blockIdx.x * op.number(19));
    for (i64 token = blockIdx.x; token < op.number(9); token += gridDim.x) {
        int visible = visible_entries(op, token);
        if (visible > top_k) {
            // rows of more than 256 channels take the place of two
            bool is_wide = n > MOST_CHANNELS / 2;
            if (!is_wide || warp % 2 == 0)
                write_index_query<Index>(fragments, weights, shared.rows[warp], is_wide ? warp / 2 : warp,
                                         is_wide ? warps / 2 : warps, op.address<float>(7) + op.number(8) * token, heads, n,
                                         op.address<float>(10) + pairs * token, op.address<float>(11) + pairs * token, pairs,
                                         op.address<float>(13) + op.number(14) * token, op.real(15));
            __syncthreads();
            IndexQuery query = {fragments, weights, tiles, n, 2 * pairs};
            for (int first = warp * Index::KEYS; first < visible; first += warps * Index::KEYS)
                score_entries<Index>(scores, query, op.cell<u8>(6), first, visible - 1);
            __syncthreads();
        }
        choose(shared.top, op.address<int>(16) + top_k * token, op.address<i64>(17) + token, scores, visible, top_k);
        __syncthreads();
    }
}

// `Index` for one token, which many warps share; `ManyIndex` for many, each with a block of its own.
#define INDEX_KERNELS(form, Index, ManyIndex)                         \
    KERNEL(form##_index_query) { index_query<Index>(op); }            \
    KERNEL(form##_index_scores) { index_scores<Index>(op); }          \
    BOUNDED_KERNEL(__launch_bounds__(CHOOSE_THREADS, 1), form##_index_choose) { \
        index_choose<ManyIndex>(op);                                  \
    }

INDEX_KERNELS(f32, FloatIndex<F32Rows>, FloatIndex<F32Rows>)
INDEX_KERNELS(bf16, FloatIndex<Bf16Rows>, FloatIndex<Bf16Rows>)
INDEX_KERNELS(compact, CodeIndex<16>, CodeIndex<24>)
