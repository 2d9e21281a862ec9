// Keys on their way into the state: twins of localv4/kernels/pooling.py, and of `angles` and `key`
// of rows.py.

#include "activations.cuh"
#include "index_forms.cuh"
#include "row_forms.cuh"

constexpr int POOL_THREADS = 256;

// --- what keys share ---

// Not inlined: doubles take registers that the rest needs.
__device__ __noinline__ void write_angle(float *cos_out, float *sin_out, i64 position, float frequency) {
    double angle = (double)__fmul_rn((float)position, frequency);
    *cos_out = (float)cos(angle), *sin_out = (float)sin(angle);
}

// Write two neighbouring channels, normed and turned; a pair behind all that turn has cos = 1, sin = 0.
__device__ inline void write_pair(float *out, float2 x, float2 weight, float factor, float c, float s, bool turns) {
    float even = __fmul_rn(weight.x, __fmul_rn(x.x, factor)), odd = __fmul_rn(weight.y, __fmul_rn(x.y, factor));
    out[0] = turns ? even * c - odd * s : even;
    out[1] = turns ? even * s + odd * c : odd;
}

__device__ inline float2 two(const float *x) { return make_float2(x[0], x[1]); }

// Words: frequencies, pairs, cos, sin (tokens, pairs), context, tokens.
KERNEL(angles) {
    i64 pairs = op.number(2), i = op.block() * (i64)blockDim.x + threadIdx.x;
    if (i >= pairs * op.number(6)) return;
    write_angle(op.address<float>(3) + i, op.address<float>(4) + i, op.at(5) + i / pairs, op.address<float>(1)[i % pairs]);
}

// Words: x, its row stride, weight, eps, cos, sin, pairs, cell of the ring, capacity, columns,
// context, tokens. 256 threads a token; each asks for what its first pair wants before the norm is known.
EARLY_KERNEL(, key) {
    __shared__ float parts[32];
    i64 token = op.block(), pairs = op.number(7), cols = op.number(10), first = min((i64)threadIdx.x, cols / 2 - 1);
    const float *x = op.address<float>(1) + op.number(2) * token, *weights = op.address<float>(3);
    float *out = op.cell<float>(8) + cols * ((op.at(11) + token) % op.number(9));
    float2 weight = two(weights + 2 * first);
    wait_for_results();
    auto angle = [&](int word, i64 i, float otherwise) {
        i64 turn = i - (cols / 2 - pairs);
        return turn < 0 ? otherwise : op.address<float>(word)[token * pairs + turn];
    };
    float c = angle(5, first, 1.0f), s = angle(6, first, 0.0f), squares = 0.0f;
    float2 pair = two(x + 2 * first);
    for (i64 i = threadIdx.x; i < cols; i += blockDim.x) squares += x[i] * x[i];
    float factor = inverse_size(block_sum(squares, parts), cols, op.real(4));
    for (i64 i = threadIdx.x; i < cols / 2; i += blockDim.x) {
        if (i != first)
            pair = two(x + 2 * i), weight = two(weights + 2 * i), c = angle(5, i, 1.0f), s = angle(6, i, 0.0f);
        write_pair(out + 2 * i, pair, weight, factor, c, s, i >= cols / 2 - pairs);
    }
}

// Words: keys, gates, their row stride, ape, ratio, cell of the keys' ring, cell of the gates' ring,
// capacity, width, context, tokens.
KERNEL(append) {
    i64 width = op.number(9), i = op.block() * (i64)blockDim.x + threadIdx.x;
    if (i >= width * op.number(11)) return;
    i64 token = i / width, column = i % width, position = op.at(10) + token;
    i64 from = op.number(3) * token + column, to = width * (position % op.number(8)) + column;
    op.cell<float>(6)[to] = op.address<float>(1)[from];
    op.cell<float>(7)[to] = op.address<float>(2)[from] + op.address<float>(4)[width * (position % op.number(5)) + column];
}

// --- entries ---

// The window of an entry in the rings.
struct Window {
    const float *keys, *gates;
    i64 first, capacity, width;
    int n, previous, slots;

