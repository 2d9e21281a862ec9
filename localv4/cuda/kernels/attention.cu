// Attention of one token: twins of localv4/kernels/attend.py and attend_keys.py.
//
// The keys are cut into up to SPLITS parts, whose sums of values, largest score and sum of weights
// wait in scratch memory. `attend_scores` attends to the parts, `attend_softmax` adds them up and
// writes the output, so `attend_values` has nothing left to do. The memory lasts from `attend_query`
// to `attend_softmax`:
//
// | part    | holds                                                                       |
// |---------|-----------------------------------------------------------------------------|
// | place   | where x, cos and sin are, how many pairs                                    |
// | queries | fragments of the tiles of heads                                             |
// | sizes   | float2 (SPLITS, heads): the largest score, the sum of weights               |
// | values  | float (SPLITS, heads, n)                                                    |

#include "attention.cuh"

constexpr int SPLITS = 32;

struct Place {
    float *x;
    const float *cos, *sin;
    i64 pairs;
    i64 unused[4];
};

struct Parts {
    Place *place;
    uint4 *queries;
    float2 *sizes;
    float *values;
    int heads, n;  // heads of whole tiles

    __device__ Parts(const Words &op, i64 some_heads, i64 channels) {
        heads = (int)(some_heads + HEADS - 1) / HEADS * HEADS, n = (int)channels;
        place = op.address<Place>(21);
        queries = (uint4 *)(place + 1);
        sizes = (float2 *)(queries + (i64)heads * n / 4);
        values = (float *)(sizes + SPLITS * heads);
    }

    __device__ uint4 *tile(int number) const { return queries + (i64)number * HEADS * n / 4; }
    __device__ float *part(int split, int head) const { return values + ((i64)split * heads + head) * n; }
};

// Keys of a part: half a tile as long as there are parts enough, whole ones where there are not.
__device__ inline int part_keys(int count) {
    if (count <= SPLITS * MOST_KEYS / 2) return MOST_KEYS / 2;
    return ((count + MOST_KEYS - 1) / MOST_KEYS + SPLITS - 1) / SPLITS * MOST_KEYS;
}

// Words: x, heads, n, cos, sin, pairs, eps, scratch. A block for each head of whole tiles, of which
// only the first warp works: few heads at a time are slow on one multiprocessor.
EARLY_KERNEL(, attend_query) {
    int heads = (int)op.number(2), n = (int)op.number(3);
    Parts parts(op, heads, n);
    if (threadIdx.x >= 32) return;
    wait_for_results();
    int head = op.block();
    const float *cos = op.address<float>(4), *sin = op.address<float>(5);
    float *x = op.address<float>(1);
    if (op.block() == 0 && threadIdx.x == 0) *parts.place = {x, cos, sin, op.number(6), {}};
    write_query(parts.tile(head / HEADS), head % HEADS, head < heads ? x + (i64)head * n : nullptr, n, cos, sin,
                (int)op.number(6), op.real(7));
}

// Words: context, span, ratio, counts, chosen, top_k, window, capacity, entries, heads, n, scratch,
// pairs. WARPS warps for a tile of heads and a part of the keys.
template <typename Form>
__device__ inline void attend_scores(const Words &op) {
    __shared__ Exchange exchange;
    int n = (int)op.number(11), rope = 2 * (int)op.number(13);
    Parts parts(op, op.number(10), n);
    int tiles = parts.heads / HEADS, tile = blockIdx.x % tiles, split = blockIdx.x / tiles;
    Sequence sequence(op);
    wait_for_results();
    Query query(parts.tile(tile), n);
    Keys keys(op, sequence, 0, Form::stride(n, rope));
    int count = keys.count, size = part_keys(count), first = split * size;
    if (first >= count) return;
    Sums sums;
    sums.largest = -INFINITE, sums.total = 0.0f;
    attend_keys<Form>(exchange, sums, query, keys, first, min(first + size, count), n, rope);
    float total = head_total(sums);
    int own = tile * HEADS + threadIdx.x / 16;
    if (threadIdx.x % 16 == 0) parts.sizes[split * parts.heads + own] = make_float2(sums.largest, total);
    int channel = threadIdx.x / 32 * SLICE + threadIdx.x % 4 * 16;
    if (channel >= n) return;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
        float *out = parts.part(split, tile * HEADS + threadIdx.x % 32 / 4 + 8 * half) + channel;
#pragma unroll
        for (int p = 0; p < 8; p += 2)
            *(float4 *)(out + 2 * p) = make_float4(sums.values[p][2 * half], sums.values[p][2 * half + 1],
                                                   sums.values[p + 1][2 * half], sums.values[p + 1][2 * half + 1]);
    }
}

