// Hyper-connections: twins of localv4/kernels/streams.py and mixes.py.

#include "activations.cuh"

constexpr int COLUMNS = 128;      // of a stream that are one piece of work
constexpr int MOST_STREAMS = 8;
constexpr int MOST_VALUES = 96;   // floats of a row of partials
constexpr int ADDERS = 8;         // warps that add up rows of partials

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

// The same for four streams, as all released models have, and in the place of the streams, too: a
// thread reads a column of all of them once.
__device__ inline void leave_four(const Words &op, const Piece &piece, float *pieces) {
    const float *update = op.address<float>(2), *second = op.address<float>(3), *mix = op.address<float>(5);
    int column = threadIdx.x % COLUMNS, step = blockDim.x / COLUMNS;
    i64 stride = op.number(4), at = piece.block * COLUMNS + column;
    float *streams = op.address<float>(1) + piece.first * 4 * piece.hidden + at;
#pragma unroll 4
    for (int item = threadIdx.x / COLUMNS; item < piece.count; item += step) {
        i64 token = piece.first + item;
        float x[4], value = update[stride * token + at];
#pragma unroll
        for (int i = 0; i < 4; ++i) x[i] = streams[(4 * item + i) * piece.hidden];
        if (second != nullptr) value += second[stride * token + at];
        const float *own = mix + 20 * token;
#pragma unroll
        for (int k = 0; k < 4; ++k) {
            float sum = __fmul_rn(own[k], value);
#pragma unroll
            for (int j = 0; j < 4; ++j) sum = __fmaf_rn(own[4 + 4 * j + k], x[j], sum);
            pieces[(4 * item + k) * COLUMNS + column] = streams[(4 * item + k) * piece.hidden] = sum;
        }
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

// The usual matrix, 24 rows for four streams, and one token: every thread of 512 has a quarter of
// four rows' 16 columns of each group, all of it on its way before the streams are known.
struct Panels {
    static constexpr int GROUPS = 6, WARPS = 16;
    float4 weights[GROUPS];

    __device__ static inline bool fit(const Words &op) {
        return op.number(10) == 4 && squares_at(op.number(7)) == 4 * GROUPS && blockDim.x == 32 * WARPS;
    }

    __device__ inline void load(const Words &op, const Piece &piece) {
        const float4 *own = (const float4 *)op.address<float>(6) + piece.block * GROUPS * blockDim.x + threadIdx.x;
#pragma unroll
        for (int i = 0; i < GROUPS; ++i) weights[i] = own[i * blockDim.x];
    }

    __device__ inline void mix(const Words &op, const Piece &piece, const float *pieces) const {
        __shared__ float parts[WARPS][4 * GROUPS + 1];
        int lane = threadIdx.x % 32, quad = lane % 4, warp = threadIdx.x / 32;
        float4 x = *(const float4 *)(pieces + threadIdx.x / 16 * 16 + quad * 4);
        float sums[GROUPS], squares = x.x * x.x + x.y * x.y + x.z * x.z + x.w * x.w;
#pragma unroll
        for (int i = 0; i < GROUPS; ++i) {
            float4 w = weights[i];
            sums[i] = __fmaf_rn(w.x, x.x, __fmaf_rn(w.y, x.y, __fmaf_rn(w.z, x.z, __fmul_rn(w.w, x.w))));
        }
#pragma unroll
        for (int distance = 1; distance < 32; distance = distance == 2 ? 16 : 2 * distance) {
#pragma unroll
            for (int i = 0; i < GROUPS; ++i) sums[i] += __shfl_xor_sync(0xffffffffu, sums[i], distance);
            squares += __shfl_xor_sync(0xffffffffu, squares, distance);
        }
        if (lane < 16 && quad == 0) {
#pragma unroll
            for (int i = 0; i < GROUPS; ++i) parts[warp][4 * i + lane / 4] = sums[i];
            if (lane == 0) parts[warp][4 * GROUPS] = squares;
        }
        __syncthreads();
        if (threadIdx.x > 4 * GROUPS) return;
        float sum = 0.0f;
#pragma unroll
        for (int i = 0; i < WARPS; ++i) sum += parts[i][threadIdx.x];
        op.address<float>(8)[(piece.first * piece.blocks + piece.block) * partial_row(op.number(7)) + threadIdx.x] = sum;
    }
};

template <int TOKENS>
__device__ inline void leave_pieces(const Words &op) {
    DYNAMIC_SHARED(memory);
    float *pieces = (float *)memory;
    i64 tokens = op.number(9), blocks = op.number(11) / COLUMNS, first = blockIdx.x / blocks * TOKENS;
    Piece piece = {first, min(tokens - first, (i64)TOKENS), blockIdx.x % blocks, blocks, op.number(10), op.number(11)};
    bool is_followed = op.number(7) > 0, has_update = op.number(5) != 0, is_usual = piece.n == 4 && has_update;
    if (is_usual) leave_four(op, piece, pieces);
    else leave(op, piece, pieces);
    __syncthreads();
    if (has_update && !is_usual) copy_back(op, piece, pieces);
    if (is_followed) mix<TOKENS>(op, piece, pieces);
}

// Words: streams, update, second update or 0, their row stride, mix or 0, fn, rows, partials,
// tokens, n, hidden. 512 threads; blocks: tokens * hidden / COLUMNS.
EARLY_KERNEL(, leave_and_mix_one) {
    if (!Panels::fit(op)) {
        wait_for_results();
        return leave_pieces<1>(op);
    }
    DYNAMIC_SHARED(memory);
    float *pieces = (float *)memory;
    i64 blocks = op.number(11) / COLUMNS;
    Piece piece = {blockIdx.x / blocks, 1, blockIdx.x % blocks, blocks, op.number(10), op.number(11)};
    Panels panels;
    panels.load(op, piece);
    wait_for_results();
    leave(op, piece, pieces);
    __syncthreads();
    if (op.number(5) != 0) copy_back(op, piece, pieces);
    panels.mix(op, piece, pieces);
}

// The same for eight tokens at a time, 256 threads.
KERNEL(leave_and_mix) { leave_pieces<8>(op); }

// --- entering a site ---

// What `enter` and `enter_head` have in common, in the order of their words.
struct Site {
    const float *partials, *scale, *base, *streams, *weight;
    float hc_eps, rms_eps;
    float *x;
    i64 stride, rows, tokens, n, hidden;
    Rounded rounded;
};

// Add up rows of partials, which some warps share out, into `parts` (ADDERS, MOST_VALUES).
__device__ inline void add_partials(const Site &site, i64 token, float *parts) {
    int row = (int)partial_row(site.rows), blocks = (int)(site.hidden / COLUMNS), warp = threadIdx.x / 32;
    if (warp >= ADDERS) return;
    const float *own = site.partials + token * blocks * row;
    for (int column = threadIdx.x % 32; column < row; column += 32) {
        float sum = 0.0f;
#pragma unroll 4
        for (int block = warp; block < blocks; block += ADDERS) sum += own[block * row + column];
        parts[warp * MOST_VALUES + column] = sum;
    }
}

// The sum of a column.
__device__ inline float total(const float *parts, int column) {
    float sum = 0.0f;
#pragma unroll
    for (int i = 0; i < ADDERS; ++i) sum += parts[i * MOST_VALUES + column];
    return sum;
}

__device__ inline float gate(float value, float scale, float base) {
    return __fdiv_rn(1.0f, 1.0f + exp_as_cpu(-(value * scale + base)));
}

__device__ inline void add_scaled(float4 &sum, float factor, const float4 &x) {
    sum.x = __fmaf_rn(factor, x.x, sum.x), sum.y = __fmaf_rn(factor, x.y, sum.y);
    sum.z = __fmaf_rn(factor, x.z, sum.z), sum.w = __fmaf_rn(factor, x.w, sum.w);
}

// Columns of the first streams that a thread wants first, on their way while partials are added up.
struct Ahead {
    static constexpr int STREAMS = 4;
    float4 x[STREAMS];

    __device__ inline Ahead(const Site &site, const float *streams) {
#pragma unroll
        for (int i = 0; i < STREAMS; ++i)
            if (i < site.n && 4 * threadIdx.x < site.hidden)
                x[i] = *(const float4 *)(streams + i * site.hidden + 4 * threadIdx.x);
    }
};

// row = the weighted sum of the streams; returns the sum of its squares of this thread.
__device__ inline float collapse(const Site &site, const float *streams, const Ahead &ahead, const float *pre,
                                 float *row) {
    float squares = 0.0f;
    for (int c = 4 * threadIdx.x; c < site.hidden; c += 4 * blockDim.x) {
        float4 sum = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
#pragma unroll
        for (int i = 0; i < Ahead::STREAMS; ++i) {
            if (i >= site.n) continue;
            if (c == 4 * threadIdx.x)
                add_scaled(sum, pre[i], ahead.x[i]);
            else
                add_scaled(sum, pre[i], *(const float4 *)(streams + i * site.hidden + c));
        }
        for (int i = Ahead::STREAMS; i < site.n; ++i)
            add_scaled(sum, pre[i], *(const float4 *)(streams + i * site.hidden + c));
        *(float4 *)(row + c) = sum;
        squares += sum.x * sum.x + sum.y * sum.y + sum.z * sum.z + sum.w * sum.w;
    }
    return squares;
}

// What a block of threads writes of a token's x: pieces of 128 columns, a warp each.
struct Share {
    int first, end;

    __device__ inline Share(const Site &site, int part, int parts) {
        int pieces = (int)(site.hidden / COLUMNS);
        first = pieces * part / parts + threadIdx.x / 32, end = pieces * (part + 1) / parts;
    }
};

__device__ inline float4 weights_of(const Site &site, int piece) {
    const float *w = site.weight + COLUMNS * piece + 4 * (threadIdx.x % 32);
    return make_float4(w[0], w[1], w[2], w[3]);
}

// x = weight * (row * factor), also rounded; so many warps take pieces in turn. `w`: the weights of
// the first one.
__device__ inline void write_normed(const Site &site, i64 token, const Share &share, float4 w, const float *row,
                                    float factor, int warps) {
    Rounded rounded = site.rounded.row(token, site.hidden);
    for (int piece = share.first; piece < share.end; piece += warps) {
        int c = COLUMNS * piece + 4 * (threadIdx.x % 32);
        if (piece != share.first) w = weights_of(site, piece);
        float4 value = *(const float4 *)(row + c);
        value.x = __fmul_rn(w.x, __fmul_rn(value.x, factor)), value.y = __fmul_rn(w.y, __fmul_rn(value.y, factor));
        value.z = __fmul_rn(w.z, __fmul_rn(value.z, factor)), value.w = __fmul_rn(w.w, __fmul_rn(value.w, factor));
        float *x = site.x + site.stride * token + c;
        x[0] = value.x, x[1] = value.y, x[2] = value.z, x[3] = value.w;
        if (site.rounded.q != nullptr) round_part(rounded, c / 32, value);
    }
}

// The shared memory of `enter` and `enter_head`.
struct Entry {
    float parts[ADDERS * MOST_VALUES], sums[32], pre[MOST_STREAMS], raw[MOST_STREAMS * MOST_STREAMS];
};

// The factor of the products with the rows of fn.
__device__ inline float factor_of(const Site &site, const float *parts) {
    return inverse_size(total(parts, (int)squares_at(site.rows)), site.n * site.hidden, site.rms_eps);
}

// Write x, or the part of it that this block of threads has.
__device__ inline void write_x(const Site &site, Entry &entry, float *row) {
    int parts = (int)(gridDim.x / site.tokens), part = blockIdx.x % parts, warps = blockDim.x / 32;
    i64 token = blockIdx.x / parts;
    const float *streams = site.streams + token * site.n * site.hidden;
    Share share(site, part, parts);
    float4 w = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
    if (share.first < share.end) w = weights_of(site, share.first);
    float base = threadIdx.x < site.n ? site.base[threadIdx.x] : 0.0f, scale = site.scale[0];
    wait_for_results();
    Ahead ahead(site, streams);
    add_partials(site, token, entry.parts);
    __syncthreads();
    if (threadIdx.x < site.n)
        entry.pre[threadIdx.x] =
            gate(total(entry.parts, threadIdx.x) * factor_of(site, entry.parts), scale, base) + site.hc_eps;
    __syncthreads();
    float squares = block_sum(collapse(site, streams, ahead, entry.pre, row), entry.sums);
    write_normed(site, token, share, w, row, inverse_size(squares, site.hidden, site.rms_eps), warps);
}

// Divide columns and rows of comb (n, n) by their sums + eps in turn, columns first and last.
__device__ inline void balance(float *comb, int n, i64 iterations, float eps) {
    for (i64 i = 0; i < 2 * iterations - 1; ++i) {
        int line = i % 2 == 0 ? 1 : n, step = i % 2 == 0 ? n : 1;
        for (int l = 0; l < n; ++l) {
            float total = eps;
            for (int k = 0; k < n; ++k) total += comb[line * l + step * k];
            float share = fast_inverse(total);
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
                float share = fast_inverse((c[j][0] + c[j][1]) + (c[j][2] + c[j][3]) + eps);
                c[j][0] *= share, c[j][1] *= share, c[j][2] *= share, c[j][3] *= share;
            }
        }
#pragma unroll
        for (int k = 0; k < 4; ++k) {
            float share = fast_inverse((c[0][k] + c[1][k]) + (c[2][k] + c[3][k]) + eps);
            c[0][k] *= share, c[1][k] *= share, c[2][k] *= share, c[3][k] *= share;
        }
    }
#pragma unroll
    for (int i = 0; i < 16; ++i) comb[i] = c[i / 4][i % 4];
}

// Write what `leave_and_mix` wants of a token: gates, and the doubly stochastic comb (n, n), softmax
// of rows, then `balance`. One warp, when partials have been added up.
__device__ inline void write_mix(float *mix, const Site &site, Entry &entry, i64 iterations) {
    int lane = threadIdx.x % 32, n = (int)site.n;
    float factor = factor_of(site, entry.parts), *raw = entry.raw;
    const float *base = site.base + 2 * n;
    if (lane < n)
        mix[lane] = 2.0f * gate(total(entry.parts, n + lane) * factor, site.scale[1], site.base[n + lane]);
    for (int i = lane; i < n * n; i += 32)
        raw[i] = total(entry.parts, 2 * n + i) * factor * site.scale[2] + base[i];
    __syncwarp();
    float own[2] = {};  // of at most 64
    for (int i = lane, at = 0; i < n * n; i += 32, ++at) {
        float largest = -INFINITE, sum = 0.0f;
        for (int k = 0; k < n; ++k) largest = fmaxf(largest, raw[i / n * n + k]);
        for (int k = 0; k < n; ++k) sum += exp_as_cpu(raw[i / n * n + k] - largest);
        float share = __fdiv_rn(exp_as_cpu(raw[i] - largest), sum) + site.hc_eps;
        at == 0 ? own[0] = share : own[1] = share;
    }
    __syncwarp();
    if (lane < n * n) raw[lane] = own[0];
    if (lane + 32 < n * n) raw[lane + 32] = own[1];
    __syncwarp();
    if (lane == 0 && n == 4)
        balance_four(raw, iterations, site.hc_eps);
    else if (lane == 0)
        balance(raw, n, iterations, site.hc_eps);
    __syncwarp();
    for (int i = lane; i < n * n; i += 32) mix[n + i] = raw[i];
}

// Words: partials, scale (3), base, iterations, hc_eps, streams, weight, rms_eps, x, its stride,
// mix, q, d, b, tokens, n, hidden, 1 for scales that are powers of two.
__device__ inline Site site_of(const Words &op) {
    i64 n = op.number(16);
    return {op.address<float>(1), op.address<float>(2), op.address<float>(3), op.address<float>(6),
            op.address<float>(7), op.real(5), op.real(8), op.address<float>(9), op.number(10), 2 * n + n * n,
            op.number(15), n, op.number(17), {op.address<i8>(12), op.address<float>(13), op.address<int>(14), op.number(18) != 0}};
}

// 1024 threads; one or several blocks a token: all of them read all of the streams, each writes a
// part of x.
EARLY_KERNEL(__launch_bounds__(1024), enter) {
    DYNAMIC_SHARED(memory);
    __shared__ Entry entry;
    write_x(site_of(op), entry, (float *)memory);
}

// The rest of `enter`, which nobody waits for before the block's output joins the streams: the mix.
// ADDERS warps a token.
KERNEL(enter_mix) {
    __shared__ Entry entry;
    i64 token = op.block();
    Site site = site_of(op);
    add_partials(site, token, entry.parts);
    __syncthreads();
    if (threadIdx.x < 32) write_mix(op.address<float>(11) + (site.n + site.n * site.n) * token, site, entry, op.number(4));
}

// Words: partials, scale (1), base, hc_eps, streams, weight, rms_eps, x, its stride, q, d, b,
// tokens, n, hidden. 1024 threads; blocks as for `enter`.
EARLY_KERNEL(__launch_bounds__(1024), enter_head) {
    DYNAMIC_SHARED(memory);
    __shared__ Entry entry;
    i64 n = op.number(14);
    Site site = {op.address<float>(1), op.address<float>(2), op.address<float>(3), op.address<float>(5),
                 op.address<float>(6), op.real(4), op.real(7), op.address<float>(8), op.number(9), n,
                 op.number(13), n, op.number(15), {op.address<i8>(10), op.address<float>(11), op.address<int>(12)}};
    write_x(site, entry, (float *)memory);
}
