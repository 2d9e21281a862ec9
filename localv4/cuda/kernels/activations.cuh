// Activations rounded to int8, and SwiGLU: the same bits as localv4/kernels/activations.py, which
// has the layout of the buffers q, d and b.

#pragma once

#include "common.cuh"

// What the products of the CPU, which may go on with the buffers, add to weights (kernels/isa.py):
// `cuda.compiler.definitions` has the numbers of the machine.
#ifndef CODE_BIAS
#define CODE_BIAS 12
#define BYTE_BIAS 128
#endif

__device__ inline i64 q_row(i64 cols) { return cols + 64; }
__device__ inline i64 d_row(i64 cols) { return cols / 32; }
__device__ inline i64 b_row(i64 cols) { return cols / 8; }

// Buffers of rounded rows: q, float scales, sums. `binary`: scales are powers of two.
struct Rounded {
    i8 *q;
    float *d;
    int *b;
    bool binary = false;

    // Those of a row of so many columns.
    __device__ inline Rounded row(i64 number, i64 cols) const {
        return {q + number * q_row(cols), d + number * d_row(cols), b + number * b_row(cols), binary};
    }
};

// The nearest int, ties to even; beyond +-2^30 that number, and 2^30 for NaN.
__device__ inline int round_to_int(float x) {
    float rounded = rintf(x);
    rounded = rounded < 1073741824.0f ? rounded : 1073741824.0f;
    rounded = rounded > -1073741824.0f ? rounded : -1073741824.0f;
    return (int)rounded;
}

// The sum over lanes that differ in `distance` and in lower bits.
__device__ inline u32 warp_add(u32 value, int distance) {
    for (; distance > 0; distance /= 2) value += __shfl_xor_sync(0xffffffffu, value, distance);
    return value;
}

// The size of a block, or what counts as it; NaN stays NaN.
__device__ inline float at_least_smallest(float size) { return size < 1e-30f ? 1e-30f : size; }

// The scale of a block, and what its values are multiplied by.
struct BlockScale {
    float scale, inverse;

    __device__ inline BlockScale(float size, bool binary) {
        scale = __fmul_rn(size, 1.0f / 127.0f);
        inverse = __fdiv_rn(127.0f, size);
        if (!binary) return;
        // the least power of two that is not less; infinity and NaN stay
        if (scale < __int_as_float(0x7f800000)) scale = __int_as_float((__float_as_int(scale) + 0x7fffff) & (int)0xff800000);
        inverse = __fdiv_rn(1.0f, scale);
    }
};

__device__ inline void write_scale_and_sums(const Rounded &row, i64 block, float scale, u32 low, u32 high) {
    u32 total = low + high;
    row.d[block] = scale;
    *(int4 *)(row.b + 4 * block) =
        make_int4((int)(total * (u32)-CODE_BIAS), (int)(total * (u32)-BYTE_BIAS), (int)low, (int)high);
}

// Round a block by 32 / COUNT lanes side by side, each with COUNT neighbouring values of it.
template <int COUNT>
__device__ inline void round_values(const Rounded &row, i64 block, const float (&values)[COUNT]) {
    constexpr int LANES = 32 / COUNT;
    int lane = threadIdx.x % LANES, largest = 0;
    // the bits of absolute values have the order of the floats, NaN on top
#pragma unroll
    for (int i = 0; i < COUNT; ++i) largest = max(largest, __float_as_int(values[i]) & 0x7fffffff);
    for (int distance = LANES / 2; distance > 0; distance /= 2)
        largest = max(largest, __shfl_xor_sync(0xffffffffu, largest, distance));
    BlockScale own(at_least_smallest(__int_as_float(largest)), row.binary);
    u32 bytes = 0, sum = 0;
#pragma unroll
    for (int i = 0; i < COUNT; ++i) {
        u32 code = (u32)round_to_int(__fmul_rn(values[i], own.inverse));
        bytes |= (code & 255) << (8 * i);
        sum += code;
    }
    i8 *place = row.q + 32 * block + COUNT * lane;
    if (COUNT == 4) *(u32 *)place = bytes;
    if (COUNT == 2) *(u16 *)place = (u16)bytes;
    if (COUNT == 1) *place = (i8)bytes;
    u32 half = warp_add(sum, LANES / 4), other = __shfl_xor_sync(0xffffffffu, half, LANES / 2);
    if (lane == 0) write_scale_and_sums(row, block, own.scale, half, other);
}

__device__ inline void round_part(const Rounded &row, i64 block, const float4 &x) {
    round_values(row, block, {x.x, x.y, x.z, x.w});
}

// --- norms ---

__device__ inline float inverse_size(float squares, i64 count, float eps) {
    return __fdiv_rn(1.0f, __fsqrt_rn(__fdiv_rn(squares, (float)count) + eps));
}

// Return the sum over all threads of a block, in all of them; `parts` has room for one of each warp.
__device__ inline float block_sum(float value, float *parts) {
    value = warp_sum(value);
    if (threadIdx.x % 32 == 0) parts[threadIdx.x / 32] = value;
    __syncthreads();
    return warp_sum(threadIdx.x % 32 < blockDim.x / 32 ? parts[threadIdx.x % 32] : 0.0f);
}

// e^x within 2 ulp for -87 ... 88, beyond which x is taken as the bound; NaN stays NaN.
__device__ inline float exp_as_cpu(float x) {
    x = 88.0f < x ? 88.0f : x;
    x = -87.0f > x ? -87.0f : x;
    int n = round_to_int(__fmul_rn(x, 1.44269504f));
    float whole = -(float)n;
    float r = __fmaf_rn(whole, 0.693359375f, x);
    r = __fmaf_rn(whole, -2.12194440e-4f, r);
    float p = __fmaf_rn(1.9875691500e-4f, r, 1.3981999507e-3f);
    p = __fmaf_rn(p, r, 8.3334519073e-3f);
    p = __fmaf_rn(p, r, 4.1665795894e-2f);
    p = __fmaf_rn(p, r, 1.6666665459e-1f);
    p = __fmaf_rn(p, r, 0.5f);
    p = __fmaf_rn(p, __fmul_rn(r, r), r);
    float power = __int_as_float((int)((u32)(n + 127) << 23));
    return __fmaf_rn(p, power, power);
}

// silu(min(gate, limit)) * clip(up, -limit, limit)
__device__ inline float swiglu_as_cpu(float gate, float up, float limit) {
    gate = limit < gate ? limit : gate;
    up = limit < up ? limit : up;
    up = -limit > up ? -limit : up;
    return __fmul_rn(__fdiv_rn(gate, __fadd_rn(exp_as_cpu(-gate), 1.0f)), up);
}
