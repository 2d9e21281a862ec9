// Products of packed weights of integers with many tokens, by tensor cores, with the CPU's bits.
//
// A block of threads computes a tile: some groups of sixteen rows times some tokens. Superblocks of
// weights, and what belongs to them of the activations, come into shared memory by asynchronous
// copies, a few stages ahead. Each warp has groups of its own and all tokens of the tile.
//
// One instruction multiplies a block of 32 columns of a group with eight tokens, as whole numbers:
// in any order the same. Then each sum is scaled and added, block after block, as on the CPU.
//
// Which element an instruction takes for which is free, if weights and activations agree:
// * columns: a thread gives columns 8 * member ... + 7 of a block, which in 4-bit formats are the
//   low and the high halves of one word, and in activations eight bytes in a row;
// * rows: the instruction's rows i and i + 8 are 2 * i and 2 * i + 1 of the group, which are beside
//   each other in a line of weights and of results;
// * tokens: of a pair of instructions, thread `member` gets tokens 4 * member ... + 3.
// Sums are whole numbers on top of MAGIC, whose bits are then those of a float: MAGIC_FLOAT + sum.

#pragma once

#include "packed.cuh"

constexpr int MAGIC = 0x4B400000;              // the bits of MAGIC_FLOAT
constexpr float MAGIC_FLOAT = 12582912.0f;     // 1.5 * 2^23
constexpr int Q_GAP = 64, SUMS_BYTES = 16;

// Where a thread stands in the fragments of an instruction.
struct Place {
    int group, member;
};

__device__ inline Place own_place() {
    return {(int)(threadIdx.x % 32 / 4), (int)(threadIdx.x % 4)};
}

// Asynchronous copies to places in shared memory, which are half as long as addresses.
#if defined(LOCALV4_HOST) || __CUDA_ARCH__ < 800
typedef u8 *SharedPlace;
__device__ inline SharedPlace place_of(u8 *shared) { return shared; }
__device__ inline void copy_line(SharedPlace to, const u8 *from) { *(uint4 *)to = *(const uint4 *)from; }
__device__ inline void copy_word(SharedPlace to, const u8 *from) { *(u32 *)to = *(const u32 *)from; }
#else
typedef u32 SharedPlace;
__device__ inline SharedPlace place_of(u8 *shared) { return (u32)__cvta_generic_to_shared(shared); }
__device__ inline void copy_line(SharedPlace to, const u8 *from) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" :: "r"(to), "l"(from));
}
__device__ inline void copy_word(SharedPlace to, const u8 *from) {
    asm volatile("cp.async.ca.shared.global [%0], [%1], 4;" :: "r"(to), "l"(from));
}
#endif

// What belongs to two tokens in a block: scales and, where a format wants them, sums of the two
// halves of the block.
struct Columns {
    float d[2];
    float low[2], high[2];
};

// --- formats ---
//
// A format says how a superblock looks, in memory and in shared memory (`place`), reads a block of a
// group (`Rows`: fragments and scales of two rows), adds the products with eight tokens to sums, and
// puts these right at the end of a superblock (`finish`); `FACTOR` is for the result. `prepare` is
// called once by all threads.

// What the sums of sixteen rows with eight tokens are made of: rows 2 * i, 2 * i + 1 are the lower
// and the upper two.
struct PlainSums {
    float total[4];
};

// --- tiles ---

// `groups` groups of each of `warps` warps times 8 * `eights` tokens. In shared memory there is room
// for `stages` stages of `superblocks` superblocks: all warps wait for each other once a stage.
template <class Format_, int groups, int eights, int warps, int stages, int superblocks = 1>
struct Tile {
    typedef Format_ Format;
    static constexpr int GROUPS_OF_WARP = groups, EIGHTS = eights, STAGES = stages, SUPERBLOCKS = superblocks;
    static constexpr int THREADS = 32 * warps, GROUPS = groups * warps, TOKENS = 8 * eights;
    static constexpr int COLUMNS = Format::COLUMNS, BLOCKS = COLUMNS / BLOCK;
    // Where the parts of a superblock begin, and its bytes.
    static constexpr int Q = GROUPS * Format::BYTES, D = Q + TOKENS * COLUMNS, B = D + BLOCKS * TOKENS * 4;
    static constexpr int SIZE = B + (Format::WANTS_SUMS ? BLOCKS * TOKENS * SUMS_BYTES : 0);
    // Blocks whose instructions are mixed: as many as the registers allow and are of use.
    static constexpr bool IS_WIDE = Format::BYTES >= 16 * COLUMNS;  // a byte for each weight
    static constexpr int UNROLLED = EIGHTS == 8 || (EIGHTS > 8 && IS_WIDE) ? 1 : EIGHTS > 8 || BLOCKS > 4 ? 2 : BLOCKS;
    static constexpr int STAGE = SUPERBLOCKS * SIZE, SHARED = STAGES * STAGE;
    typedef typename Format::Sums Sums[groups][eights];