    __device__ Window(const Words &op, i64 number) {
        keys = op.cell<float>(1), gates = op.cell<float>(2);
        capacity = op.number(3), width = op.number(4);
        i64 ratio = op.number(5);
        n = (int)op.number(11);
        previous = width > n && number > 0 ? (int)ratio : 0;
        slots = previous + (int)ratio;
        first = (number * ratio - previous) % capacity;
    }

    // Where a channel of a slot is.
    __device__ inline i64 at(int slot, int channel) const {
        i64 place = first + slot;
        place -= place >= capacity ? capacity : 0;
        return width * place + (slot < previous ? channel : width - n + channel);
    }
};

// row = sum over the slots of softmax(gate) * key, per channel. Threads take channels in turn, or
// share those of few.
__device__ inline void pool_window(const Window &window, float *row, float *parts, float *weights) {
    int width = min(window.n, (int)blockDim.x), ways = blockDim.x / width, way = threadIdx.x / width;
    for (int first = 0; first < window.n; first += width) {
        int channel = first + threadIdx.x % width, own = threadIdx.x % width;
        int start = way < ways && channel < window.n ? way : window.slots;
        float largest = -INFINITE, total = 0.0f, sum = 0.0f;
#pragma unroll 16
        for (int i = start; i < window.slots; i += ways) {
            float gate = window.gates[window.at(i, channel)];
            largest = largest > gate ? largest : gate;
        }
        parts[threadIdx.x] = largest;
        __syncthreads();
        for (int i = 0; i < ways; ++i) {
            float other = parts[i * width + own];
            largest = largest > other ? largest : other;
        }
        __syncthreads();
#pragma unroll 16
        for (int i = start; i < window.slots; i += ways) {
            i64 at = window.at(i, channel);
            float weight = exp_as_cpu(window.gates[at] - largest);
            total += weight;
            sum = __fmaf_rn(weight, window.keys[at], sum);
        }
        parts[threadIdx.x] = sum, weights[threadIdx.x] = total;
        __syncthreads();
        if (way == 0 && channel < window.n) {
            for (int i = 1; i < ways; ++i) {
                sum += parts[i * width + own];
                total += weights[i * width + own];
            }
            row[channel] = __fdiv_rn(sum, total);
        }
        __syncthreads();
    }
}

template <typename Form>
__device__ inline void pool(const Words &op) {
    __shared__ float row[MOST_CHANNELS], parts[POOL_THREADS], weights[POOL_THREADS];
    i64 ratio = op.number(5), pairs = op.number(9), position = op.at(12);
    i64 number = position / ratio + op.block();
    int n = (int)op.number(11), rope = 2 * (int)pairs;
    if (number >= (position + op.number(13)) / ratio) return;
    pool_window(Window(op, number), row, parts, weights);
    float squares = 0.0f;
    for (int c = threadIdx.x; c < n; c += blockDim.x) squares += row[c] * row[c];
    float factor = inverse_size(block_sum(squares, parts), n, op.real(7));
    for (int i = threadIdx.x; i < n / 2; i += blockDim.x) {
        int turn = i - (n / 2 - (int)pairs);
        float c = 1.0f, s = 0.0f;
        if (turn >= 0) write_angle(&c, &s, number * ratio, op.address<float>(8)[turn]);
        write_pair(row + 2 * i, two(row + 2 * i), two(op.address<float>(6) + 2 * i), factor, c, s, turn >= 0);
    }
    __syncthreads();
    Form::write(op.cell<u8>(10) + Form::stride(n, rope) * number, row, n, rope);
}

// Words: cell of the keys' ring, cell of the gates' ring, capacity, width, ratio, weight, eps,
// frequencies, pairs, cell of the entries, n, context, tokens. POOL_THREADS an entry.
KERNEL(f32_pool) { pool<F32Rows>(op); }
KERNEL(bf16_pool) { pool<Bf16Rows>(op); }
KERNEL(compact_pool) { pool<E4m3Rows>(op); }
KERNEL(compact_index_pool) { pool<E2m1Rows>(op); }
