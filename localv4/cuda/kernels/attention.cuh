// Attention in tensor cores: sixteen heads and all channels of some keys are a thread block's work.
//
// One key row per token serves all heads and is the value, too. A warp has SLICE channels of
// everything: of the queries, of the keys, which it reads once and keeps in registers while they are
// multiplied with queries and then with weights, and of the sums of values. Only scores are added
// over the warps, in shared memory. Queries, weights and float32 keys are sums of two bfloat16, so
// that products are within 2^-16 of their size; keys of the narrower forms are exact.
//
// Fragments (PTX, m16n8k16): lane = 4 * group + member. The order of channels inside of a slice is
// of no account to the products, so a lane reads the sixteen channels 16 * member ... of a key, of
// which pair p is in k-step p / 2, half p % 2. The transposed registers of a key then give a lane
// the sums of the same sixteen channels for the heads `group` and `group + 8`.

#pragma once

#include "activations.cuh"
#include "row_forms.cuh"

constexpr int HEADS = 16;             // of a tile
constexpr int SLICE = 64;             // channels of a warp
constexpr int WARPS = MOST_CHANNELS / SLICE;
constexpr int MOST_KEYS = 32;         // of a tile
constexpr int SCORE_ROW = MOST_KEYS + 8, WEIGHT_ROW = MOST_KEYS / 2 + 4;  // no two lanes at one bank

// Two blocks on a multiprocessor hide each other's barriers and reads.
#define TILE_KERNEL(name) BOUNDED_KERNEL(__launch_bounds__(32 * WARPS, 2), name)

// --- which keys a token sees ---


// Where the keys of a sequence are and how far it is: nothing that kernels write, so that it can be
// read before they have ended.
struct Sequence {
    i64 position;
    const float *window;
    const u8 *entries;

    // Words 1, 3, 7, 9 of an operation: context, ratio, window, entries.
    __device__ explicit Sequence(const Words &op)
        : position(op.at(1)), window(op.cell<float>(7)), entries(op.number(3) == 0 ? nullptr : op.cell<u8>(9)) {}
};

struct Keys {
    const float *window;
    const u8 *entries;
    const int *chosen;
    i64 start, capacity, stride;
    int raw, count;

    // Words 1 ... 4 of an operation: context, span, ratio, counts; `position` of the token.
    __device__ static int window_count(const Words &op, i64 position) { return (int)min(op.number(2), position + 1); }
    __device__ static int key_count(const Words &op, i64 token, i64 position) {
        i64 ratio = op.number(3), entries = 0;
        if (ratio != 0) entries = op.number(4) == 0 ? (position + 1) / ratio : op.address<i64>(4)[token];
        return window_count(op, position) + (int)entries;
    }

    // And words 5 ... 9: chosen, top_k, window, capacity, entries. stride: bytes of an entry.
    __device__ Keys(const Words &op, const Sequence &sequence, i64 token, i64 entry_bytes) {
        i64 position = sequence.position + token;
        window = sequence.window, entries = sequence.entries, capacity = op.number(8), stride = entry_bytes;
        chosen = op.number(5) == 0 ? nullptr : op.address<int>(5) + op.number(6) * token;
        raw = window_count(op, position), count = key_count(op, token, position);
        start = (position - raw + 1) % capacity;
    }

    __device__ const u8 *raw_key(int j, int n) const {
        i64 place = start + j;
        return (const u8 *)(window + n * (place < capacity ? place : place - capacity));
    }
    __device__ const u8 *entry(int j) const {
        i64 place = j - raw;
        return entries + stride * (chosen != nullptr ? chosen[place] : place);
    }
};

// --- queries ---

// Fragments of the queries of a tile: for each sixteen channels and k-step the high parts of eight
// groups, then the low parts. n * HEADS * 4 bytes.
__device__ inline int query_place(int block, int step, int part, int group) {
    return ((block * 4 + step) * 2 + part) * 8 + group;
}

