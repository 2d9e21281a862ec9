// Decoding of the packed integer formats of localv4/kernels/packed.py, which has the layouts.
//
// Sixteen rows are interleaved: word `lane` of a line of 64 bytes belongs to row `lane`. A word has
// eight codes of four bits (line j of a block: columns 8 * j ... 8 * j + 7) or four bytes (line j:
// columns 4 * j ... 4 * j + 3). So four lines of sixteen bytes of a lane are four rows of a block.
//
// `Sum` adds up the products of one row of a block with its activations, a word at a time, as whole
// numbers: `arrange` brings the activations of a word into the order of its codes, and `value` takes
// the sum of all activations of the block, if the format WANTS_TOTAL. FACTOR is for the final result.

#pragma once

#include "common.cuh"

constexpr int GROUP_ROWS = 16;   // rows that are interleaved
constexpr int BLOCK = 32;        // columns with one scale
constexpr int LINE = 64;         // bytes; the first line of a superblock has the scales

// Superblocks of so many blocks, and these of so many lines.
template <int blocks, int lines>
struct Layout {
    static constexpr int BLOCKS = blocks, LINES = lines;
    static constexpr int BLOCK_BYTES = LINE * LINES, SUPERBLOCK_BYTES = LINE + BLOCKS * BLOCK_BYTES;
    static constexpr int CODE_WORDS = 8 / LINES;  // words of activations that belong to a word
};

// Twice the magnitudes of E2M1: 0, 1, 2, 3; then 4, 6, 8, 12.
constexpr u32 E2M1_LOW = 0x03020100u, E2M1_HIGH = 0x0c080604u;
__device__ const u32 E2M1_LOW_WORD = E2M1_LOW;

struct Mx4 : Layout<4, 4> {
    static constexpr bool WANTS_TOTAL = false;
    static constexpr float FACTOR = 0.5f;

    // What `Sum` needs: E2M1_LOW from memory, lest the compiler keeps it in a register of the whole
    // warp and copies that for each lookup.
    struct Lookup {
        u32 low;
    };
    __device__ static inline Lookup lookup() { return {load_stream_u32(&E2M1_LOW_WORD)}; }

    // Columns 0 4 1 5 and 2 6 3 7: the nibbles of a word as they lie.
    __device__ static inline void arrange(u32 *columns) {
        u32 low = permute_bytes(columns[0], columns[1], 0x5140);
        columns[1] = permute_bytes(columns[0], columns[1], 0x7362);
        columns[0] = low;
    }

    // Those of positive codes and of negative ones apart: permute_bytes looks up the lower three bits
    // of four nibbles, but where the upper bit, the sign of a code, is set, it gives the sign of a
    // byte of the table, which is 0. Lookups and products are done by different units.
    struct Sum {
        int plus = 0, minus = 0;

        __device__ inline void add(const Lookup &table, u32 word, const u32 *columns) {
            u32 other = word ^ 0x88888888u;
            plus = dot4(permute_bytes(table.low, E2M1_HIGH, word), columns[0], plus);
            minus = dot4(permute_bytes(table.low, E2M1_HIGH, other), columns[0], minus);
            plus = dot4(permute_bytes(table.low, E2M1_HIGH, word >> 16), columns[1], plus);
            minus = dot4(permute_bytes(table.low, E2M1_HIGH, other >> 16), columns[1], minus);
        }

        __device__ inline int value(int) const { return plus - minus; }
    };

    // The scales of rows 4 * quad ... 4 * quad + 3 of a block, as they are stored.
    typedef u32 Scales;
    __device__ static inline Scales load_scales(const u8 *superblock, int block, int quad) {
        return load_stream_u32(superblock + 16 * block + 4 * quad);
    }
    __device__ static inline void decode_scales(Scales stored, float (&scales)[4]) {
        for (int i = 0; i < 4; ++i) scales[i] = e8m0_to_float(stored >> (8 * i) & 255);
    }
};

// Q4 and Q8: scales are f16 numbers, and codes need no lookup.
template <int lines>
struct HalfScales : Layout<2, lines> {
    static constexpr float FACTOR = 1.0f;

    __device__ static inline void arrange(u32 *) {}

    struct Lookup {};
    __device__ static inline Lookup lookup() { return {}; }

    typedef uint2 Scales;
    __device__ static inline Scales load_scales(const u8 *superblock, int block, int quad) {
        return load_stream_u64(superblock + 32 * block + 8 * quad);
    }
    __device__ static inline void decode_scales(Scales stored, float (&scales)[4]) {
        float2 first = halves_to_floats(stored.x), second = halves_to_floats(stored.y);
        scales[0] = first.x, scales[1] = first.y, scales[2] = second.x, scales[3] = second.y;
    }
};

struct Q4 : HalfScales<4> {
    static constexpr bool WANTS_TOTAL = true;

    struct Sum {
        int sum = 0;

        __device__ inline void add(const Lookup &, u32 word, const u32 *columns) {
            sum = dot4(word & 0x0f0f0f0fu, columns[0], sum);
            sum = dot4(word >> 4 & 0x0f0f0f0fu, columns[1], sum);
        }

        __device__ inline int value(int total) const { return sum - 8 * total; }
    };
};

struct Q8 : HalfScales<8> {
    static constexpr bool WANTS_TOTAL = false;

    struct Sum {
        int sum = 0;

        __device__ inline void add(const Lookup &, u32 word, const u32 *columns) { sum = dot4(word, columns[0], sum); }

        __device__ inline int value(int) const { return sum; }
    };
};

// Bytes of a group of sixteen rows.
template <class Format>
__device__ inline i64 group_bytes(i64 cols) {
    return cols / (BLOCK * Format::BLOCKS) * Format::SUPERBLOCK_BYTES;
}

// Where the scales of a block of a group are, and its lines.
template <class Format>
__device__ inline const u8 *superblock_of(const u8 *group, int block) {
    return group + (u32)block / Format::BLOCKS * Format::SUPERBLOCK_BYTES;
}

template <class Format>
__device__ inline const u8 *lines_of(const u8 *group, int block) {
    return superblock_of<Format>(group, block) + LINE + (u32)block % Format::BLOCKS * Format::BLOCK_BYTES;
}
