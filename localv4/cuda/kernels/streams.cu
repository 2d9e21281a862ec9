// Hyper-connections: twins of localv4/kernels/streams.py and mixes.py.

#include "activations.cuh"

constexpr int COLUMNS = 128;      // of a stream that are one piece of work
constexpr int MOST_STREAMS = 8;
constexpr int MOST_VALUES = 96;   // floats of a row of partials

// Where the sum of squares is in a row of partials, and how long the row is.
__device__ inline i64 squares_at(i64 rows) { return (rows + 3) / 4 * 4; }
__device__ inline i64 partial_row(i64 rows) { return (rows + 4) / 16 * 16 + 16; }

// --- leaving a block ---

// What a thread block works on: some tokens, COLUMNS columns of all their streams.
struct Piece {
    i64 first, count, block, blocks, n, hidden;
};

// Put the streams of a piece as they are after the update into `pieces` (count, n, COLUMNS).
__device__ inline void leave(const Words &op, const Piece &piece, float *pieces) {
    const float *update = op.address<float>(2), *second = op.address<float>(3), *mix = op.address<float>(5);
    i64 stride = op.number(4), n = piece.n;
    int column = threadIdx.x % COLUMNS, step = blockDim.x / COLUMNS;
    for (int item = threadIdx.x / COLUMNS; item < piece.count * n; item += step) {
        i64 token = piece.first + item / n, k = item % n, at = piece.block * COLUMNS + column;
        const float *streams = op.address<float>(1) + token * n * piece.hidden + at;
        float value;
        if (mix == nullptr) {
            value = streams[k * piece.hidden];
        } else {
            const float *own = mix + (n + n * n) * token;
            value = update[stride * token + at];
            if (second != nullptr) value += second[stride * token + at];
            value = __fmul_rn(own[k], value);
#pragma unroll 4
            for (int j = 0; j < n; ++j) value = __fmaf_rn(own[n + n * j + k], streams[j * piece.hidden], value);
        }
        pieces[item * COLUMNS + column] = value;
    }
}

__device__ inline void copy_back(const Words &op, const Piece &piece, const float *pieces) {
    int column = threadIdx.x % COLUMNS, step = blockDim.x / COLUMNS;
    float *streams = op.address<float>(1) + piece.first * piece.n * piece.hidden + piece.block * COLUMNS;
    for (int item = threadIdx.x / COLUMNS; item < piece.count * piece.n; item += step)
        streams[item * piece.hidden + column] = pieces[item * COLUMNS + column];
}

// Multiply four rows of the matrix with pieces; a warp. `panel` as `streams.pack_mixing` has it.
template <int TOKENS>
__device__ inline void multiply_rows(float *out, i64 stride, const float *panel, const float *pieces,
                                     const Piece &piece) {
    int lane = threadIdx.x % 32, half = lane / 16, quad = lane % 4;
    float sums[TOKENS] = {};
#pragma unroll 8
    for (int chunk = half; chunk < piece.n * (COLUMNS / 16); chunk += 2) {
        float4 w = *(const float4 *)(panel + chunk * 64 + lane % 16 * 4);
#pragma unroll
        for (int i = 0; i < TOKENS; ++i) {
            float4 x = *(const float4 *)(pieces + i * piece.n * COLUMNS + chunk * 16 + quad * 4);
            sums[i] = __fmaf_rn(w.x, x.x, __fmaf_rn(w.y, x.y, __fmaf_rn(w.z, x.z, __fmaf_rn(w.w, x.w, sums[i]))));
        }
    }
#pragma unroll
    for (int i = 0; i < TOKENS; ++i) {
        float sum = sums[i];
        sum += __shfl_xor_sync(0xffffffffu, sum, 1);
        sum += __shfl_xor_sync(0xffffffffu, sum, 2);
        sum += __shfl_xor_sync(0xffffffffu, sum, 16);
        if (half == 0 && quad == 0 && i < piece.count) out[i * stride + lane / 4] = sum;
    }
}