// Norm and rotate the query of a head at x, divide it by sqrt(n) and write it to the fragments of its
// tile, zeros if x is null. A warp, of which each lane has sixteen channels.
__device__ inline void write_query(uint4 *out, int head, const float *x, int n, const float *cos, const float *sin,
                                   int pairs, float eps) {
    int lane = threadIdx.x % 32, first = 16 * lane;
    float values[16] = {}, squares = 0.0f, c[8], s[8];
    bool turns = first < n && first + 16 > n - 2 * pairs;
#pragma unroll
    for (int p = 0; p < 8; ++p) {
        int turn = (first + 2 * p - (n - 2 * pairs)) / 2;
        bool is_turned = turns && first + 2 * p >= n - 2 * pairs;
        c[p] = is_turned ? cos[turn] : 1.0f, s[p] = is_turned ? sin[turn] : 0.0f;
    }
    if (x != nullptr && first < n) {
#pragma unroll
        for (int i = 0; i < 4; ++i) *(float4 *)(values + 4 * i) = *(const float4 *)(x + first + 4 * i);
    }
#pragma unroll
    for (int i = 0; i < 16; ++i) squares = __fmaf_rn(values[i], values[i], squares);
    squares = warp_sum(squares);
    if (first >= n) return;
    float factor = __fdiv_rn(1.0f, __fsqrt_rn(squares * __frcp_rn((float)n) + eps));
    factor *= __fdiv_rn(1.0f, __fsqrt_rn((float)n));
#pragma unroll
    for (int p = 0; p < 8; ++p) {
        float even = values[2 * p] * factor, odd = values[2 * p + 1] * factor;
        if (first + 2 * p >= n - 2 * pairs) {
            float turned = even * c[p] - odd * s[p];
            odd = even * s[p] + odd * c[p], even = turned;
        }
        Split split = split_pair(even, odd);
        int part = head / 8 + 2 * (p % 2);
        ((u32 *)(out + query_place(lane, p / 2, 0, head % 8)))[part] = split.high;
        ((u32 *)(out + query_place(lane, p / 2, 1, head % 8)))[part] = split.low;
    }
}

// The queries of a slice in registers.
struct Query {
    u32 high[4][4], low[4][4];

    __device__ inline Query(const uint4 *fragments, int n) {
        int lane = threadIdx.x % 32, block = threadIdx.x / 32 * (SLICE / 16) + lane % 4;
#pragma unroll
        for (int step = 0; step < 4; ++step) {
            uint4 zero = {0, 0, 0, 0};
            bool exists = 16 * block < n;
            uint4 h = exists ? fragments[query_place(block, step, 0, lane / 4)] : zero;
            uint4 l = exists ? fragments[query_place(block, step, 1, lane / 4)] : zero;
            high[step][0] = h.x, high[step][1] = h.y, high[step][2] = h.z, high[step][3] = h.w;
            low[step][0] = l.x, low[step][1] = l.y, low[step][2] = l.z, low[step][3] = l.w;
        }
    }
};

// --- tiles of keys ---

// The 8 x 8 matrix of 16-bit numbers of which each lane has two neighbours of row `group`, turned.
__device__ inline u32 transposed(u32 pair) {
#ifdef LOCALV4_HOST
    int group = threadIdx.x % 32 / 4, member = threadIdx.x % 4;
    u32 first = __shfl_sync(0xffffffffu, pair, 8 * member + group / 2);
    u32 second = __shfl_sync(0xffffffffu, pair, 8 * member + 4 + group / 2);
    int shift = 16 * (group % 2);
    return (first >> shift & 0xffff) | (second >> shift & 0xffff) << 16;
#else
    u32 result;
    asm volatile("movmatrix.sync.aligned.m8n8.trans.b16 %0, %1;" : "=r"(result) : "r"(pair));
    return result;
#endif
}

// What the warps of a block exchange.
struct Exchange {
    float scores[WARPS][HEADS][SCORE_ROW];
    u32 high[HEADS][WEIGHT_ROW], low[HEADS][WEIGHT_ROW];
    float scale[HEADS];
};