#define SCORES_KERNEL(name) EARLY_KERNEL(__launch_bounds__(32 * WARPS, 2), name)

SCORES_KERNEL(f32_attend_scores) { attend_scores<F32Rows>(op); }
SCORES_KERNEL(bf16_attend_scores) { attend_scores<Bf16Rows>(op); }
SCORES_KERNEL(compact_attend_scores) { attend_scores<E4m3Rows>(op); }

// Words: context, span, ratio, counts, heads, n, sinks, scratch, (unused, output), and where it is to be
// rounded in parts q, d, b of them, of so many columns. 128 threads for 256 channels of a head.
template <bool ROUNDS>
__device__ inline void attend_softmax_and_round(const Words &op) {
    constexpr int AHEAD = 8;  // parts whose sums are asked for, needed or not, before it is known how many there are
    __shared__ float weights[SPLITS];
    int n = (int)op.number(6), pieces = (n + 255) / 256, head = blockIdx.x / pieces;
    int channel = blockIdx.x % pieces * 256 + 2 * threadIdx.x;
    Parts parts(op, op.number(5), n);
    i64 position = op.at(1);
    float sink = op.address<float>(7)[head];
    wait_for_results();
    const float *values = parts.part(0, head) + min(channel, n - 2);
    i64 step = (i64)parts.heads * n;
    float2 ahead[AHEAD];
    Place place = *parts.place;
#pragma unroll
    for (int split = 0; split < AHEAD; ++split) ahead[split] = *(const float2 *)(values + split * step);
    float2 own = parts.sizes[threadIdx.x % SPLITS * parts.heads + head];
    int count = Keys::key_count(op, 0, position), size = part_keys(count), splits = (count + size - 1) / size;
    Turn turn(channel, n, (int)place.pairs, place.cos, place.sin);
    if (threadIdx.x < 32) {
        int split = threadIdx.x;
        if (split >= splits) own = make_float2(-INFINITE, 0.0f);
        float largest = warp_max(own.x > sink ? own.x : sink);
        float weight = split < splits ? exp_as_cpu(own.x - largest) : 0.0f;
        float total = warp_sum(weight * own.y) + exp_as_cpu(sink - largest);
        weights[split] = __fdiv_rn(weight, total);
    }
    __syncthreads();
    if (channel >= n) return;
    float even = 0.0f, odd = 0.0f;
#pragma unroll
    for (int split = 0; split < AHEAD; ++split) {
        if (split >= splits) break;
        even = __fmaf_rn(weights[split], ahead[split].x, even), odd = __fmaf_rn(weights[split], ahead[split].y, odd);
    }
#pragma unroll 8
    for (int split = AHEAD; split < splits; ++split) {
        float2 part = *(const float2 *)(values + split * step);
        even = __fmaf_rn(weights[split], part.x, even), odd = __fmaf_rn(weights[split], part.y, odd);
    }
    float2 turned = turn.back(even, odd);
    i64 column = (i64)head * n + channel;
    *(float2 *)(place.x + column) = turned;
    if (!ROUNDS) return;
    Rounded parts_of = {op.address<i8>(11), op.address<float>(12), op.address<int>(13)};
    i64 cols = op.number(14);
    round_values(parts_of.row(column / cols, cols), column % cols / 32, {turned.x, turned.y});
}

EARLY_KERNEL(, attend_softmax) { attend_softmax_and_round<false>(op); }
EARLY_KERNEL(, attend_softmax_rounded) { attend_softmax_and_round<true>(op); }