// Multiply pieces with the columns of the next site's matrix: warps share out its rows by four,
// and the sum of squares.
template <int TOKENS>
__device__ inline void mix(const Words &op, const Piece &piece, const float *pieces) {
    i64 rows = op.number(7), row = partial_row(rows), groups = squares_at(rows) / 4;
    i64 width = piece.n * COLUMNS, stride = piece.blocks * row;
    const float *panels = op.address<float>(6) + piece.block * groups * 4 * width;
    float *out = op.address<float>(8) + (piece.first * piece.blocks + piece.block) * row;
    for (i64 item = threadIdx.x / 32; item <= groups; item += blockDim.x / 32) {
        if (item < groups) {
            multiply_rows<TOKENS>(out + 4 * item, stride, panels + item * 4 * width, pieces, piece);
            continue;
        }
        for (int i = 0; i < piece.count; ++i) {
            float squares = 0.0f;
            for (int c = threadIdx.x % 32; c < width; c += 32)
                squares = __fmaf_rn(pieces[i * width + c], pieces[i * width + c], squares);
            squares = warp_sum(squares);
            if (threadIdx.x % 32 == 0) out[i * stride + 4 * groups] = squares;
        }
    }
}

// Ask for the columns of the matrix while the streams are on their way.
__device__ inline void fetch_panels(const Words &op, const Piece &piece) {
    i64 bytes = squares_at(op.number(7)) * piece.n * COLUMNS * 4;
    const char *panels = op.address<char>(6) + piece.block * bytes;
    for (i64 at = 128 * threadIdx.x; at < bytes; at += 128 * blockDim.x) prefetch_far(panels + at);
}

template <int TOKENS>
__device__ inline void leave_pieces(const Words &op) {
    DYNAMIC_SHARED(columns);
    float *pieces = (float *)columns;
    i64 tokens = op.number(9), blocks = op.number(11) / COLUMNS, first = blockIdx.x / blocks * TOKENS;
    Piece piece = {first, min(tokens - first, (i64)TOKENS), blockIdx.x % blocks, blocks, op.number(10), op.number(11)};
    bool is_followed = op.number(7) > 0;
    if (is_followed) fetch_panels(op, piece);
    leave(op, piece, pieces);
    __syncthreads();
    if (op.number(5) != 0) copy_back(op, piece, pieces);
    if (is_followed) mix<TOKENS>(op, piece, pieces);
}

// Words: streams, update, second update or 0, their row stride, mix or 0, fn, rows, partials,
// tokens, n, hidden. 512 threads; blocks: tokens * hidden / COLUMNS.
KERNEL(leave_and_mix_one) { leave_pieces<1>(op); }

// The same for eight tokens at a time, 256 threads.
KERNEL(leave_and_mix) { leave_pieces<8>(op); }

// --- entering a site ---

// What `enter` and `enter_head` have in common, in the order of their words.
struct Site {
    const float *partials, *scale, *base, *streams, *weight;
    float hc_eps, rms_eps;
    float *x;
    i64 stride, rows, n, hidden;
    Rounded rounded;
};

__device__ inline float inverse_size(float squares, i64 count, float eps) {
    return __fdiv_rn(1.0f, __fsqrt_rn(__fdiv_rn(squares, (float)count) + eps));
}

// Return the sum over all threads of a block of 1024, in all of them.
__device__ inline float block_sum(float value, float *parts) {
    value = warp_sum(value);
    if (threadIdx.x % 32 == 0) parts[threadIdx.x / 32] = value;
    __syncthreads();
    return warp_sum(parts[threadIdx.x % 32]);
}

