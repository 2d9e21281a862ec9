// Decoding of the packed integer formats of localv4/kernels/packed.py, which has the layouts.
//
// Sixteen rows are interleaved: word `lane` of a line of 64 bytes belongs to row `lane`. A word has
// eight codes of four bits (line j of a block: columns 8 * j ... 8 * j + 7) or four bytes (line j:
// columns 4 * j ... 4 * j + 3). So four lines of sixteen bytes of a lane are four rows of a block.
//
// A format decodes a word into one or two words of four signed bytes, `value + BIAS`, in an order of
// its own: `arrange` puts as many words of activations into the same order. With them
// sum(byte * activation) - BIAS * sum(activation) is the sum of the products, which FACTOR * scale
// turns into that of weights. `Sum` adds up the products of one row of a block with less work: a word
// at a time with the arranged activations of its columns, and `value` takes the sum of all of them.

#pragma once

#include "common.cuh"

constexpr int GROUP_ROWS = 16;   // rows that are interleaved
constexpr int BLOCK = 32;        // columns with one scale
constexpr int LINE = 64;         // bytes; the first line of a superblock has the scales

__device__ const u32 MX4_LOW = 0x03020100u;

struct Mx4 {
    static constexpr int BLOCKS = 4;               // of a superblock
    static constexpr int SUPERBLOCK_BYTES = 1088;
    static constexpr int BLOCK_BYTES = 256;
    static constexpr int LINES = 4;                // of a block
    static constexpr int CODE_WORDS = 2;           // that a word is decoded into
    static constexpr int BIAS = -64;
    static constexpr float FACTOR = 0.5f;

    // Twice the magnitudes of E2M1, 0 1 2 3 (MX4_LOW) and 4 6 8 12. permute_bytes looks up the lower three
    // bits of four nibbles; where the upper bit of a nibble, the sign of a code, is set, it gives
    // the sign of the byte instead: 0 here.
    static constexpr u32 HIGH = 0x0c080604u;

    // What `Sum` needs: LOW from memory, lest the compiler keeps it in a register of the whole warp
    // and copies that for each lookup.
    struct Lookup {
        u32 low;
    };
    __device__ static inline Lookup lookup() { return {load_stream_u32(&MX4_LOW)}; }

    // Columns 0 4 1 5 and 2 6 3 7: the nibbles of a word as they lie.
    __device__ static inline void arrange(u32 *columns) {
        u32 low = permute_bytes(columns[0], columns[1], 0x5140);
        columns[1] = permute_bytes(columns[0], columns[1], 0x7362);
        columns[0] = low;
    }

    // value - 64 of both signs is below 0, so that the lookup for the other sign gives 0xff.
    __device__ static inline void decode(u32 word, u32 (&codes)[2]) {
        u32 other = word ^ 0x88888888u;
        codes[0] = permute_bytes(0xc3c2c1c0u, 0xccc8c6c4u, word)
                   & permute_bytes(0xbdbebfc0u, 0xb4b8babcu, other);
        codes[1] = permute_bytes(0xc3c2c1c0u, 0xccc8c6c4u, word >> 16)
                   & permute_bytes(0xbdbebfc0u, 0xb4b8babcu, other >> 16);
    }

    // The magnitudes of both signs apart: products have a pipe of their own, lookups need the other.
    struct Sum {
        int plus = 0, minus = 0;

        __device__ inline void add(const Lookup &table, u32 word, const u32 *columns) {
            u32 other = word ^ 0x88888888u, low = table.low;
            plus = dot4(permute_bytes(low, HIGH, word), columns[0], plus);
            minus = dot4(permute_bytes(low, HIGH, other), columns[0], minus);
            plus = dot4(permute_bytes(low, HIGH, word >> 16), columns[1], plus);
            minus = dot4(permute_bytes(low, HIGH, other >> 16), columns[1], minus);
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
struct HalfScales {
    struct Lookup {};
    __device__ static inline Lookup lookup() { return {}; }

    typedef uint2 Scales;
    __device__ static inline Scales load_scales(const u8 *superblock, int block, int quad) {
        return load_stream_u64(superblock + 32 * block + 8 * quad);
    }
    __device__ static inline void decode_scales(Scales stored, float (&scales)[4]) {
        scales[0] = half_bits_to_float(stored.x & 0xffff), scales[1] = half_bits_to_float(stored.x >> 16);
        scales[2] = half_bits_to_float(stored.y & 0xffff), scales[3] = half_bits_to_float(stored.y >> 16);
    }
};

struct Q4 : HalfScales {
    static constexpr int BLOCKS = 2;
    static constexpr int SUPERBLOCK_BYTES = 576;
    static constexpr int BLOCK_BYTES = 256;
    static constexpr int LINES = 4;
    static constexpr int CODE_WORDS = 2;
    static constexpr int BIAS = 8;
    static constexpr float FACTOR = 1.0f;

    __device__ static inline void arrange(u32 *) {}

    __device__ static inline void decode(u32 word, u32 (&codes)[2]) {
        codes[0] = word & 0x0f0f0f0fu;
        codes[1] = word >> 4 & 0x0f0f0f0fu;
    }

    struct Sum {
        int sum = 0;

        __device__ inline void add(const Lookup &, u32 word, const u32 *columns) {
            u32 codes[2];
            decode(word, codes);
            sum = dot4(codes[1], columns[1], dot4(codes[0], columns[0], sum));
        }

        __device__ inline int value(int total) const { return sum - BIAS * total; }
    };
};

struct Q8 : HalfScales {
    static constexpr int BLOCKS = 2;
    static constexpr int SUPERBLOCK_BYTES = 1088;
    static constexpr int BLOCK_BYTES = 512;
    static constexpr int LINES = 8;
    static constexpr int CODE_WORDS = 1;
    static constexpr int BIAS = 0;
    static constexpr float FACTOR = 1.0f;

    __device__ static inline void arrange(u32 *) {}

    __device__ static inline void decode(u32 word, u32 (&codes)[1]) { codes[0] = word; }

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
