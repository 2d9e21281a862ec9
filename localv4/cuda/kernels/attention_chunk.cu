// Attention of many tokens: the twins of `attend` of localv4/kernels/attend_keys.py.

#include "attention.cuh"

// The tile of heads of a block, as the words of `attend` say.
struct Tile {
    i64 token, pairs;
    int first, heads, n;  // first head; heads from there on
    float *x;
    const float *cos, *sin;

    __device__ Tile(const Words &op) {
        int tiles = ((int)op.number(13) + HEADS - 1) / HEADS;
        token = blockIdx.x / tiles, pairs = op.number(17), n = (int)op.number(14);
        first = blockIdx.x % tiles * HEADS, heads = (int)op.number(13) - first;
        x = op.address<float>(10) + op.number(11) * token + (i64)first * n;
        cos = op.address<float>(15) + pairs * token, sin = op.address<float>(16) + pairs * token;
    }
};

// Write the sums of a tile as its output; `shares`: 1 / the sum of weights of each head.
__device__ inline void write_values(const Tile &tile, const Sums &sums, const float *shares) {
    int group = threadIdx.x % 32 / 4, channel = threadIdx.x / 32 * SLICE + threadIdx.x % 4 * 16;
    if (channel >= tile.n) return;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
        int head = group + 8 * half;
        if (head >= tile.heads) continue;
#pragma unroll
        for (int p = 0; p < 8; ++p) {
            float even = sums.values[p][2 * half] * shares[head], odd = sums.values[p][2 * half + 1] * shares[head];
            int at = channel + 2 * p;
            *(float2 *)(tile.x + (i64)head * tile.n + at) =
                Turn(at, tile.n, (int)tile.pairs, tile.cos, tile.sin).back(even, odd);
        }
    }
}

// Words: context, span, ratio, counts, chosen, top_k, window, capacity, entries, x, its row stride,
// tokens, heads, n, cos, sin, pairs, eps, sinks, scratch, bytes of it. WARPS warps for a tile of
// heads of a token.
template <typename Form>
__device__ inline void attend(const Words &op) {
    __shared__ union Memory {
        uint4 query[MOST_CHANNELS * HEADS / 4];
        Exchange exchange;
        __device__ Memory() {}
    } shared;
    __shared__ float shares[HEADS];
    int n = (int)op.number(14), rope = 2 * (int)op.number(17), own = threadIdx.x / 16;
    Sums sums;
    {
        Tile tile(op);
        for (int head = threadIdx.x / 32; head < HEADS; head += WARPS)
            write_query(shared.query, head, head < tile.heads ? tile.x + (i64)head * n : nullptr, n, tile.cos, tile.sin,
                        (int)tile.pairs, op.real(18));
        sums.largest = own < tile.heads ? op.address<float>(19)[tile.first + own] : 0.0f;
        sums.total = threadIdx.x % 16 == 0 ? 1.0f : 0.0f;  // the weight of the sink
    }
    __syncthreads();
    Query query(shared.query, n);
    __syncthreads();
    Keys keys(op, Sequence(op), Tile(op).token, Form::stride(n, rope));
    attend_keys<Form>(shared.exchange, sums, query, keys, 0, keys.count, n, rope);
    float total = head_total(sums);
    if (threadIdx.x % 16 == 0) shares[own] = __fdiv_rn(1.0f, total);
    __syncthreads();
    write_values(Tile(op), sums, shares);
}

TILE_KERNEL(f32_attend) { attend<F32Rows>(op); }
TILE_KERNEL(bf16_attend) { attend<Bf16Rows>(op); }
TILE_KERNEL(compact_attend) { attend<E4m3Rows>(op); }
