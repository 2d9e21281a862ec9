// Rows of activations between the big products: twins of localv4/kernels/rows.py and of the rounding
// in localv4/kernels/single_token.py.

#include "activations.cuh"

// Words: x, its row stride in floats, tokens, columns.
KERNEL(clear) {
    float *x = op.address<float>(1);
    i64 stride = op.number(2), tokens = op.number(3), cols = op.number(4);
    for (i64 i = blockIdx.x * (i64)blockDim.x + threadIdx.x; i < tokens * cols; i += (i64)gridDim.x * blockDim.x)
        x[i / cols * stride + i % cols] = 0.0f;
}

// Words: x, its row stride in floats, rows (i64, or 0: all in order), count, columns, q, d, b.
// A warp rounds a block of 32 columns.
KERNEL(quantize) {
    const float *x = op.address<float>(1);
    const i64 *rows = op.address<i64>(3);
    i64 stride = op.number(2), count = op.number(4), cols = op.number(5), blocks = cols / 32;
    Rounded out = {op.address<i8>(6), op.address<float>(7), op.address<int>(8)};
    i64 warps = (i64)gridDim.x * (blockDim.x / 32);
    for (i64 i = (i64)blockIdx.x * (blockDim.x / 32) + threadIdx.x / 32; i < count * blocks; i += warps) {
        i64 row = i / blocks, block = i % blocks, source = rows == nullptr ? row : rows[row];
        round_block(out.row(row, cols), block, x[source * stride + 32 * block + threadIdx.x % 32]);
    }
}

// Words: gate, up, their row stride in floats, out, its row stride, limit as f32 bits, tokens, columns.
KERNEL(swiglu) {
    const float *gate = op.address<float>(1), *up = op.address<float>(2);
    float *out = op.address<float>(4), limit = op.real(6);
    i64 stride = op.number(3), out_stride = op.number(5), tokens = op.number(7), cols = op.number(8);
    for (i64 i = blockIdx.x * (i64)blockDim.x + threadIdx.x; i < tokens * cols; i += (i64)gridDim.x * blockDim.x) {
        i64 t = i / cols, c = i % cols, at = t * stride + c;
        out[t * out_stride + c] = swiglu_as_cpu(gate[at], up[at], limit);
    }
}

// Words: x, its row stride in floats, weight, eps as f32 bits, out (0: only rounded; may be x), its
// row stride, q, d, b, tokens, columns. A block of threads has a token.
//
// The squares are added up in the order of the CPU, lane i of 32 having columns i, 32 + i ...: so
// rounding gives the same bits, and one warp does it while the others have nothing to do.
KERNEL(rows_norm) {
    __shared__ float factor;
    const float *weight = op.address<float>(3);
    i64 cols = op.number(11), warps = blockDim.x / 32, warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    Rounded rounded = {op.address<i8>(7), op.address<float>(8), op.address<int>(9)};
    for (i64 t = blockIdx.x; t < op.number(10); t += gridDim.x) {
        const float *x = op.address<float>(1) + t * op.number(2);
        float *out = op.address<float>(5);
        if (warp == 0) {
            float sum = 0.0f;
#pragma unroll 32
            for (i64 c = lane; c < cols; c += 32) sum = __fmaf_rn(x[c], x[c], sum);
            for (int distance = 16; distance > 0; distance /= 2)
                sum = __fadd_rn(sum, __shfl_xor_sync(0xffffffffu, sum, distance));
            float mean = __fadd_rn(__fdiv_rn(sum, (float)cols), op.real(4));
            if (lane == 0) factor = __fdiv_rn(1.0f, __fsqrt_rn(mean));
        }
        __syncthreads();
        for (i64 block = warp; block < cols / 32; block += warps) {
            i64 c = 32 * block + lane;
            float value = __fmul_rn(weight[c], __fmul_rn(x[c], factor));
            if (out != nullptr) out[t * op.number(6) + c] = value;
            if (rounded.q != nullptr) round_block(rounded.row(t, cols), block, value);
        }
        __syncthreads();
    }
}
