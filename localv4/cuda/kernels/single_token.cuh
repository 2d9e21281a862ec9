// One token times packed weights, the part that all formats share.
//
// A block of threads computes some rows of some matrices (`slots`: row groups, gate and up, or
// experts). What a thread reads is a task: a block of 32 columns of four rows, 16 bytes of a line at
// a time. Its whole numbers are exact in any order and go to shared memory; then one thread for each
// row adds them up in the order of the CPU (localv4/kernels/matvec.py), so that the bits are equal.
//
// `Products` is a format's part: Task (load, store), chain (the sum over the blocks of a row), finish
// (what happens to that sum), and lookup (tables that all threads of a block make first).

#pragma once

#include "activations.cuh"
#include "packed.cuh"

constexpr int TOKEN_THREADS = 256;
constexpr int TABLE_ROWS = 4096;    // of all blocks and slots in shared memory at a time
constexpr int DOWN_ROWS = 8;        // rows of a block of threads that adds up experts
constexpr int ROW_GAP = 16;         // floats between two rows of hidden layers

// `most` blocks of threads run on a multiprocessor at a time. With four, the blocks of a whole matrix
// of a model fit on a large GPU at once, where a few too many would take twice as long.
#define TOKEN_KERNEL(name, most) BOUNDED_KERNEL(__launch_bounds__(TOKEN_THREADS, most), name)
#define EARLY_TOKEN_KERNEL(name, most) EARLY_KERNEL(__launch_bounds__(TOKEN_THREADS, most), name)

// A table (slots, blocks, ROWS, FLOATS) in shared memory; a gap behind each slot keeps those that are
// read at the same time in different banks.
template <int ROWS, int FLOATS>
struct Table {
    float *start;
    int slots, blocks;

    __device__ inline float *at(int slot, int block) const {
        return start + (slot * (blocks + 1) + block) * (ROWS * FLOATS);
    }
};

// Blocks that fit into the table for all slots: whole superblocks.
template <class Products, int ROWS>
__device__ inline int blocks_at_once(int slots, int blocks) {
    int most = TABLE_ROWS / ROWS / slots / Products::BLOCKS * Products::BLOCKS;
    return min(blocks, max(most, Products::BLOCKS));
}

// The task of a thread: which block of which slot, and which four rows.
template <int QUADS>
struct TaskPlace {
    int slot = 0, block, quad;

    __device__ inline TaskPlace(int blocks) : block(threadIdx.x / QUADS), quad(threadIdx.x % QUADS) {
        into_slot(blocks);
    }

    // Go on by TOKEN_THREADS tasks.
    __device__ inline void advance(int blocks) {
        block += TOKEN_THREADS / QUADS;
        into_slot(blocks);
    }

    // Few slots are passed at a time: that takes less than a division.
    __device__ inline void into_slot(int blocks) {
        while (block >= blocks) block -= blocks, ++slot;
    }
};

// The product of row threadIdx.x % ROWS of slot threadIdx.x / ROWS, in the threads that have one.
//
// What other kernels have computed, activations, is waited for when weights have been asked for. From
// then on each task makes room for the weights of another one, so that some are always on their way.
// `source.weights(slot)` is the group of rows of a slot, if it `exists(slot)`, and `source.x(slot)`
// its activations; `first_quad` * 4 is the first row in a group.
template <class Products, int ROWS, class Source>
__device__ inline float row_products(const Source &source, int slots, int blocks, int first_quad) {
    DYNAMIC_SHARED(memory);
    const typename Products::Lookup lookup = Products::lookup();
    constexpr int QUADS = ROWS / 4, TOGETHER = Products::TOGETHER;
    int at_once = blocks_at_once<Products, ROWS>(slots, blocks);
    Table<ROWS, Products::FLOATS> table = {(float *)memory, slots, at_once};
    int slot = threadIdx.x / ROWS, row = threadIdx.x % ROWS;
    float sum = 0.0f;
    for (int first = 0; first < blocks; first += at_once) {
        int count = min(at_once, blocks - first);
        TaskPlace<QUADS> place(count), next = place;
        typename Products::Task parts[TOGETHER];
#pragma unroll
        for (int i = 0; i < TOGETHER; ++i, next.advance(count))
            if (next.slot < slots && source.exists(next.slot))
                parts[i].load(source.weights(next.slot), first + next.block, first_quad + next.quad);
        wait_for_results();
        while (place.slot < slots) {
#pragma unroll
            for (int i = 0; i < TOGETHER; ++i, place.advance(count), next.advance(count)) {
                if (place.slot < slots && source.exists(place.slot))
                    parts[i].store(table, place.slot, place.block, place.quad, source.x(place.slot), first, lookup);
                if (next.slot < slots && source.exists(next.slot))
                    parts[i].load(source.weights(next.slot), first + next.block, first_quad + next.quad);
            }
        }
        __syncthreads();
        if (slot < slots && source.exists(slot))
            sum = Products::chain(sum, table, slot, row, count, source.x(slot), first);
        __syncthreads();
    }
    return sum;
}