// Where the sums of a tile of heads stand: of the values in the slice of each warp; the largest score
// so far, and the sum of weights of the keys of this thread, for head threadIdx.x / 16.
struct Sums {
    float values[8][4] = {};
    float largest, total;
};

// Sixteen channels of key number j for this lane; behind the last channel zeros.
template <typename Form, bool IS_EXACT>
__device__ inline Channels read_key(const Keys &keys, int j, int n, int rope) {
    int channel = threadIdx.x / 32 * SLICE + threadIdx.x % 4 * 16;
    if (channel >= n) return Channels{};
    if (!IS_EXACT && j < keys.raw) return F32Rows::read(keys.raw_key(j, n), channel, n, rope);
    return Form::read(keys.entry(j), channel, n, rope);
}

// Write this warp's share of the scores.
template <int KEYS, bool IS_EXACT>
__device__ inline void score(Exchange &shared, const Query &query, const Channels (&keys)[KEYS / 8]) {
    float scores[KEYS / 8][4] = {};
#pragma unroll
    for (int step = 0; step < 4; ++step) {
#pragma unroll
        for (int i = 0; i < KEYS / 8; ++i) {
            u32 high[2] = {keys[i].high[2 * step], keys[i].high[2 * step + 1]};
            mma_bf16(scores[i], query.high[step], high, scores[i]);
            mma_bf16(scores[i], query.low[step], high, scores[i]);
            if (IS_EXACT) continue;
            u32 low[2] = {keys[i].low[2 * step], keys[i].low[2 * step + 1]};
            mma_bf16(scores[i], query.high[step], low, scores[i]);
        }
    }
    int group = threadIdx.x % 32 / 4, column = threadIdx.x % 4 * 2;
#pragma unroll
    for (int i = 0; i < KEYS / 8; ++i) {
        float(*out)[SCORE_ROW] = shared.scores[threadIdx.x / 32];
        *(float2 *)(out[group] + 8 * i + column) = make_float2(scores[i][0], scores[i][1]);
        *(float2 *)(out[group + 8] + 8 * i + column) = make_float2(scores[i][2], scores[i][3]);
    }
}

// Add up the scores of `count` keys and make weights of them; sixteen threads a head.
template <int KEYS>
__device__ inline void weigh(Exchange &shared, Sums &sums, int count) {
    int head = threadIdx.x / 16, column = threadIdx.x % 16 * 2;
    float first = -INFINITE, second = -INFINITE;
    if (column < KEYS) {
        float2 sum = make_float2(0.0f, 0.0f);
#pragma unroll
        for (int warp = 0; warp < WARPS; ++warp) {
            float2 part = *(const float2 *)(shared.scores[warp][head] + column);
            sum.x += part.x, sum.y += part.y;
        }
        if (column < count) first = sum.x;
        if (column + 1 < count) second = sum.y;
    }
    float before = sums.largest, largest = first > before ? first : before;
    largest = second > largest ? second : largest;
    for (int distance = 8; distance > 0; distance /= 2) {
        float other = __shfl_xor_sync(0xffffffffu, largest, distance);
        largest = other > largest ? other : largest;
    }
    float scale = exp_as_cpu(before - largest);
    first = column < count ? exp_as_cpu(first - largest) : 0.0f;
    second = column + 1 < count ? exp_as_cpu(second - largest) : 0.0f;
    sums.largest = largest;
    sums.total = sums.total * scale + (first + second);
    if (column < KEYS) {
        Split split = split_pair(first, second);
        shared.high[head][column / 2] = split.high, shared.low[head][column / 2] = split.low;
    }
    if (column == 0) shared.scale[head] = scale;
}

