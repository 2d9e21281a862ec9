// How compressed rows are stored: the forms of localv4/kernels/row_forms.py, written by all threads
// of a block and read sixteen channels at a time as pairs of bfloat16.

#pragma once

#include "common.cuh"

constexpr int MOST_CHANNELS = 512;

// --- bfloat16 ---

// Rounded to the nearest even; NaN stays one.
__device__ inline u32 bf16_bits(float x) {
    u32 bits = __float_as_uint(x);
    return x == x ? (bits + 0x7fff + (bits >> 16 & 1)) >> 16 : 0x7fc0;
}

__device__ inline float low_float(u32 pair) { return __uint_as_float(pair << 16); }
__device__ inline float high_float(u32 pair) { return __uint_as_float(pair & 0xffff0000u); }

// Two floats as a pair, the first in the low half.
__device__ inline u32 bf16_pair(float first, float second) {
#if !defined(LOCALV4_HOST) && __CUDA_ARCH__ >= 800
    u32 pair;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(second), "f"(first));
    return pair;
#else
    return bf16_bits(first) | bf16_bits(second) << 16;
#endif
}

// Two floats as the sum of two pairs, within 2^-16 of their size.
struct Split {
    u32 high, low;
};

__device__ inline Split split_pair(float first, float second) {
    u32 high = bf16_pair(first, second);
    return {high, bf16_pair(first - low_float(high), second - high_float(high))};
}

// --- scales and codes ---

// The bits of the largest absolute value that the lanes of a warp have; NaN is on top.
__device__ inline int largest_bits(int bits) {
    for (int distance = 16; distance > 0; distance /= 2)
        bits = max(bits, __shfl_xor_sync(0xffffffffu, bits, distance));
    return bits;
}

// 2^(exponent - 127) for 0 < exponent < 255; infinity for 255.
__device__ inline float power(int exponent) { return __int_as_float((int)((u32)exponent << 23)); }

// The code of a small float with `mantissa` bits and an exponent, `sign` bits below its sign.
__device__ inline u32 small_code(float value, int mantissa, int bias, int sign) {
    u32 bits = __float_as_uint(value), size = bits & 0x7fffffff;
    int dropped = 23 - mantissa;
    u32 rounded = (size + ((1u << (dropped - 1)) - 1) + (size >> dropped & 1)) >> dropped;
    u32 code = rounded - ((127 - bias) << mantissa);
    // below the smallest normal number codes are whole multiples of the smallest one
    float steps = __uint_as_float(size) * power(127 + bias - 1 + mantissa);
    if (steps < (float)(1 << mantissa)) code = (u32)(int)rintf(steps);
    return (code & ((1u << sign) - 1)) | bits >> 31 << sign;
}

// --- the forms ---

// A form has `stride`, the bytes of a row; `write`, by which all threads of a block write a row of n
// floats of shared memory, which are lost; `read`, which returns sixteen channels of a row.

// Sixteen channels as eight pairs, each the sum of two where IS_EXACT is false.
struct Channels {
    u32 high[8], low[8];
};

struct F32Rows {
    static constexpr bool IS_EXACT = false;

    __device__ static i64 stride(int n, int rope) { return 4 * n; }

    __device__ static void write(u8 *out, float *row, int n, int rope) {
        for (int c = threadIdx.x; c < n; c += blockDim.x) ((float *)out)[c] = row[c];
    }

    __device__ static Channels read(const u8 *row, int channel, int n, int rope) {
        Channels result;
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            float4 x = *(const float4 *)(row + 4 * channel + 16 * i);
            Split first = split_pair(x.x, x.y), second = split_pair(x.z, x.w);
            result.high[2 * i] = first.high, result.low[2 * i] = first.low;
            result.high[2 * i + 1] = second.high, result.low[2 * i + 1] = second.low;
        }
        return result;
    }
};

// Sixteen bfloat16 on a line of four bytes or more.
__device__ inline Channels read_bf16(const u8 *at) {
    Channels result;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
        uint2 four = *(const uint2 *)(at + 8 * i);
        result.high[2 * i] = four.x, result.high[2 * i + 1] = four.y;
    }
#pragma unroll
    for (int i = 0; i < 8; ++i) result.low[i] = 0;
    return result;
}

struct Bf16Rows {
    static constexpr bool IS_EXACT = true;

    __device__ static i64 stride(int n, int rope) { return 2 * n; }

    __device__ static void write(u8 *out, float *row, int n, int rope) {
        for (int c = threadIdx.x; c < n; c += blockDim.x) ((u16 *)out)[c] = (u16)bf16_bits(row[c]);
    }

    __device__ static Channels read(const u8 *row, int channel, int n, int rope) {
        return read_bf16(row + 2 * channel);
    }
};

struct E4m3Rows {
    static constexpr bool IS_EXACT = true;
    static constexpr int GROUP = 64;

    __device__ static int coded(int n, int rope) { return (n - rope) / 16 * 16; }
    __device__ static int groups(int n, int rope) { return (coded(n, rope) + GROUP - 1) / GROUP; }

    __device__ static i64 stride(int n, int rope) {
        return 2 * n - coded(n, rope) + (groups(n, rope) + 7) / 8 * 8;
    }

    // A warp writes a group: two channels a lane.
    __device__ static void write(u8 *out, float *row, int n, int rope) {
        int lane = threadIdx.x % 32, warps = blockDim.x / 32, end = coded(n, rope);
        u8 *scales = out + 2 * n - end;
        int rounded_up = (groups(n, rope) + 7) / 8 * 8;
        for (int group = threadIdx.x / 32; group < rounded_up; group += warps) {
            int first = GROUP * group + lane, second = first + 32;
            float x = first < end ? row[first] : 0.0f, y = second < end ? row[second] : 0.0f;
            int bits = largest_bits(max(__float_as_int(x) & 0x7fffffff, __float_as_int(y) & 0x7fffffff));
            int scale = max((int)(((u32)bits + ((1 << 21) - 1)) >> 23), 8);
            float inverse = power(2 * 127 + 8 - scale);
            if (first < end) out[first] = (u8)small_code(x * inverse, 3, 7, 7);
            if (second < end) out[second] = (u8)small_code(y * inverse, 3, 7, 7);
            if (lane == 0) scales[group] = group < groups(n, rope) ? (u8)scale : (u8)0;
        }
        for (int c = end + threadIdx.x; c < n; c += blockDim.x) ((u16 *)(out + end))[c - end] = (u16)bf16_bits(row[c]);
    }

    __device__ static Channels read(const u8 *row, int channel, int n, int rope) {
        int end = coded(n, rope);
        if (channel >= end) return read_bf16(row + 2 * channel - end);
        Channels result;
        float scale = power(row[2 * n - end + channel / GROUP]);
        u32 words[4];
        *(uint2 *)words = *(const uint2 *)(row + channel), *(uint2 *)(words + 2) = *(const uint2 *)(row + channel + 8);
#pragma unroll
        for (int i = 0; i < 8; ++i) {
            u32 two = words[i / 2] >> 16 * (i % 2);
            // codes in the place of a half's exponent and fraction: their value times 2^-8, exactly
            u32 halves = (two & 0x7f) << 7 | (two & 0x80) << 8 | (two & 0x7f00) << 15 | (two & 0x8000) << 16;
            float first = half_bits_to_float(halves & 0xffff) * scale, second = half_bits_to_float(halves >> 16) * scale;
            result.high[i] = __float_as_uint(first) >> 16 | (__float_as_uint(second) & 0xffff0000u);
            result.low[i] = 0;
        }
        return result;
    }
};
