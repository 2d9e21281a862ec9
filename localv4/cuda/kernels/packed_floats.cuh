// Decoding of the packed formats of floats: F8 of localv4/kernels/packed.py, B16 and F32R of
// localv4/kernels/packing_floats.py. A column of sixteen rows has 16, 32 or 64 bytes.

#pragma once

#include "common.cuh"

// Each format decodes 16 bytes, ROWS rows of a column; UNIT is what they are to be multiplied with.
struct F8 {
    static constexpr int ROWS = 16;
    static constexpr bool SCALED = true;  // a float32 for 128 x 128 values
    static constexpr float UNIT = 256.0f;

    // A code shifted to its place in a half is its value times 2^-8, exactly.
    __device__ static inline void decode_word(u32 word, float *values) {
        float2 low = halves_to_floats(permute_bytes(word, 0, 0x9180) << 7 & 0xbf80bf80u);
        float2 high = halves_to_floats(permute_bytes(word, 0, 0xb3a2) << 7 & 0xbf80bf80u);
        values[0] = low.x, values[1] = low.y, values[2] = high.x, values[3] = high.y;
    }

    __device__ static inline void decode(const uint4 &stored, float (&values)[ROWS]) {
        decode_word(stored.x, values);
        decode_word(stored.y, values + 4);
        decode_word(stored.z, values + 8);
        decode_word(stored.w, values + 12);
    }
};

struct B16 {
    static constexpr int ROWS = 8;
    static constexpr bool SCALED = false;
    static constexpr float UNIT = 1.0f;

    __device__ static inline void decode(const uint4 &stored, float (&values)[ROWS]) {
        u32 words[4] = {stored.x, stored.y, stored.z, stored.w};
        for (int i = 0; i < 4; ++i) {
            values[2 * i] = __int_as_float((int)(words[i] << 16));
            values[2 * i + 1] = __int_as_float((int)(words[i] & 0xffff0000u));
        }
    }
};

struct F32R {
    static constexpr int ROWS = 4;
    static constexpr bool SCALED = false;
    static constexpr float UNIT = 1.0f;

    __device__ static inline void decode(const uint4 &stored, float (&values)[ROWS]) {
        values[0] = __int_as_float((int)stored.x), values[1] = __int_as_float((int)stored.y);
        values[2] = __int_as_float((int)stored.z), values[3] = __int_as_float((int)stored.w);
    }
};

constexpr int F8_SPAN = 128;  // columns, and rows, with one scale
