// The lightning indexer in tensor cores: sixteen heads of a query times eight or more entries.
//
// Entries in FP4 become int8 as on the CPU (localv4/kernels/code_keys.py), so products are integers
// and scores have the CPU's bits. Those in float32 and bfloat16 are multiplied as attention does it
// (attention.cuh), within 2^-16 of their size.

#pragma once

#include "attention.cuh"
#include "index_forms.cuh"

// --- queries ---

// What a query is in memory: fragments of its tiles of heads, then a weight for each head of them.
template <typename Form>
__device__ inline i64 fragment_bytes(int tiles, int n) { return (i64)tiles * HEADS * n * Form::QUERY_BYTES; }

// Turn the channels of a head by the angles of its token; `row` in shared memory, a warp.
__device__ inline void turn_head(float *row, const float *x, int n, const float *cos, const float *sin, int pairs) {
    for (int i = threadIdx.x % 32; i < n / 2; i += 32) {
        float even = x[2 * i], odd = x[2 * i + 1];
        int turn = i - (n / 2 - pairs);
        float c = turn < 0 ? 1.0f : cos[turn], s = turn < 0 ? 0.0f : sin[turn];
        row[2 * i] = turn < 0 ? even : __fmaf_rn(odd, -s, __fmul_rn(even, c));
        row[2 * i + 1] = turn < 0 ? odd : __fmaf_rn(odd, c, __fmul_rn(even, s));
    }
    __syncwarp();
}

// Multiply a head with the Hadamard matrix of `mix_row`; a warp.
__device__ inline void mix_head(float *row, int n) {
    int block = n & -n, lane = threadIdx.x % 32;
    for (int distance = 1; distance < block; distance *= 2) {
        for (int i = lane; i < n / 2; i += 32) {
            int at = i / distance * 2 * distance + i % distance;
            float low = row[at], high = row[at + distance];
            row[at] = low + high, row[at + distance] = low - high;
        }
        __syncwarp();
    }
    float factor = __fdiv_rn(1.0f, __fsqrt_rn((float)block));
    for (int i = lane; i < n; i += 32) row[i] *= factor;
    __syncwarp();
}

// --- entries in float32 and bfloat16 ---

template <typename Rows>
struct FloatIndex {
    static constexpr int QUERY_BYTES = 4, KEYS = 16;

    __device__ static i64 stride(int n, int rope) { return Rows::stride(n, rope); }

    // Write a head's fragments; return what its weight is to be multiplied with. A warp.
    __device__ static float write_query(uint4 *out, int head, float *row, int n) {
        uint4 *tile = out + head / HEADS * (n * HEADS / 4);
        for (int i = threadIdx.x % 32; i < n / 2; i += 32) {
            Split split = split_pair(row[2 * i], row[2 * i + 1]);
            int p = i % 8, part = head % HEADS / 8 + 2 * (p % 2);
            ((u32 *)(tile + query_place(i / 8, p / 2, 0, head % 8)))[part] = split.high;
            ((u32 *)(tile + query_place(i / 8, p / 2, 1, head % 8)))[part] = split.low;
        }
        return 1.0f;
    }

    // KEYS entries, 64 channels of them at a time, and the products with a tile of heads.
    static constexpr int CHANNELS = SLICE;
    Channels keys[KEYS / 8];

    __device__ inline void read(const u8 *entries, int first, int last, int channel, int n, int rope) {
        int own = channel + threadIdx.x % 4 * 16;
#pragma unroll
        for (int i = 0; i < KEYS / 8; ++i) {
            const u8 *row = entries + min(first + 8 * i + (int)threadIdx.x % 32 / 4, last) * stride(n, rope);
            keys[i] = own < n ? Rows::read(row, own, n, rope) : Channels{};
        }
    }