    // The token of a column of an instruction; `eight` is its number in the tile.
    __device__ static int token(int eight, int column) {
        if (EIGHTS == 1) return column;
        return 16 * (eight / 2) + 4 * (column / 2) + 2 * (eight % 2) + column % 2;
    }

    // By how much the blocks of a token are turned in shared memory, so that the threads of a warp
    // read different banks.
    __device__ static int turn(int token) {
        int low = EIGHTS == 1 ? token % 4 : token % 2 + token / 4 % 2 * 2;
        return COLUMNS == 64 ? low / 2 : low;
    }
};

// What is multiplied: `groups` groups of `group_bytes` from w on, with `count` rows of activations.
struct Factors {
    const u8 *w;
    i64 group_bytes;
    int groups, count, cols;
    const u8 *q, *d, *b;

    template <class Format>
    __device__ static Factors of(const u8 *matrix, i64 group, i64 all_groups, i64 cols, const u8 *q,
                                 const u8 *d, const u8 *b, i64 token, i64 tokens) {
        i64 size = cols / Format::COLUMNS * Format::BYTES, blocks = cols / BLOCK;
        return {matrix + group * size, size, (int)(all_groups - group), (int)(tokens - token), (int)cols,
                q + token * (cols + Q_GAP), d + token * blocks * 4, b + token * blocks * SUMS_BYTES};
    }
};

// The copies of a thread, from superblock to superblock: a warp copies what its own groups need of the
// weights, and all warps together the activations.
template <class Shape>
struct Copies {
    typedef typename Shape::Format Format;
    static constexpr int CHUNKS = Format::BYTES / 16, Q_CHUNKS = Shape::COLUMNS / 16;
    static constexpr int Q_STEP = Shape::THREADS / Q_CHUNKS, D_STEP = Shape::THREADS / Shape::BLOCKS;
    const u8 *w, *q, *d, *b;
    i64 group_bytes, q_bytes, d_bytes;
    int groups, q_token, d_token, count;
    SharedPlace ring, to_w, to_q;
    int to_d, q_chunk;

    __device__ Copies(const Factors &x, u8 *shared) {
        int lane = threadIdx.x % 32, first = threadIdx.x / 32 * Shape::GROUPS_OF_WARP;
        int chunk = threadIdx.x % Q_CHUNKS, block = threadIdx.x % Shape::BLOCKS;
        q_token = threadIdx.x / Q_CHUNKS, d_token = threadIdx.x / Shape::BLOCKS;
        groups = x.groups - first, count = x.count;
        group_bytes = x.group_bytes;
        q_bytes = (i64)Q_STEP * (x.cols + Q_GAP), d_bytes = (i64)D_STEP * (x.cols / BLOCK) * 4;
        w = x.w + first * x.group_bytes + 16 * lane;
        q = x.q + (i64)q_token * (x.cols + Q_GAP) + 16 * chunk;
        i64 entry = (i64)d_token * (x.cols / BLOCK) + block;
        d = x.d + 4 * entry, b = x.b + SUMS_BYTES * entry;
        ring = place_of(shared);
        to_w = ring + first * Format::BYTES + Format::place(16 * lane);
        q_chunk = chunk;
        to_q = ring + Shape::Q + q_token * Shape::COLUMNS + 16 * (chunk % 2);
        to_d = block * Shape::TOKENS + d_token;
    }

    // Start the copies of the next superblock, to a place in the ring.
    __device__ void start(int to) {
        int lane = threadIdx.x % 32;
#pragma unroll
        for (int m = 0; m < Shape::GROUPS_OF_WARP; ++m)
#pragma unroll
            for (int k = 0; 32 * k < CHUNKS; ++k)
                if (m < groups && (32 * k + 32 <= CHUNKS || lane < CHUNKS % 32))
                    copy_line(to_w + to + m * Format::BYTES + 512 * k, w + m * group_bytes + 512 * k);
#pragma unroll
        for (int k = 0; k * Q_STEP < Shape::TOKENS; ++k) {
            // with steps of eight all tokens of a thread are turned alike
            int token = q_token + k * Q_STEP, turned = q_chunk / 2 ^ Shape::turn(Q_STEP % 8 == 0 ? q_token : token);
            if (token < Shape::TOKENS && token < count)
                copy_line(to_q + to + k * Q_STEP * Shape::COLUMNS + 32 * turned, q + k * q_bytes);
        }
#pragma unroll
        for (int k = 0; k * D_STEP < Shape::TOKENS; ++k) {
            if (d_token + k * D_STEP >= Shape::TOKENS || d_token + k * D_STEP >= count) continue;
            int entry = to_d + k * D_STEP;
            copy_word(ring + to + Shape::D + 4 * entry, d + k * d_bytes);
            if (Format::WANTS_SUMS) copy_line(ring + to + Shape::B + SUMS_BYTES * entry, b + 4 * k * d_bytes);
        }
        w += Format::BYTES, q += Shape::COLUMNS, d += 4 * Shape::BLOCKS, b += SUMS_BYTES * Shape::BLOCKS;
    }
};