// Groups that lie one after the other, and are multiplied with the same activations.
struct GroupSource {
    const u8 *first;
    i64 bytes;  // of a group
    Rounded activations;

    __device__ inline bool exists(int) const { return true; }
    __device__ inline const u8 *weights(int slot) const { return first + slot * bytes; }
    __device__ inline const Rounded &x(int) const { return activations; }
};

// The activations of a block, and the lines of four rows of it.
struct BlockColumns {
    u32 words[8];

    __device__ inline BlockColumns(const i8 *q) {
        uint4 low = load_input_u128(q), high = load_input_u128(q + 16);
        words[0] = low.x, words[1] = low.y, words[2] = low.z, words[3] = low.w;
        words[4] = high.x, words[5] = high.y, words[6] = high.z, words[7] = high.w;
    }
};

template <int LINES>
__device__ inline void load_lines(uint4 (&lines)[LINES], const u8 *codes) {
#pragma unroll
    for (int j = 0; j < LINES; ++j) lines[j] = load_stream(codes + LINE * j);
}

// The formats whose blocks have a scale each. The table has the whole number of each row and block,
// and what it is to be multiplied with.
template <class Format>
struct BlockProducts {
    typedef Format Weights;
    static constexpr int FLOATS = 2;
    static constexpr int BLOCKS = Format::BLOCKS;
    static constexpr int TOGETHER = Format::LINES == 4 ? 2 : 1;  // 128 bytes on their way

    typedef typename Format::Lookup Lookup;
    __device__ static inline Lookup lookup() { return Format::lookup(); }

    struct Task {
        uint4 lines[Format::LINES];
        typename Format::Scales scales;

        __device__ inline void load(const u8 *group, int block, int quad) {
            load_lines(lines, lines_of<Format>(group, block) + 16 * quad);
            scales = Format::load_scales(superblock_of<Format>(group, block), block % BLOCKS, quad);
        }

        template <int ROWS>
        __device__ inline void store(
            const Table<ROWS, FLOATS> &table, int slot, int block, int quad, const Rounded &x, int first,
            const Lookup &lookup
        ) const {
            int column_block = first + block;
            typename Format::Sum sums[4];
            add_lines(sums, x.q + BLOCK * column_block, lookup);
            int total = 0;
            if (Format::WANTS_TOTAL) {
                uint2 halves = load_input_u64(x.b + 4 * column_block + 2);
                total = (int)(halves.x + halves.y);
            }
            float factors[4], d = load_input(x.d + column_block);
            Format::decode_scales(scales, factors);
            float4 *places = (float4 *)(table.at(slot, block) + 4 * FLOATS * quad);
#pragma unroll
            for (int row = 0; row < 4; row += 2)
                places[row / 2] = make_float4(
                    (float)sums[row].value(total), __fmul_rn(factors[row], d),
                    (float)sums[row + 1].value(total), __fmul_rn(factors[row + 1], d));
        }

        __device__ inline void add_lines(typename Format::Sum (&sums)[4], const i8 *q, const Lookup &lookup) const {
            BlockColumns columns(q);
#pragma unroll
            for (int j = 0; j < Format::LINES; ++j) {
                u32 *own = columns.words + Format::CODE_WORDS * j;
                Format::arrange(own);
                sums[0].add(lookup, lines[j].x, own);
                sums[1].add(lookup, lines[j].y, own);
                sums[2].add(lookup, lines[j].z, own);
                sums[3].add(lookup, lines[j].w, own);
            }
        }
    };

    template <int ROWS>
    __device__ static inline float chain(
        float sum, const Table<ROWS, FLOATS> &table, int slot, int row, int blocks, const Rounded &, int
    ) {
        const float2 *own = (const float2 *)table.at(slot, 0) + row;
#pragma unroll 16
        for (int i = 0; i < blocks; ++i) sum = __fmaf_rn(own[i * ROWS].x, own[i * ROWS].y, sum);
        return sum;
    }

    __device__ static inline float finish(float sum) { return __fmul_rn(sum, Format::FACTOR); }
};