    __device__ inline void add_products(float (&sums)[KEYS / 8][4], const uint4 *queries, int tile, int channel, int n) const {
        int lane = threadIdx.x % 32, block = channel / 16 + lane % 4;
        if (channel >= n) return;
        const uint4 *own = queries + tile * (n * HEADS / 4);
        for (int step = 0; step < 4; ++step) {
            uint4 zero = {0, 0, 0, 0};
            uint4 h = 16 * block < n ? own[query_place(block, step, 0, lane / 4)] : zero;
            uint4 l = 16 * block < n ? own[query_place(block, step, 1, lane / 4)] : zero;
            u32 high[4] = {h.x, h.y, h.z, h.w}, low[4] = {l.x, l.y, l.z, l.w};
#pragma unroll
            for (int i = 0; i < KEYS / 8; ++i) {
                u32 key[2] = {pick(keys[i].high, 2 * step), pick(keys[i].high, 2 * step + 1)};
                mma_bf16(sums[i], high, key, sums[i]);
                mma_bf16(sums[i], low, key, sums[i]);
                if (Rows::IS_EXACT) continue;
                u32 rest[2] = {pick(keys[i].low, 2 * step), pick(keys[i].low, 2 * step + 1)};
                mma_bf16(sums[i], high, rest, sums[i]);
            }
        }
    }

    // An element of an array in registers.
    __device__ static u32 pick(const u32 (&values)[8], int index) { return values[index]; }

    typedef float Sum;
    __device__ static float positive(float sum) { return 0.0f > sum ? 0.0f : sum; }
    __device__ static float scale(const u8 *row, int n) { return 1.0f; }
};

// --- entries in FP4 ---

template <int SOME_KEYS>
struct CodeIndex {
    static constexpr int QUERY_BYTES = 1, KEYS = SOME_KEYS, CHANNELS = 128;

    __device__ static i64 stride(int n, int rope) { return E2m1Rows::stride(n, rope); }

    // Mix a head, round it to int8 and write its fragments.
    __device__ static float write_query(uint4 *out, int head, float *row, int n) {
        mix_head(row, n);
        int bits = 0;
        for (int c = threadIdx.x % 32; c < n; c += 32) bits = max(bits, __float_as_int(row[c]) & 0x7fffffff);
        float size = __int_as_float(largest_bits(bits));
        size = 1e-30f > size ? 1e-30f : size;
        float factor = __fdiv_rn(127.0f, size);
        i8 *tile = (i8 *)out + head / HEADS * HEADS * n;
        for (int c = threadIdx.x % 32; c < n; c += 32) {
            int group = c / 32, half = c % 32 / 16, member = c % 16 / 4, part = head % HEADS / 8 + 2 * half;
            tile[((group * 8 + head % 8) * 4 + member) * 16 + 4 * part + c % 4] = (i8)round_to_int(__fmul_rn(row[c], factor));
        }
        // codes are their value times 16 / 2^k, k the exponent of their row's largest scale
        return __fmul_rn(size, (1.0f / 127.0f) * power(127 - E2M1_UNIT - SPREAD - 1));
    }

    u32 keys[KEYS / 8][CHANNELS / 32][2];

    // Four bytes: rows of less than 128 channels may begin anywhere.
    __device__ static u32 word_at(const u8 *at) {
        if ((i64)at % 4 == 0) return *(const u32 *)at;
        return at[0] | at[1] << 8 | at[2] << 16 | (u32)at[3] << 24;
    }

    // The largest scale of a row.
    __device__ static int largest_scale(const u8 *row, int n) {
        int largest = 0;
        for (int i = 0; i < n / 32; ++i) largest = max(largest, (int)row[n / 2 + i]);
        return largest;
    }

    __device__ inline void read(const u8 *entries, int first, int last, int channel, int n, int rope) {
#pragma unroll
        for (int i = 0; i < KEYS / 8; ++i) {
            const u8 *row = entries + min(first + 8 * i + (int)threadIdx.x % 32 / 4, last) * stride(n, rope);
            int largest = largest_scale(row, n);
#pragma unroll
            for (int j = 0; j < CHANNELS / 32; ++j) {
                int group = channel / 32 + j;
                if (32 * group >= n) continue;
                u32 codes = word_at(row + 16 * group + threadIdx.x % 4 * 4);
                expand(keys[i][j], codes, largest - row[n / 2 + group]);
            }
        }
    }

    // Eight codes as bytes: those of low nibbles, and those of high ones.
    __device__ static void expand(u32 (&out)[2], u32 codes, int shift) {
        // twice the values times 8, of which a shift takes away nothing but zeros
        u32 few = 0x18100800u >> shift, many = 0x60403020u >> shift;
        u32 first = __byte_perm(few, many, codes & 0x7777), second = __byte_perm(few, many, codes >> 16 & 0x7777);
        u32 signs[2] = {codes >> 3 & 0x01010101u, codes >> 7 & 0x01010101u};
        u32 sizes[2] = {__byte_perm(first, second, 0x6420), __byte_perm(first, second, 0x7531)};
#pragma unroll
        for (int i = 0; i < 2; ++i) {
            u32 mask = signs[i] * 255, negative = (0x80808080u - sizes[i]) ^ 0x80808080u;
            out[i] = (sizes[i] & ~mask) | (negative & mask);
        }
    }

