// One token times weights of the formats whose scales are small integers: the Products of
// single_token.cuh for packed_kquants.cuh.

#pragma once

#include "packed_kquants.cuh"
#include "single_token.cuh"

// The table has the whole numbers of each row and block: the sum of scale * product, and that of least
// values. Behind it is what they are to be multiplied with, for each superblock and row.
template <class Format>
struct SuperblockProducts {
    struct Weights {
        static constexpr int BLOCKS = SUPERBLOCK_BLOCKS, SUPERBLOCK_BYTES = Format::SUPERBLOCK_BYTES;
    };
    static constexpr int BLOCKS = SUPERBLOCK_BLOCKS, LINES = Format::LINES, NUMBERS = Format::NUMBERS;
    static constexpr int PARTS = Format::PARTS;
    static constexpr int TOGETHER = LINES > 4 ? 1 : 2;
    static constexpr int FLOATS = NUMBERS;

    typedef typename Format::Lookup Lookup;
    __device__ static inline Lookup lookup() { return Format::lookup(); }

    template <int ROWS>
    __device__ static inline float *heads(const Table<ROWS, FLOATS> &table, int slot, int superblock) {
        int number = slot * (table.blocks / BLOCKS) + superblock;
        return table.at(table.slots, 0) + number * (ROWS * FLOATS);
    }

    struct Task {
        uint4 lines[LINES], head;
        typename Format::Stored stored;

        __device__ inline void load(const u8 *group, int block, int quad) {
            const u8 *superblock = group + (u32)block / BLOCKS * Format::SUPERBLOCK_BYTES;
            const u8 *codes = superblock + Format::CODES_AT + block % BLOCKS * (LINE * LINES) + 16 * quad;
            load_lines(lines, codes);
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
            const Table<ROWS, FLOATS> &table, int slot, int block, int quad, const Rounded &x, int first,
            const Lookup &lookup
        ) const {
            int column_block = first + block;
            BlockColumns columns(x.q + BLOCK * column_block);
            int totals[PARTS] = {};
            if (Format::MIDDLE != 0 || NUMBERS == 2) {
                uint2 stored = load_input_u64(x.b + 4 * column_block + 2);
                int2 halves = make_int2((int)stored.x, (int)stored.y);
                totals[0] = PARTS == 2 ? halves.x : halves.x + halves.y;
                totals[PARTS - 1] = PARTS == 2 ? halves.y : totals[0];
            }
            float *place = table.at(slot, block) + 4 * FLOATS * quad;
#pragma unroll
            for (int row = 0; row < 4; ++row) {
                int numbers[2] = {0, 0};
                multiply(row, column_block, columns.words, totals, lookup, numbers);
                for (int i = 0; i < NUMBERS; ++i) place[row * NUMBERS + i] = (float)numbers[i];
            }
            if (column_block % BLOCKS == 0) store_head(heads(table, slot, block / BLOCKS) + 4 * FLOATS * quad);
        }

        // The whole numbers of a row: they fit float32.
        __device__ inline void multiply(int row, int block, const u32 (&columns)[8], const int (&totals)[PARTS],
                                        const Lookup &lookup, int (&numbers)[2]) const {
            u32 words[LINES], codes[8];
#pragma unroll
            for (int j = 0; j < LINES; ++j)
                words[j] = row == 0 ? lines[j].x : row == 1 ? lines[j].y : row == 2 ? lines[j].z : lines[j].w;
            Format::decode(lookup, words, codes);
            int scales[PARTS], leasts[PARTS];
            Format::factors(stored, words, block, row, scales, leasts);
#pragma unroll
            for (int part = 0; part < PARTS; ++part) {
                int dot = -Format::MIDDLE * totals[part];
#pragma unroll
                for (int j = part * 8 / PARTS; j < (part + 1) * 8 / PARTS; ++j) dot = dot4(codes[j], columns[j], dot);
                numbers[0] += dot * scales[part];
                if (NUMBERS == 2) numbers[1] += leasts[part] * totals[part];
            }
        }

        __device__ inline void store_head(float *place) const {
            if (NUMBERS == 1) {
                *(uint4 *)place = head;
                return;
            }
            float2 d[2] = {halves_to_floats(head.x), halves_to_floats(head.y)};
            float2 m[2] = {halves_to_floats(head.z), halves_to_floats(head.w)};
            ((float4 *)place)[0] = make_float4(d[0].x, -m[0].x, d[0].y, -m[0].y);
            ((float4 *)place)[1] = make_float4(d[1].x, -m[1].x, d[1].y, -m[1].y);
        }
    };

    template <int ROWS>
    __device__ static inline float chain(
        float sum, const Table<ROWS, FLOATS> &table, int slot, int row, int blocks, const Rounded &x, int first
    ) {
        const float *d = x.d + first, *own = table.at(slot, 0) + row * NUMBERS;
        const float *head = heads(table, slot, 0) + row * NUMBERS;
#pragma unroll 2
        for (int superblock = 0; superblock < blocks / BLOCKS; ++superblock) {
            uint4 low = load_input_u128(d), high = load_input_u128(d + 4);
            u32 factors[BLOCKS] = {low.x, low.y, low.z, low.w, high.x, high.y, high.z, high.w};
            float parts[NUMBERS] = {};
#pragma unroll
            for (int i = 0; i < BLOCKS; ++i)
                for (int number = 0; number < NUMBERS; ++number)
                    parts[number] =
                        __fmaf_rn(own[i * ROWS * FLOATS + number], __int_as_float((int)factors[i]), parts[number]);
            for (int number = 0; number < NUMBERS; ++number) sum = __fmaf_rn(parts[number], head[number], sum);
            d += BLOCKS, own += BLOCKS * ROWS * FLOATS, head += ROWS * FLOATS;
        }
        return sum;
    }

    __device__ static inline float finish(float sum) { return sum; }
};
