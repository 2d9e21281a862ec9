// A packed matrix of floats times one token: twins of `*_matvec` in localv4/kernels/float_operations.py.
//
// Weights are exact, sums are float32 in an order of their own, always the same one.

#include "packed_floats.cuh"

// Add up the values of the lanes of a warp that have the same rows: all lanes but the neighbours
// closer than SMALLEST. A lane gives half of its sums away for the other half of those of its
// partner, as long as there are two: at last it has one, of row `first`, and so has its last partner.
template <int ROWS, int DISTANCE, int SMALLEST>
struct LaneSums {
    __device__ static inline void add(float *values, int &first) {
        constexpr int HALF = ROWS / 2;
        bool upper = (threadIdx.x & DISTANCE) != 0;
#pragma unroll
        for (int i = 0; i < HALF; ++i) {
            float kept = upper ? values[HALF + i] : values[i], given = upper ? values[i] : values[HALF + i];
            values[i] = kept + __shfl_xor_sync(0xffffffffu, given, DISTANCE);
        }
        first += upper ? HALF : 0;
        if constexpr (DISTANCE / 2 >= SMALLEST) LaneSums<HALF, DISTANCE / 2, SMALLEST>::add(values, first);
    }
};

template <int DISTANCE, int SMALLEST>
struct LaneSums<1, DISTANCE, SMALLEST> {
    __device__ static inline void add(float *values, int &first) {
        values[0] += __shfl_xor_sync(0xffffffffu, values[0], DISTANCE);
        if constexpr (DISTANCE / 2 >= SMALLEST) LaneSums<1, DISTANCE / 2, SMALLEST>::add(values, first);
    }
};

// Words: matrix, row groups, columns, x, scales of F8, (unused), out. A block of threads computes a
// group of sixteen rows; PARTS lanes share a column, TOGETHER loads of 16 bytes are on their way.
template <class Format, int THREADS, int TOGETHER>
__device__ inline void matvec(const Words &op) {
    constexpr int ROWS = Format::ROWS, PARTS = 16 / ROWS, STEP = THREADS / PARTS, WARPS = THREADS / 32;
    constexpr int BYTES = 16 * PARTS;  // of a column
    __shared__ float sums[WARPS * 16];
    i64 group = op.block();
    int cols = (int)op.number(3), start = threadIdx.x / PARTS;
    const u8 *weights = op.address<u8>(1) + (group * cols + start) * BYTES + 16 * (threadIdx.x % PARTS);
    const float *x = op.address<float>(4) + start;
    const float *scales = op.address<float>(5) + group * 16 / F8_SPAN * (cols / F8_SPAN) + start / F8_SPAN;
    float totals[ROWS] = {};
    while (start < cols) {
        uint4 stored[TOGETHER];
        float factors[TOGETHER], spans[TOGETHER];
#pragma unroll
        for (int i = 0; i < TOGETHER; ++i) {
            bool exists = start + i * STEP < cols;
            stored[i] = exists ? load_stream(weights + i * STEP * BYTES) : make_uint4(0, 0, 0, 0);
            spans[i] = Format::SCALED && exists ? load_input(scales + i * STEP / F8_SPAN) : 1.0f;
        }
        wait_for_results();  // of other kernels: activations
#pragma unroll
        for (int i = 0; i < TOGETHER; ++i) factors[i] = start + i * STEP < cols ? load_input(x + i * STEP) : 0.0f;
#pragma unroll
        for (int i = 0; i < TOGETHER; ++i) {
            float values[ROWS], factor = factors[i];
            if (Format::SCALED) factor *= spans[i] * Format::UNIT;
            Format::decode(stored[i], values);
#pragma unroll
            for (int row = 0; row < ROWS; ++row) totals[row] = __fmaf_rn(values[row], factor, totals[row]);
        }
        start += TOGETHER * STEP;
        weights += TOGETHER * STEP * BYTES;
        x += TOGETHER * STEP;
        scales += TOGETHER * STEP / F8_SPAN;
    }
    int first = ROWS * (threadIdx.x % PARTS), lane = threadIdx.x % 32;
    LaneSums<ROWS, 16, PARTS>::add(totals, first);
    if (lane / PARTS % 2 == 0) sums[threadIdx.x / 32 * 16 + first] = totals[0];
    __syncthreads();
    if (threadIdx.x >= 16) return;
    float total = 0.0f;
    for (int warp = 0; warp < WARPS; ++warp) total += sums[warp * 16 + threadIdx.x];
    op.address<float>(7)[group * 16 + threadIdx.x] = total;
}

// By the number of row groups and columns (twins/float_products.py): all registers of a
// multiprocessor hold loads on their way, whether its threads are those of a few groups or of many.
#define FLOAT_MATVEC(name, Format)                                                                \
    FLOAT_MATVEC_OF(name##_matvec, Format, 256, 8, 3)                                             \
    FLOAT_MATVEC_OF(name##_matvec_short, Format, 128, 8, 8)                                       \
    FLOAT_MATVEC_OF(name##_matvec_some, Format, 512, 8, 2)                                        \
    FLOAT_MATVEC_OF(name##_matvec_few, Format, 1024, 4, 1)

#define FLOAT_MATVEC_OF(name, Format, threads, together, most)                                    \
    EARLY_KERNEL(__launch_bounds__(threads, most), name) {                                      \
        matvec<Format, threads, together>(op);                                                    \
    }

FLOAT_MATVEC(f8, F8)
FLOAT_MATVEC(b16, B16)
FLOAT_MATVEC(f32r, F32R)