    __device__ inline void add_products(int (&sums)[KEYS / 8][4], const uint4 *queries, int tile, int channel, int n) const {
        const uint4 *own = queries + (i64)tile * HEADS * n / 16 + channel / 32 * 32 + threadIdx.x % 32;
#pragma unroll
        for (int j = 0; j < CHANNELS / 32; ++j) {
            if (channel + 32 * j >= n) continue;
            uint4 four = own[32 * j];
            u32 query[4] = {four.x, four.y, four.z, four.w};
#pragma unroll
            for (int i = 0; i < KEYS / 8; ++i) mma_s8(sums[i], query, keys[i][j], sums[i]);
        }
    }

    typedef int Sum;
    __device__ static float positive(int sum) { return (float)max(sum, 0); }
    __device__ static float scale(const u8 *row, int n) { return power(largest_scale(row, n)); }
};

// --- scores ---

// A query for a block of threads: where its fragments and weights are.
struct IndexQuery {
    const uint4 *fragments;
    const float *weights;
    int tiles, n, rope;
};

// Score the entries first ... first + Index::KEYS - 1, of which `last` is the last one; a warp.
// Products of heads are added as the CPU does: heads sixteen apart one after another, then lower
// halves to upper halves.
template <typename Index>
__device__ inline void score_entries(float *scores, const IndexQuery &query, const u8 *entries, int first, int last) {
    Index keys;
    float parts[Index::KEYS / 8][4] = {};
    bool is_narrow = query.n <= Index::CHANNELS;
    if (is_narrow) keys.read(entries, first, last, 0, query.n, query.rope);
    int group = threadIdx.x % 32 / 4;
    for (int tile = 0; tile < query.tiles; ++tile) {
        typename Index::Sum sums[Index::KEYS / 8][4] = {};
        for (int channel = 0; channel < query.n; channel += Index::CHANNELS) {
            if (!is_narrow) keys.read(entries, first, last, channel, query.n, query.rope);
            keys.add_products(sums, query.fragments, tile, channel, query.n);
        }
        float low = query.weights[HEADS * tile + group], high = query.weights[HEADS * tile + group + 8];
#pragma unroll
        for (int i = 0; i < Index::KEYS / 8; ++i) {
#pragma unroll
            for (int j = 0; j < 4; ++j)
                parts[i][j] = __fmaf_rn(Index::positive(sums[i][j]), j < 2 ? low : high, parts[i][j]);
        }
    }
#pragma unroll
    for (int i = 0; i < Index::KEYS / 8; ++i) {
#pragma unroll
        for (int j = 0; j < 2; ++j) {
            float sum = parts[i][j] + parts[i][j + 2];
            for (int distance = 16; distance >= 4; distance /= 2) sum += __shfl_xor_sync(0xffffffffu, sum, distance);
            int number = first + 8 * i + threadIdx.x % 4 * 2 + j;
            if (group == 0 && number <= last)
                scores[number] = __fmul_rn(sum, Index::scale(entries + number * Index::stride(query.n, query.rope), query.n));
        }
    }
}

// Write the fragments and weights of a query of `heads` heads; warps from number `warp` on take one
// head in turn. row: n floats of shared memory of this warp.
template <typename Index>
__device__ inline void write_index_query(uint4 *fragments, float *weights, float *row, int warp, int warps, const float *x,
                                         int heads, int n, const float *cos, const float *sin, int pairs,
                                         const float *head_weights, float factor) {
    int tiles = (heads + HEADS - 1) / HEADS;
    for (int head = warp; head < tiles * HEADS; head += warps) {
        bool exists = head < heads;
        if (exists) {
            turn_head(row, x + (i64)head * n, n, cos, sin, pairs);
        } else {
            for (int c = threadIdx.x % 32; c < n; c += 32) row[c] = 0.0f;
            __syncwarp();
        }
        float scale = Index::write_query(fragments, head, row, n);
        if (threadIdx.x % 32 == 0) weights[head] = exists ? __fmul_rn(__fmul_rn(head_weights[head], factor), scale) : 0.0f;
        __syncwarp();
    }
}