// What belongs to the tokens of one or two instructions in a block: those of `eight` and the next.
template <class Shape>
__device__ inline void load_columns(Columns (&at)[2], const u8 *stage, int block, int eight, Place own) {
    int first = block * Shape::TOKENS + (Shape::EIGHTS == 1 ? 2 * own.member : 8 * eight + 4 * own.member);
    const u8 *d = stage + Shape::D + 4 * first;
    if (Shape::EIGHTS == 1) {
        float2 both = *(const float2 *)d;
        at[0].d[0] = both.x, at[0].d[1] = both.y;
    } else {
        float4 all = *(const float4 *)d;
        at[0].d[0] = all.x, at[0].d[1] = all.y, at[1].d[0] = all.z, at[1].d[1] = all.w;
    }
    if (!Shape::Format::WANTS_SUMS) return;
#pragma unroll
    for (int i = 0; i < (Shape::EIGHTS == 1 ? 2 : 4); ++i) {
        int2 sums = *(const int2 *)(stage + Shape::B + SUMS_BYTES * (first + i) + 8);
        at[i / 2].low[i % 2] = __int_as_float(MAGIC + sums.x) - MAGIC_FLOAT;
        at[i / 2].high[i % 2] = __int_as_float(MAGIC + sums.y) - MAGIC_FLOAT;
    }
}

// Add the products of a block of 32 columns.
template <class Shape>
__device__ inline void add_block(typename Shape::Sums &sums, const u8 *w, const u8 *stage, int block, Place own) {
    typedef typename Shape::Format Format;
    typename Format::Rows rows[Shape::GROUPS_OF_WARP];
#pragma unroll
    for (int m = 0; m < Shape::GROUPS_OF_WARP; ++m) rows[m] = Format::load(w + m * Format::BYTES, block, own);
    int first = Shape::token(0, own.group);
    const u8 *q = stage + Shape::Q + first * Shape::COLUMNS + 32 * (block ^ Shape::turn(first)) + 8 * own.member;
#pragma unroll
    for (int pair = 0; pair < Shape::EIGHTS; pair += 2) {
        Columns at[2];
        load_columns<Shape>(at, stage, block, pair, own);
#pragma unroll
        for (int eight = pair; eight < pair + 2 && eight < Shape::EIGHTS; ++eight) {
            uint2 both = *(const uint2 *)(q + (8 * pair + 2 * (eight - pair)) * Shape::COLUMNS);
            const u32 b[2] = {both.x, both.y};
#pragma unroll
            for (int m = 0; m < Shape::GROUPS_OF_WARP; ++m) Format::add(sums[m][eight], rows[m], b, at[eight - pair]);
        }
    }
}

// Add the products of a superblock in shared memory.
template <class Shape>
__device__ inline void add_superblock(typename Shape::Sums &sums, const u8 *at, Place own) {
    typedef typename Shape::Format Format;
    const u8 *w = at + threadIdx.x / 32 * Shape::GROUPS_OF_WARP * Format::BYTES;
#pragma unroll (Shape::UNROLLED)
    for (int block = 0; block < Shape::BLOCKS; ++block) add_block<Shape>(sums, w, at, block, own);
#pragma unroll
    for (int m = 0; m < Shape::GROUPS_OF_WARP; ++m)
#pragma unroll
        for (int n = 0; n < Shape::EIGHTS; ++n) Format::finish(sums[m][n], w + m * Format::BYTES, own);
}

