// The formats of packed.cuh as gemm.cuh has them.

#pragma once

#include "gemm.cuh"

template <class Source>
struct BlockFormat {
    static constexpr int COLUMNS = BLOCK * Source::BLOCKS, BYTES = Source::SUPERBLOCK_BYTES;
    static constexpr bool WANTS_SUMS = false;
    typedef PlainSums Sums;

    __device__ static void prepare() {}
    __device__ static int place(int offset) { return offset; }
    __device__ static void finish(Sums &, const u8 *, Place) {}

    // What a thread has of the line `line` of a block: a word of each of its two rows.
    __device__ static uint2 words(const u8 *w, int block, int line, Place own) {
        return *(const uint2 *)(w + LINE + Source::BLOCK_BYTES * block + LINE * line + 8 * own.group);
    }
};

// Four signed bytes for the low and for the high halves of the bytes of a word of E2M1 codes: twice
// their values. A look-up by bytes gives 0 where bit 3 of its index is set: so those of the
// positive codes and of the negative ones come apart, and are subtracted without a borrow.
__device__ inline void e2m1_bytes(u32 codes, u32 &low, u32 &high) {
    constexpr u32 TOP = 0x80808080;
    u32 turned = codes ^ 0x88888888;
    u32 first = (permute_bytes(E2M1_LOW, E2M1_HIGH, codes) + TOP - permute_bytes(E2M1_LOW, E2M1_HIGH, turned)) ^ TOP;
    u32 last = (permute_bytes(E2M1_LOW, E2M1_HIGH, codes >> 16) + TOP
                - permute_bytes(E2M1_LOW, E2M1_HIGH, turned >> 16)) ^ TOP;
    low = permute_bytes(first, last, 0x6420);
    high = permute_bytes(first, last, 0x7531);
}

struct Mx4Tiles : BlockFormat<Mx4> {
    static constexpr float FACTOR = Mx4::FACTOR;

    // `base` is -MAGIC_FLOAT * scale: the scale, a power of two, and MAGIC go in one step.
    struct Rows {
        u32 a[4];
        float scale[2], base[2];
    };

    __device__ static Rows load(const u8 *w, int block, Place own) {
        Rows rows;
        uint2 codes = words(w, block, own.member, own);
        e2m1_bytes(codes.x, rows.a[0], rows.a[2]);
        e2m1_bytes(codes.y, rows.a[1], rows.a[3]);
        u32 scales = *(const u16 *)(w + GROUP_ROWS * block + 2 * own.group);
#pragma unroll
        for (int i = 0; i < 2; ++i) {
            rows.scale[i] = e8m0_to_float(scales >> (8 * i) & 255);
            rows.base[i] = -MAGIC_FLOAT * rows.scale[i];
        }
        return rows;
    }

    // The CPU multiplies the scales of a block first: the same number, as one is a power of two
    // (while the product is no subnormal number).
    __device__ static void add(Sums &sums, const Rows &rows, const u32 (&b)[2], const Columns &at) {
        const int start[4] = {MAGIC, MAGIC, MAGIC, MAGIC};
        int dots[4];
        mma_s8(dots, rows.a, b, start);
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            float scaled = __fmaf_rn(__int_as_float(dots[i]), rows.scale[i / 2], rows.base[i / 2]);
            sums.total[i] = __fmaf_rn(scaled, at.d[i % 2], sums.total[i]);
        }
    }
};

// Where sums of blocks with an f16 scale start. Hopper converts integers four times as fast as others,
// and instructions that start at zero read four registers less.
#if !defined(LOCALV4_HOST) && __CUDA_ARCH__ == 900
constexpr int START = 0;
#else
constexpr int START = MAGIC;
#endif

// Blocks with an f16 scale. `Own` gives the fragments of a block.
template <class Own, class Source>
struct HalfScaledTiles : BlockFormat<Source> {
    struct Rows {
        u32 a[4];
        float scale[2];
    };

    __device__ static Rows load(const u8 *w, int block, Place own) {
        Rows rows;
        Own::load_codes(rows.a, w, block, own);
        float2 scales = halves_to_floats(*(const u32 *)(w + 2 * GROUP_ROWS * block + 4 * own.group));
        rows.scale[0] = scales.x, rows.scale[1] = scales.y;
        return rows;
    }

    __device__ static void add(PlainSums &sums, const Rows &rows, const u32 (&b)[2], const Columns &at) {
        const int start[4] = {START, START, START, START};
        int dots[4];
        mma_s8(dots, rows.a, b, start);
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            float dot = START == 0 ? (float)dots[i] : __int_as_float(dots[i]) - MAGIC_FLOAT;
            sums.total[i] = __fmaf_rn(dot, rows.scale[i / 2] * at.d[i % 2], sums.total[i]);
        }
    }
};

struct Q4Tiles : HalfScaledTiles<Q4Tiles, Q4> {
    static constexpr float FACTOR = 0.0625f;  // a code in the upper half of a byte is 16 times as much

    __device__ static void load_codes(u32 (&a)[4], const u8 *w, int block, Place own) {
        constexpr u32 UPPER = 0xF0F0F0F0, TOP = 0x80808080;
        uint2 codes = words(w, block, own.member, own);
        a[0] = (codes.x << 4 & UPPER) ^ TOP;
        a[1] = (codes.y << 4 & UPPER) ^ TOP;
        a[2] = (codes.x & UPPER) ^ TOP;
        a[3] = (codes.y & UPPER) ^ TOP;
    }
};

struct Q8Tiles : HalfScaledTiles<Q8Tiles, Q8> {
    static constexpr float FACTOR = Q8::FACTOR;

    // In shared memory the even lines of a block come first: what the threads of a warp read
    // together is then in different banks.
    __device__ static int place(int offset) {
        int line = offset / LINE - 1;
        return line < 0 ? offset : LINE * (1 + line / 8 * 8 + line % 2 * 4 + line % 8 / 2) + offset % LINE;
    }

    __device__ static void load_codes(u32 (&a)[4], const u8 *w, int block, Place own) {
        uint2 low = words(w, block, own.member, own), high = words(w, block, 4 + own.member, own);
        a[0] = low.x, a[1] = low.y, a[2] = high.x, a[3] = high.y;
    }
};
