// One token times packed weights, the part that all formats share.
//
// A block of threads computes some rows of some matrices (`slots`: row groups, gate and up, or
// experts). What a thread reads is a task: a block of 32 columns of four rows, 16 bytes of a line at
// a time. Its whole numbers are exact in any order and go to shared memory; then one thread for each
// row adds them up in the order of the CPU (localv4/kernels/matvec.py), so that the bits are equal.
//
// `Products` is a format's part: Task (load, store), chain (the sum over the blocks of a row), finish
// (what happens to that sum), and prepare (what all threads of a block do first).

#pragma once

#include "activations.cuh"
#include "packed.cuh"

constexpr int TOKEN_THREADS = 256;
constexpr int TABLE_FLOATS = 4096;  // of each table in shared memory, gaps apart
constexpr int DOWN_ROWS = 8;        // rows of a block of threads that adds up experts
constexpr int ROW_GAP = 16;         // floats between two rows of hidden layers

#define TOKEN_KERNEL(name) extern "C" __global__ void __launch_bounds__(TOKEN_THREADS, 3) name(const Words op)

// Tables (slots, blocks, ROWS) in shared memory; a gap behind each slot keeps those that are read
// at the same time in different banks.
template <int ROWS>
struct Tables {
    float *start;
    int slots, blocks;

    __device__ inline int slot_floats() const { return blocks * ROWS + ROWS; }
    __device__ inline float *at(int table, int slot, int block) const {
        return start + (table * slots + slot) * slot_floats() + block * ROWS;
    }
};

// Blocks that fit into the tables for all slots: whole superblocks.
template <class Products, int ROWS>
__device__ inline int blocks_at_once(int slots, int blocks) {
    int most = TABLE_FLOATS / ROWS / slots / Products::BLOCKS * Products::BLOCKS;
    return min(blocks, max(most, Products::BLOCKS));
}

// The product of row threadIdx.x % ROWS of slot threadIdx.x / ROWS, in the threads that have one.
//
// `source.weights(slot)` is the group of rows of a slot (0: to be left out), `source.x(slot)` its
// activations; `first_quad` * 4 is the first row in a group.
template <class Products, int ROWS, class Source>
__device__ inline float row_products(const Source &source, int slots, int blocks, int first_quad) {
    DYNAMIC_SHARED(memory);
    Products::prepare();
    constexpr int QUADS = ROWS / 4, TOGETHER = Products::TOGETHER;
    int at_once = blocks_at_once<Products, ROWS>(slots, blocks);
    Tables<ROWS> tables = {(float *)memory, slots, at_once};
    int slot = threadIdx.x / ROWS, row = threadIdx.x % ROWS;
    bool has_row = slot < slots && source.weights(slot) != nullptr;
    float sum = 0.0f;
    for (int first = 0; first < blocks; first += at_once) {
        int count = min(at_once, blocks - first), tasks = slots * count * QUADS;
        for (int start = threadIdx.x; start < tasks; start += TOGETHER * TOKEN_THREADS) {
            typename Products::Task parts[TOGETHER];
#pragma unroll
            for (int i = 0; i < TOGETHER; ++i) {
                int task = start + i * TOKEN_THREADS, own = task / QUADS / count;
                int block = first + task / QUADS % count, quad = first_quad + task % QUADS;
                if (task < tasks && source.weights(own) != nullptr)
                    parts[i].load(source.weights(own), block, quad, source.x(own));
            }
#pragma unroll
            for (int i = 0; i < TOGETHER; ++i) {
                int task = start + i * TOKEN_THREADS, own = task / QUADS / count;
                int block = task / QUADS % count, quad = task % QUADS;
                if (task < tasks && source.weights(own) != nullptr)
                    parts[i].store(tables, own, block, quad, source.x(own), first + block);
            }
        }
        __syncthreads();
        if (has_row) sum = Products::chain(sum, tables, slot, row, count, source.x(slot), first);
        __syncthreads();
    }
    return sum;
}

// The formats whose blocks have a scale each.
template <class Format>
struct BlockProducts {
    typedef Format Weights;
    static constexpr int BLOCKS = Format::BLOCKS;
    static constexpr int TOGETHER = Format::LINES == 4 ? 2 : 1;  // 128 bytes on their way

    __device__ static inline void prepare() {}

    struct Task {
        uint4 lines[Format::LINES];
        typename Format::Scales scales;

        __device__ inline void load(const u8 *group, int block, int quad, const Rounded &) {
            const u8 *codes = lines_of<Format>(group, block) + 16 * quad;
#pragma unroll
            for (int j = 0; j < Format::LINES; ++j) lines[j] = load_stream(codes + LINE * j);
            scales = Format::load_scales(superblock_of<Format>(group, block), block % BLOCKS, quad);
        }

        template <int ROWS>
        __device__ inline void store(
            const Tables<ROWS> &tables, int slot, int block, int quad, const Rounded &x, int column_block
        ) const {
            typename Format::Sum sums[4];
            add_lines(sums, (const uint4 *)(x.q + BLOCK * column_block));
            int total = 0;
            if (Format::BIAS != 0) {
                int2 halves = *(const int2 *)(x.b + 4 * column_block + 2);
                total = halves.x + halves.y;
            }
            float factors[4], d = x.d[column_block];
            Format::decode_scales(scales, factors);
            *(float4 *)(tables.at(0, slot, block) + 4 * quad) = make_float4(
                (float)sums[0].value(total), (float)sums[1].value(total),
                (float)sums[2].value(total), (float)sums[3].value(total));
            *(float4 *)(tables.at(1, slot, block) + 4 * quad) = make_float4(
                __fmul_rn(factors[0], d), __fmul_rn(factors[1], d),
                __fmul_rn(factors[2], d), __fmul_rn(factors[3], d));
        }

        __device__ inline void add_lines(typename Format::Sum (&sums)[4], const uint4 *q) const {
            uint4 low = q[0], high = q[1];
            u32 columns[8] = {low.x, low.y, low.z, low.w, high.x, high.y, high.z, high.w};
#pragma unroll
            for (int j = 0; j < Format::LINES; ++j) {
                u32 *own = columns + Format::CODE_WORDS * j;
                Format::arrange(own);
                sums[0].add(lines[j].x, own);
                sums[1].add(lines[j].y, own);
                sums[2].add(lines[j].z, own);
                sums[3].add(lines[j].w, own);
            }
        }
    };

    template <int ROWS>
    __device__ static inline float chain(
        float sum, const Tables<ROWS> &tables, int slot, int row, int blocks, const Rounded &, int
    ) {
        const float *products = tables.at(0, slot, 0) + row, *factors = tables.at(1, slot, 0) + row;
#pragma unroll 16
        for (int i = 0; i < blocks; ++i) sum = __fmaf_rn(products[i * ROWS], factors[i * ROWS], sum);
        return sum;
    }

    __device__ static inline float finish(float sum) { return __fmul_rn(sum, Format::FACTOR); }
};
