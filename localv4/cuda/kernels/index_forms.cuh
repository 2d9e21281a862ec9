// The rows of the indexer in FP4, mixed: the form E2M1 of localv4/kernels/row_forms.py.

#pragma once

#include "row_forms.cuh"

constexpr int E2M1_UNIT = 14;
constexpr int SPREAD = 3;  // powers of two between the scales of a row at most

// Multiply n floats of shared memory with a Hadamard matrix, in blocks of the largest power of two
// that n is a multiple of; all threads of a block.
__device__ inline void mix_row(float *row, int n) {
    int block = n & -n;
    for (int distance = 1; distance < block; distance *= 2) {
        for (int i = threadIdx.x; i < n / 2; i += blockDim.x) {
            int at = i / distance * 2 * distance + i % distance;
            float low = row[at], high = row[at + distance];
            row[at] = low + high, row[at + distance] = low - high;
        }
        __syncthreads();
    }
    float factor = __fdiv_rn(1.0f, __fsqrt_rn((float)block));
    for (int i = threadIdx.x; i < n; i += blockDim.x) row[i] *= factor;
    __syncthreads();
}

struct E2m1Rows {
    static constexpr int GROUP = 32;

    __device__ static i64 stride(int n, int rope) { return n / 2 + n / GROUP; }

    // The smallest scale with which codes of absolute values fit: `bits` are those of the largest.
    __device__ static int scale_of(int bits) {
        return min((int)(((u32)bits + ((1 << 22) - 1)) >> 23) - 2 + E2M1_UNIT, 255);
    }

    // A warp writes a group: a channel a lane.
    __device__ static void write(u8 *out, float *row, int n, int rope) {
        mix_row(row, n);
        int lane = threadIdx.x % 32, largest = 0;
        for (int c = lane; c < n; c += 32) largest = max(largest, __float_as_int(row[c]) & 0x7fffffff);
        int least = max(scale_of(largest_bits(largest)) - SPREAD, E2M1_UNIT);
        for (int group = threadIdx.x / 32; group < n / GROUP; group += blockDim.x / 32) {
            float x = row[GROUP * group + lane];
            int scale = max(scale_of(largest_bits(__float_as_int(x) & 0x7fffffff)), least);
            u32 code = small_code(x * power(2 * 127 + E2M1_UNIT - scale), 1, 1, 3);
            u32 high = __shfl_xor_sync(0xffffffffu, code, 16);
            if (lane < 16) out[16 * group + lane] = (u8)(code | high << 4);
            if (lane == 0) out[n / 2 + group] = (u8)scale;
        }
    }
};