// The sums of a tile; `shared` has Shape::SHARED bytes, which nobody uses any more at the end.
template <class Shape>
__device__ inline void multiply_tile(typename Shape::Sums &sums, const Factors &x, u8 *shared) {
    constexpr int AHEAD = Shape::STAGES - 1, END = Shape::STAGES * Shape::STAGE, COUNT = Shape::SUPERBLOCKS;
    Place own = own_place();
    Copies<Shape> copies(x, shared);
    int left = x.cols / Shape::COLUMNS;  // superblocks
#pragma unroll
    for (int m = 0; m < Shape::GROUPS_OF_WARP; ++m)
#pragma unroll
        for (int n = 0; n < Shape::EIGHTS; ++n) sums[m][n] = typename Shape::Format::Sums();
#pragma unroll
    for (int i = 0; i < AHEAD * COUNT; ++i) {
        if (i < left) copies.start(i * Shape::SIZE);
        if (i % COUNT == COUNT - 1) commit_copies();
    }
    int from = 0, to = AHEAD * Shape::STAGE;  // places in the ring
    for (; left > 0; left -= COUNT) {
        wait_for_copies<AHEAD - 1>();
        __syncthreads();  // all have what was copied, and none still reads what comes to be written
#pragma unroll
        for (int i = 0; i < COUNT; ++i)
            if (left > AHEAD * COUNT + i) copies.start(to + i * Shape::SIZE);
        commit_copies();
        if (left >= COUNT) {
#pragma unroll
            for (int i = 0; i < COUNT; ++i) add_superblock<Shape>(sums, shared + from + i * Shape::SIZE, own);
        } else {
#pragma unroll 1
            for (int i = 0; i < left; ++i) add_superblock<Shape>(sums, shared + from + i * Shape::SIZE, own);
        }
        from = from + Shape::STAGE == END ? 0 : from + Shape::STAGE;
        to = to + Shape::STAGE == END ? 0 : to + Shape::STAGE;
    }
    __syncthreads();
}

// Write the sums of a tile: row `token` of `out`, `stride` bytes behind the one before, for each
// token that exists, from the column on that belongs to the tile's first row.
template <class Shape>
__device__ inline void store_tile(const typename Shape::Sums &sums, const Factors &x, u8 *out, i64 stride) {
    Place own = own_place();
    int warp = threadIdx.x / 32;
#pragma unroll
    for (int m = 0; m < Shape::GROUPS_OF_WARP; ++m) {
        int group = warp * Shape::GROUPS_OF_WARP + m;
        if (group >= x.groups) continue;
#pragma unroll
        for (int n = 0; n < Shape::EIGHTS; ++n)
#pragma unroll
            for (int i = 0; i < 2; ++i) {
                int token = Shape::token(n, 2 * own.member + i);
                if (token >= x.count) continue;
                float2 both = {sums[m][n].total[i] * Shape::Format::FACTOR, sums[m][n].total[2 + i] * Shape::Format::FACTOR};
                *(float2 *)(out + token * stride + 4 * (GROUP_ROWS * group + 2 * own.group)) = both;
            }
    }
}

// out[t] = matrix . x[t]: twin of `many_tokens.share_gemm`.
//
// Words: matrix, row groups, columns, q, d, b, tokens, out, its row stride in bytes. (Scratch memory,
// which follows, is for the CPU.) Word 11: of how many such products this is the first, or 0; then by
// how many bytes matrix, q, d, b and out of the next are apart. A block of threads for each tile, those
// of the same rows one after the other.
template <class Shape>
__device__ inline void gemm(const Words &op, u8 *shared) {
    i64 groups = op.number(2), tokens = op.number(7), stride = op.number(9);
    i64 tiles = (tokens + Shape::TOKENS - 1) / Shape::TOKENS;
    i64 of_each = tiles * ((groups + Shape::GROUPS - 1) / Shape::GROUPS);
    i64 number = blockIdx.x / of_each, block = blockIdx.x % of_each;
    i64 group = block / tiles * Shape::GROUPS, token = block % tiles * Shape::TOKENS;
    Factors x = Factors::of<typename Shape::Format>(
        op.address<const u8>(1, number * op.number(12)), group, groups, op.number(3),
        op.address<const u8>(4, number * op.number(13)), op.address<const u8>(5, number * op.number(14)),
        op.address<const u8>(6, number * op.number(15)), token, tokens);
    Shape::Format::prepare();
    typename Shape::Sums sums;
    multiply_tile<Shape>(sums, x, shared);
    u8 *out = op.address<u8>(8, number * op.number(16));
    store_tile<Shape>(sums, x, out + token * stride + 4 * GROUP_ROWS * group, stride);
}

// A kernel for each number of tokens of a tile; its shape is to be known to twins/gemm.py.
#define GEMM(name, Format, groups, eights, warps, stages, superblocks, blocks)       \
    extern "C" __global__ void __launch_bounds__(32 * warps, blocks)                 \
    name(const Words op) {                                                           \
        DYNAMIC_SHARED(shared);                                                      \
        gemm<Tile<Format, groups, eights, warps, stages, superblocks>>(op, shared);  \
    }
