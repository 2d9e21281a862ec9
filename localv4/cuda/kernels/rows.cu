// Rows of activations between the big products: twins of localv4/kernels/rows.py and of the rounding
// in localv4/kernels/single_token.py.

#include "activations.cuh"

constexpr int SPAN = 1024;  // columns of a row that a block of threads does

// The row and the columns of a block of threads, where rows have spans one after the other.
struct RowSpan {
    i64 row;
    int first, end;

    __device__ inline RowSpan(const Words &op, i64 columns) {
        int cols = (int)columns, spans = (cols + SPAN - 1) / SPAN;
        row = op.block() / spans;
        first = op.block() % spans * SPAN;
        end = min(first + SPAN, cols);
    }
};

// Words: x, its row stride in floats, tokens, columns.
KERNEL(clear) {
    RowSpan span(op, op.number(4));
    float *x = op.address<float>(1) + span.row * op.number(2);
    for (int c = span.first + threadIdx.x; c < span.end; c += blockDim.x) x[c] = 0.0f;
}

// Words: gate, up, their row stride in floats, out, its row stride, limit as f32 bits, tokens, columns.
KERNEL(swiglu) {
    RowSpan span(op, op.number(8));
    const float *gate = op.address<float>(1) + span.row * op.number(3);
    const float *up = op.address<float>(2) + span.row * op.number(3);
    float *out = op.address<float>(4) + span.row * op.number(5), limit = op.real(6);
    for (int c = span.first + threadIdx.x; c < span.end; c += blockDim.x)
        out[c] = swiglu_as_cpu(gate[c], up[c], limit);
}

// Words: x, its row stride in floats, rows (i64, or 0: all in order), count, columns, q, d, b, 1 for
// scales that are powers of two. (Pairs, which follow, are for the CPU.)
// Eight lanes round a block of 32 columns, four values each.
KERNEL(quantize) {
    RowSpan span(op, op.number(5));
    const i64 *rows = op.address<i64>(3);
    i64 cols = op.number(5);
    const float *x = op.address<float>(1) + (rows == nullptr ? span.row : rows[span.row]) * op.number(2);
    Rounded all = {op.address<i8>(6), op.address<float>(7), op.address<int>(8), op.number(9) != 0};
    Rounded out = all.row(span.row, cols);
    // whole warps go on together; lanes behind the last column do what the last lanes do
    for (int start = span.first; start < span.end; start += 4 * blockDim.x) {
        int c = min(start + 4 * (int)threadIdx.x, span.end - 32 + 4 * (int)(threadIdx.x % 8));
        round_part(out, c / 32, *(const float4 *)(x + c));
    }
}

// Words: x, its row stride in floats, weight, eps as f32 bits, out (0: only rounded; may be x), its
// row stride, q, d, b, tokens, columns. A block of threads has a token.
//
// The squares are added up in the order of the CPU, lane i of 32 having columns i, 32 + i ...: so
// rounding gives the same bits. One warp does that, with the row in shared memory.
EARLY_KERNEL(, rows_norm) {
    constexpr int AHEAD = 4;  // blocks of a warp whose weights are on their way while x is waited for
    DYNAMIC_SHARED(memory);
    __shared__ float factor;
    float *row = (float *)memory;
    const float *weight = op.address<float>(3);
    i64 cols = op.number(11), warps = blockDim.x / 32, warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    Rounded rounded = {op.address<i8>(7), op.address<float>(8), op.address<int>(9)};
    float ahead[AHEAD];
#pragma unroll
    for (int i = 0; i < AHEAD; ++i) {
        i64 c = 32 * (warp + i * warps) + lane;
        ahead[i] = c < cols ? weight[c] : 0.0f;
    }
    wait_for_results();
    for (i64 t = op.block(); t < op.number(10); t += op.blocks()) {
        const float *x = op.address<float>(1) + t * op.number(2);
        float *out = op.address<float>(5);
        for (i64 c = threadIdx.x; c < cols; c += blockDim.x) row[c] = x[c];
        __syncthreads();
        if (warp == 0) {
            float sum = 0.0f;
#pragma unroll 16
            for (i64 c = lane; c < cols; c += 32) sum = __fmaf_rn(row[c], row[c], sum);
            for (int distance = 16; distance > 0; distance /= 2)
                sum = __fadd_rn(sum, __shfl_xor_sync(0xffffffffu, sum, distance));
            float mean = __fadd_rn(__fdiv_rn(sum, (float)cols), op.real(4));
            if (lane == 0) factor = __fdiv_rn(1.0f, __fsqrt_rn(mean));
        }
        __syncthreads();
        auto write = [&](i64 block, float w) {
            i64 c = 32 * block + lane;
            float value = __fmul_rn(w, __fmul_rn(row[c], factor));
            if (out != nullptr) out[t * op.number(6) + c] = value;
            if (rounded.q != nullptr) round_block(rounded.row(t, cols), block, value);
        };
#pragma unroll
        for (int i = 0; i < AHEAD; ++i)
            if (warp + i * warps < cols / 32) write(warp + i * warps, ahead[i]);
        for (i64 block = warp + AHEAD * warps; block < cols / 32; block += warps) write(block, weight[32 * block + lane]);
        __syncthreads();
    }
}