// values = the products of the normed streams with the rows of fn
__device__ inline void add_partials(const Site &site, i64 token, float *values, float *parts) {
    int row = (int)partial_row(site.rows), ways = blockDim.x / row, blocks = (int)(site.hidden / COLUMNS);
    int way = threadIdx.x / row, column = threadIdx.x % row;
    const float *own = site.partials + token * blocks * row;
    float sum = 0.0f;
    for (int block = way; block < blocks && way < ways; block += ways) sum += own[block * row + column];
    parts[threadIdx.x] = sum;
    __syncthreads();
    if (threadIdx.x < row) {
        sum = 0.0f;
        for (int i = 0; i < ways; ++i) sum += parts[i * row + threadIdx.x];
        values[threadIdx.x] = sum;
    }
    __syncthreads();
    float factor = inverse_size(values[squares_at(site.rows)], site.n * site.hidden, site.rms_eps);
    if (threadIdx.x < site.rows) values[threadIdx.x] *= factor;
    __syncthreads();
}

__device__ inline float gate(float value, float scale, float base) {
    return __fdiv_rn(1.0f, 1.0f + exp_as_cpu(-(value * scale + base)));
}

// row = the weighted sum of the streams; returns the sum of its squares of this thread.
__device__ inline float collapse(const Site &site, i64 token, const float *pre, float *row) {
    const float *streams = site.streams + token * site.n * site.hidden;
    float squares = 0.0f;
    for (i64 c = 4 * threadIdx.x; c < site.hidden; c += 4 * blockDim.x) {
        float4 sum = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
#pragma unroll 4
        for (int i = 0; i < site.n; ++i) {
            float4 x = *(const float4 *)(streams + i * site.hidden + c);
            sum.x = __fmaf_rn(pre[i], x.x, sum.x), sum.y = __fmaf_rn(pre[i], x.y, sum.y);
            sum.z = __fmaf_rn(pre[i], x.z, sum.z), sum.w = __fmaf_rn(pre[i], x.w, sum.w);
        }
        *(float4 *)(row + c) = sum;
        squares += sum.x * sum.x + sum.y * sum.y + sum.z * sum.z + sum.w * sum.w;
    }
    return squares;
}

// x = weight * (row * factor), also rounded; `warps` take 32 columns each in turn.
__device__ inline void write_normed(const Site &site, i64 token, const float *row, float factor, int warps) {
    int lane = threadIdx.x % 32;
    float *x = site.x + site.stride * token;
    Rounded rounded = site.rounded.row(token, site.hidden);
    for (int block = threadIdx.x / 32; block < site.hidden / 32; block += warps) {
        float value = __fmul_rn(site.weight[32 * block + lane], __fmul_rn(row[32 * block + lane], factor));
        x[32 * block + lane] = value;
        if (site.rounded.q != nullptr) round_block(rounded, block, value);
    }
}

// Divide columns and rows of comb (n, n) by their sums + eps in turn, columns first and last.
__device__ inline void balance(float *comb, int n, i64 iterations, float eps) {
    for (i64 i = 0; i < 2 * iterations - 1; ++i) {
        int line = i % 2 == 0 ? 1 : n, step = i % 2 == 0 ? n : 1;
        for (int l = 0; l < n; ++l) {
            float total = eps;
            for (int k = 0; k < n; ++k) total += comb[line * l + step * k];
            float share = __frcp_rn(total);
            for (int k = 0; k < n; ++k) comb[line * l + step * k] *= share;
        }
    }
}

// Four streams, as all released models have: the matrix stays in registers.
__device__ inline void balance_four(float *comb, i64 iterations, float eps) {
    float c[4][4];
#pragma unroll
    for (int i = 0; i < 16; ++i) c[i / 4][i % 4] = comb[i];
    for (i64 done = 0; done < iterations; ++done) {
        if (done > 0) {
#pragma unroll
            for (int j = 0; j < 4; ++j) {
                float share = __frcp_rn((c[j][0] + c[j][1]) + (c[j][2] + c[j][3]) + eps);
                c[j][0] *= share, c[j][1] *= share, c[j][2] *= share, c[j][3] *= share;
            }
        }
#pragma unroll
        for (int k = 0; k < 4; ++k) {
            float share = __frcp_rn((c[0][k] + c[1][k]) + (c[2][k] + c[3][k]) + eps);
            c[0][k] *= share, c[1][k] *= share, c[2][k] *= share, c[3][k] *= share;
        }
    }
#pragma unroll
    for (int i = 0; i < 16; ++i) comb[i] = c[i / 4][i % 4];
}

