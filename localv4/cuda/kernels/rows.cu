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

// Words: x, its row stride in floats, tokens, columns, streams, how many of them.
KERNEL(spread) {
    RowSpan span(op, op.number(4));
    i64 cols = op.number(4), count = op.number(6);
    const float *x = op.address<float>(1) + span.row * op.number(2);
    float *streams = op.address<float>(5) + span.row * count * cols;
    for (int c = span.first + threadIdx.x; c < span.end; c += blockDim.x)
        for (i64 i = 0; i < count; ++i) streams[i * cols + c] = x[c];
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
// scales that are powers of two. (Pairs, which follow, are for the CPU.) Word 12: of how many such
// roundings this is the first, or 0; then by how many bytes x, rows, q, d and b of the next are apart.
// Eight lanes round a block of 32 columns, four values each.
KERNEL(quantize) {
    RowSpan span(op, op.number(5));
    i64 cols = op.number(5), count = op.number(4), number = span.row / count, row = span.row % count;
    const i64 *rows = op.address<i64>(3);
    const float *x = op.address<float>(1, number * op.number(13)) + (rows == nullptr ? row : rows[row]) * op.number(2);
    Rounded all = {op.address<i8>(6, number * op.number(15)), op.address<float>(7, number * op.number(16)),
                   op.address<int>(8, number * op.number(17)), op.number(9) != 0};
    Rounded out = all.row(row, cols);
    // whole warps go on together; lanes behind the last column do what the last lanes do
    for (int start = span.first; start < span.end; start += 4 * blockDim.x) {
        int c = min(start + 4 * (int)threadIdx.x, span.end - 32 + 4 * (int)(threadIdx.x % 8));
        round_part(out, c / 32, *(const float4 *)(x + c));
    }
}

// Four floats from anywhere.
__device__ inline float4 four(const float *x) { return make_float4(x[0], x[1], x[2], x[3]); }

// Words: x, its row stride in floats, weight, eps as f32 bits, out (0: only rounded; may be x), its
// row stride, q, d, b, tokens, columns. A block of threads has a token.
//
// The squares are added up in the order of the CPU, lane i of 32 having columns i, 32 + i ...: so
// rounding gives the same bits. One warp does that, with the row in shared memory. Each thread has four
// columns in a row, whose weights are on their way while x is waited for.
EARLY_KERNEL(, rows_norm) {
    DYNAMIC_SHARED(memory);
    __shared__ float factor;
    float *row = (float *)memory;
    i64 cols = op.number(11), own = 4 * threadIdx.x, lane = threadIdx.x % 32;
    const float *weight = op.address<float>(3);
    Rounded rounded = {op.address<i8>(7), op.address<float>(8), op.address<int>(9)};
    float4 ahead = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
    if (own < cols) ahead = four(weight + own);
    wait_for_results();
    for (i64 t = op.block(); t < op.number(10); t += op.blocks()) {
        const float *x = op.address<float>(1) + t * op.number(2);
        float *out = op.address<float>(5);
        for (i64 c = own; c < cols; c += 4 * blockDim.x) *(float4 *)(row + c) = *(const float4 *)(x + c);
        __syncthreads();
        if (threadIdx.x < 32) {
            float sum = 0.0f;
#pragma unroll 16
            for (i64 c = lane; c < cols; c += 32) sum = __fmaf_rn(row[c], row[c], sum);
            for (int distance = 16; distance > 0; distance /= 2)
                sum = __fadd_rn(sum, __shfl_xor_sync(0xffffffffu, sum, distance));
            float mean = __fadd_rn(__fdiv_rn(sum, (float)cols), op.real(4));
            if (lane == 0) factor = __fdiv_rn(1.0f, __fsqrt_rn(mean));
        }
        __syncthreads();
        // whole warps go on together; lanes behind the last column do what the last lanes do
        for (i64 start = 0; start < cols; start += 4 * blockDim.x) {
            i64 c = min(start + own, cols - 32 + 4 * (i64)(threadIdx.x % 8));
            float4 w = c == own ? ahead : four(weight + c), value = *(const float4 *)(row + c);
            value.x = __fmul_rn(w.x, __fmul_rn(value.x, factor)), value.y = __fmul_rn(w.y, __fmul_rn(value.y, factor));
            value.z = __fmul_rn(w.z, __fmul_rn(value.z, factor)), value.w = __fmul_rn(w.w, __fmul_rn(value.w, factor));
            if (out != nullptr) *(float4 *)(out + t * op.number(6) + c) = value;
            if (rounded.q != nullptr) round_part(rounded.row(t, cols), c / 32, value);
        }
        __syncthreads();
    }
}