// Add the weighted keys to this warp's slice of the values.
template <int KEYS, bool IS_EXACT>
__device__ inline void add_values(const Exchange &shared, Sums &sums, const Channels (&keys)[KEYS / 8]) {
    int group = threadIdx.x % 32 / 4, member = threadIdx.x % 4;
    float low_scale = shared.scale[group], high_scale = shared.scale[group + 8];
#pragma unroll
    for (int p = 0; p < 8; ++p) {
        sums.values[p][0] *= low_scale, sums.values[p][1] *= low_scale;
        sums.values[p][2] *= high_scale, sums.values[p][3] *= high_scale;
    }
#pragma unroll
    for (int i = 0; i < KEYS / 16; ++i) {
        u32 high[4], low[4];
#pragma unroll
        for (int part = 0; part < 4; ++part) {
            int head = group + part % 2 * 8, pair = 8 * i + member + part / 2 * 4;
            high[part] = shared.high[head][pair], low[part] = shared.low[head][pair];
        }
#pragma unroll
        for (int p = 0; p < 8; ++p) {
            u32 values[2] = {transposed(keys[2 * i].high[p]), transposed(keys[2 * i + 1].high[p])};
            mma_bf16(sums.values[p], high, values, sums.values[p]);
            mma_bf16(sums.values[p], low, values, sums.values[p]);
            if (IS_EXACT) continue;
            u32 rest[2] = {transposed(keys[2 * i].low[p]), transposed(keys[2 * i + 1].low[p])};
            mma_bf16(sums.values[p], high, rest, sums.values[p]);
        }
    }
}

// Attend to keys first ... first + KEYS - 1, those behind `end` left out.
template <typename Form, int KEYS, bool IS_EXACT>
__device__ inline void attend_tile(Exchange &shared, Sums &sums, const Query &query, const Keys &keys, int first,
                                   int end, int n, int rope) {
    Channels tile[KEYS / 8];
#pragma unroll
    for (int i = 0; i < KEYS / 8; ++i)
        tile[i] = read_key<Form, IS_EXACT>(keys, min(first + 8 * i + (int)threadIdx.x % 32 / 4, end - 1), n, rope);
    score<KEYS, IS_EXACT>(shared, query, tile);
    __syncthreads();
    weigh<KEYS>(shared, sums, end - first);
    __syncthreads();
    add_values<KEYS, IS_EXACT>(shared, sums, tile);
}

// Attend to keys first ... end - 1.
template <typename Form>
__device__ inline void attend_keys(Exchange &shared, Sums &sums, const Query &query, const Keys &keys, int first,
                                   int end, int n, int rope) {
    while (first < end) {
        if (Form::IS_EXACT && first >= keys.raw && end - first <= MOST_KEYS / 2) {
            attend_tile<Form, MOST_KEYS / 2, true>(shared, sums, query, keys, first, end, n, rope);
            first += MOST_KEYS / 2;
        } else if (Form::IS_EXACT && first >= keys.raw) {
            attend_tile<Form, MOST_KEYS, true>(shared, sums, query, keys, first, end, n, rope);
            first += MOST_KEYS;
        } else {
            attend_tile<Form, MOST_KEYS / 2, false>(shared, sums, query, keys, first, end, n, rope);
            first += MOST_KEYS / 2;
        }
    }
}

// The sum of weights of head threadIdx.x / 16, from the threads that share it.
__device__ inline float head_total(const Sums &sums) {
    float total = sums.total;
    for (int distance = 8; distance > 0; distance /= 2) total += __shfl_xor_sync(0xffffffffu, total, distance);
    return total;
}

// --- output ---

// What turns two neighbouring channels back by the angles of the query.
struct Turn {
    float c = 1.0f, s = 0.0f;
    bool turns;

    __device__ inline Turn(int channel, int n, int pairs, const float *cos, const float *sin)
        : turns(channel >= n - 2 * pairs && channel < n) {
        int place = (channel - (n - 2 * pairs)) / 2;
        if (turns) c = cos[place], s = sin[place];
    }

    __device__ inline float2 back(float even, float odd) const {
        return turns ? make_float2(even * c + odd * s, odd * c - even * s) : make_float2(even, odd);
    }
};