// Turn raw mixes into the doubly stochastic comb (n, n): softmax of rows, then `balance`. One thread.
__device__ inline void write_comb(float *out, float *raw, float scale, const float *base, int n, i64 iterations,
                                  float eps) {
    for (int j = 0; j < n; ++j) {
        float *row = raw + n * j, largest = -INFINITE, total = 0.0f;
        for (int k = 0; k < n; ++k) {
            row[k] = row[k] * scale + base[n * j + k];
            largest = fmaxf(largest, row[k]);
        }
        for (int k = 0; k < n; ++k) total += row[k] = exp_as_cpu(row[k] - largest);
        for (int k = 0; k < n; ++k) row[k] = __fdiv_rn(row[k], total) + eps;
    }
    if (n == 4)
        balance_four(raw, iterations, eps);
    else
        balance(raw, n, iterations, eps);
    for (int i = 0; i < n * n; ++i) out[i] = raw[i];
}

// Words: partials, scale (3), base, iterations, hc_eps, streams, weight, rms_eps, x, its stride,
// mix, q, d, b, tokens, n, hidden. 1024 threads a token.
KERNEL(enter) {
    DYNAMIC_SHARED(memory);
    __shared__ float values[MOST_VALUES], parts[1024], pre[MOST_STREAMS];
    i64 token = blockIdx.x, n = op.number(16), hidden = op.number(17);
    Site site = {op.address<float>(1), op.address<float>(2), op.address<float>(3), op.address<float>(6),
                 op.address<float>(7), op.real(5), op.real(8), op.address<float>(9), op.number(10), 2 * n + n * n,
                 n, hidden, {op.address<i8>(12), op.address<float>(13), op.address<int>(14)}};
    float *mix = op.address<float>(11) + (n + n * n) * token, *row = (float *)memory;
    add_partials(site, token, values, parts);
    int i = threadIdx.x;
    if (i < n) pre[i] = gate(values[i], site.scale[0], site.base[i]) + site.hc_eps;
    if (i < n) mix[i] = 2.0f * gate(values[n + i], site.scale[1], site.base[n + i]);
    __syncthreads();
    float squares = block_sum(collapse(site, token, pre, row), parts);
    // the last warp balances the matrix meanwhile
    int warps = blockDim.x / 32 - 1;
    if (threadIdx.x / 32 < warps)
        write_normed(site, token, row, inverse_size(squares, hidden, site.rms_eps), warps);
    else if (threadIdx.x % 32 == 0)
        write_comb(mix + n, values + 2 * n, site.scale[2], site.base + 2 * n, (int)n, op.number(4), site.hc_eps);
}

// Words: partials, scale (1), base, hc_eps, streams, weight, rms_eps, x, its stride, q, d, b,
// tokens, n, hidden. 1024 threads a token.
KERNEL(enter_head) {
    DYNAMIC_SHARED(memory);
    __shared__ float values[MOST_VALUES], parts[1024], pre[MOST_STREAMS];
    i64 token = blockIdx.x, n = op.number(14), hidden = op.number(15);
    Site site = {op.address<float>(1), op.address<float>(2), op.address<float>(3), op.address<float>(5),
                 op.address<float>(6), op.real(4), op.real(7), op.address<float>(8), op.number(9), n,
                 n, hidden, {op.address<i8>(10), op.address<float>(11), op.address<int>(12)}};
    float *row = (float *)memory;
    add_partials(site, token, values, parts);
    if (threadIdx.x < n) pre[threadIdx.x] = gate(values[threadIdx.x], site.scale[0], site.base[threadIdx.x]) + site.hc_eps;
    __syncthreads();
    float squares = block_sum(collapse(site, token, pre, row), parts);
    write_normed(site, token, row, inverse_size(squares, hidden, site.rms_eps), blockDim.x / 32);
}
