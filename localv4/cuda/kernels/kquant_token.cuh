// One token times weights of the formats whose scales are small integers: the Products of
// single_token.cuh for packed_kquants.cuh.

#pragma once

#include "packed_kquants.cuh"
#include "single_token.cuh"

// Tables: 0 the whole numbers of a block (sum of scale * products), 1 those of least values; behind
// them what they are to be multiplied with, for each superblock.
template <class Format>
struct SuperblockProducts {
    struct Weights {
        static constexpr int BLOCKS = SUPERBLOCK_BLOCKS, SUPERBLOCK_BYTES = Format::SUPERBLOCK_BYTES;
    };
    static constexpr int BLOCKS = SUPERBLOCK_BLOCKS, LINES = Format::LINES, NUMBERS = Format::NUMBERS;
    static constexpr int PARTS = Format::PARTS;
    static constexpr int TOGETHER = LINES > 4 ? 1 : 2;
    static constexpr int TABLES = NUMBERS;

    __device__ static inline void prepare() { Format::prepare(); }

    template <int ROWS>
    __device__ static inline float *heads(const Tables<ROWS> &tables, int slot, int superblock, int number) {
        int superblocks = tables.blocks / BLOCKS;
        return tables.at(TABLES, 0, 0) + ((slot * superblocks + superblock) * NUMBERS + number) * ROWS;
    }

    struct Task {
        uint4 lines[LINES], head;
        typename Format::Stored stored;

        __device__ inline void load(const u8 *group, int block, int quad, const Rounded &) {
            const u8 *superblock = group + (i64)(block / BLOCKS) * Format::SUPERBLOCK_BYTES;
            const u8 *codes = superblock + Format::CODES_AT + block % BLOCKS * (LINE * LINES) + 16 * quad;
#pragma unroll
            for (int j = 0; j < LINES; ++j) lines[j] = load_stream(codes + LINE * j);
            stored.load(superblock, block % BLOCKS, quad);
            if (block % BLOCKS != 0) return;
            if (NUMBERS == 1) {
                head = load_stream(superblock + 16 * quad);
            } else {
                uint2 d = load_stream_u64(superblock + 8 * quad), m = load_stream_u64(superblock + 32 + 8 * quad);
                head = make_uint4(d.x, d.y, m.x, m.y);
            }
        }

        template <int ROWS>
        __device__ inline void store(
            const Tables<ROWS> &tables, int slot, int block, int quad, const Rounded &x, int column_block
        ) const {
            const uint4 *q = (const uint4 *)(x.q + BLOCK * column_block);
            uint4 low = q[0], high = q[1];
            u32 columns[8] = {low.x, low.y, low.z, low.w, high.x, high.y, high.z, high.w};
            int totals[PARTS] = {};
            if (Format::MIDDLE != 0 || NUMBERS == 2) {
                int2 halves = *(const int2 *)(x.b + 4 * column_block + 2);
                totals[0] = PARTS == 2 ? halves.x : halves.x + halves.y;
                totals[PARTS - 1] = PARTS == 2 ? halves.y : totals[0];
            }
            float whole[4], least[4];
#pragma unroll
            for (int row = 0; row < 4; ++row) multiply(row, column_block, columns, totals, whole[row], least[row]);
            *(float4 *)(tables.at(0, slot, block) + 4 * quad) = make_float4(whole[0], whole[1], whole[2], whole[3]);
            if (NUMBERS == 2)
                *(float4 *)(tables.at(1, slot, block) + 4 * quad) = make_float4(least[0], least[1], least[2], least[3]);
            if (column_block % BLOCKS == 0) store_head(tables, slot, block / BLOCKS, quad);
        }

        // The whole numbers of a row: they fit float32.
        __device__ inline void multiply(int row, int block, const u32 (&columns)[8], const int (&totals)[PARTS],
                                        float &whole, float &least) const {
            u32 words[LINES], codes[8];
#pragma unroll
            for (int j = 0; j < LINES; ++j)
                words[j] = row == 0 ? lines[j].x : row == 1 ? lines[j].y : row == 2 ? lines[j].z : lines[j].w;
            Format::decode(words, codes);
            int scales[PARTS], leasts[PARTS], sum = 0, least_sum = 0;
            Format::factors(stored, words, block, row, scales, leasts);
#pragma unroll
            for (int part = 0; part < PARTS; ++part) {
                int dot = -Format::MIDDLE * totals[part];
#pragma unroll
                for (int j = part * 8 / PARTS; j < (part + 1) * 8 / PARTS; ++j) dot = dot4(codes[j], columns[j], dot);
                sum += dot * scales[part];
                if (NUMBERS == 2) least_sum += leasts[part] * totals[part];
            }
            whole = (float)sum, least = (float)least_sum;
        }

        template <int ROWS>
        __device__ inline void store_head(const Tables<ROWS> &tables, int slot, int superblock, int quad) const {
            u32 words[4] = {head.x, head.y, head.z, head.w};
            for (int row = 0; row < 4; ++row) {
                for (int number = 0; number < NUMBERS; ++number) {
                    u32 half = words[2 * number + row / 2] >> (16 * (row % 2)) & 0xffff;
                    float value = NUMBERS == 1 ? __int_as_float((int)words[row]) : half_bits_to_float(half);
                    heads(tables, slot, superblock, number)[4 * quad + row] = number == 0 ? value : -value;
                }
            }
        }
    };

    template <int ROWS>
    __device__ static inline float chain(
        float sum, const Tables<ROWS> &tables, int slot, int row, int blocks, const Rounded &x, int first
    ) {
        const float *d = x.d + first;
#pragma unroll 2
        for (int superblock = 0; superblock < blocks / BLOCKS; ++superblock) {
            float parts[NUMBERS] = {};
#pragma unroll
            for (int i = 0; i < BLOCKS; ++i) {
                int block = superblock * BLOCKS + i;
                for (int number = 0; number < NUMBERS; ++number)
                    parts[number] = __fmaf_rn(tables.at(number, slot, block)[row], d[block], parts[number]);
            }
            for (int number = 0; number < NUMBERS; ++number)
                sum = __fmaf_rn(parts[number], heads(tables, slot, superblock, number)[row], sum);
        }
        return sum;
    }

    __device__ static inline float finish(float sum) { return sum; }
};
