// Products of float weights with many tokens: twins of `float_operations.share_float_gemm`.
//
// Tensor cores multiply bfloat16, which the weights of B16 are and those of F8 become, value for
// value. A float32 is taken as the sum of two bfloat16, 2^-18 of it off at most: activations, and the
// weights of F32R. Sums inside of tensor cores are cut off, not rounded; so they run over a span of
// 128 columns, which is then added to the sums of the rows as on the CPU (localv4/kernels/float_rows.py).
//
// Tiles, stages and the choice of elements are as in gemm.cuh, but of a step of sixteen columns a
// thread gives columns 4 * member ... + 3, two pairs of bfloat16.

#include "gemm.cuh"

constexpr int SPAN = 128, STEP = 16;

// Whether there are tensor cores for bfloat16.
#if defined(LOCALV4_HOST) || __CUDA_ARCH__ >= 800
constexpr bool HAS_BF16 = true;
#else
constexpr bool HAS_BF16 = false;
#endif

// --- numbers ---

// Two floats as bfloat16, the first one in the lower half.
__device__ inline u32 to_bf16(float first, float second) {
#if defined(LOCALV4_HOST) || __CUDA_ARCH__ < 800
    u32 result = 0;
    for (int i = 0; i < 2; ++i) {
        u32 bits = (u32)__float_as_int(i ? second : first);
        bool is_nan = (bits & 0x7FFFFFFF) > 0x7F800000;
        u32 rounded = is_nan ? 0x7FFF : (bits + 0x7FFF + (bits >> 16 & 1)) >> 16;
        result |= rounded << (16 * i);
    }
    return result;
#else
    u32 result;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(result) : "f"(second), "f"(first));
    return result;
#endif
}

// Two floats as sums of two bfloat16 each.
__device__ inline void split(float first, float second, u32 &high, u32 &low) {
    high = to_bf16(first, second);
    low = to_bf16(first - __int_as_float((int)(high << 16)), second - __int_as_float((int)(high & 0xFFFF0000)));
}

// Two E4M3 codes, each in the upper byte of a half, as bfloat16 of the same value. As they are, moved
// to where bfloat16 has them, they would be 2^-120 of it.
__device__ inline u32 e4m3_to_bf16(u32 codes) {
    u32 small = (codes & 0x80008000) | (codes >> 4 & 0x07F007F0);
#if defined(LOCALV4_HOST) || __CUDA_ARCH__ < 800
    const float unit = __int_as_float((127 + 120) << 23);
    return to_bf16(__int_as_float((int)(small << 16)) * unit, __int_as_float((int)(small & 0xFFFF0000)) * unit);
#else
    u32 result;
    asm("fma.rn.bf16x2 %0, %1, %2, %3;" : "=r"(result) : "r"(small), "r"(0x7B807B80), "r"(0x80008000));
    return result;
#endif
}

// --- formats (localv4/kernels/packing_floats.py) ---
//
// A format reads a step of a group. In shared memory columns 4 * i + j of a step are at 4 * j + i, so
// that the threads of a warp read neighbours.

// A column of a group has BYTES; a `Pair` are the values of two rows, and a weight consists of TERMS
// bfloat16. `Own` joins the pairs of two columns to those of the first and of the second row.
template <class Own, class Pair, int TERMS_, bool has_scales>
struct FloatFormat {
    static constexpr int BYTES = GROUP_ROWS / 2 * (int)sizeof(Pair), TERMS = TERMS_;
    static constexpr bool HAS_SCALES = has_scales;

    __device__ static void load(u32 (&a)[TERMS][4], const u8 *w, Place own) {
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            const Pair *column = (const Pair *)(w + BYTES * (8 * half + own.member)) + own.group;
            u32 rows[TERMS][2];
            Own::join(rows, column[0], column[4 * GROUP_ROWS / 2]);
#pragma unroll
            for (int term = 0; term < TERMS; ++term)
                a[term][2 * half] = rows[term][0], a[term][2 * half + 1] = rows[term][1];
        }
    }
};

struct B16 : FloatFormat<B16, u32, 1, false> {
    __device__ static void join(u32 (&rows)[1][2], u32 first, u32 second) {
        rows[0][0] = permute_bytes(first, second, 0x5410);
        rows[0][1] = permute_bytes(first, second, 0x7632);
    }

    __device__ static float value(const u8 *column, int row) {
        return __int_as_float((int)((u32)*(const u16 *)(column + 2 * row) << 16));
    }
};

struct F8 : FloatFormat<F8, u16, 1, true> {
    __device__ static void join(u32 (&rows)[1][2], u16 first, u16 second) {
        rows[0][0] = e4m3_to_bf16(permute_bytes(first, second, 0x4202));
        rows[0][1] = e4m3_to_bf16(permute_bytes(first, second, 0x5212));
    }

    __device__ static float value(const u8 *column, int row) {
        return __int_as_float((int)(e4m3_to_bf16((u32)column[row] << 8) << 16));
    }
};

struct F32R : FloatFormat<F32R, float2, 2, false> {
    __device__ static void join(u32 (&rows)[2][2], const float2 &first, const float2 &second) {
        split(first.x, second.x, rows[0][0], rows[1][0]);
        split(first.y, second.y, rows[0][1], rows[1][1]);
    }

    __device__ static float value(const u8 *column, int row) { return *(const float *)(column + 4 * row); }
};

// --- activations ---

// What a thread needs of a token in a step of sixteen columns: its four values as sums of two bfloat16.
struct alignas(16) SplitColumns {
    u32 high[2], low[2];
};

__device__ inline SplitColumns split_columns(const float4 &x) {
    SplitColumns result;
    split(x.x, x.y, result.high[0], result.low[0]);
    split(x.z, x.w, result.high[1], result.low[1]);
    return result;
}

// Split all activations once, as many threads will need them; their place is as large as they are.
// Words: those of the product; SCRATCH.
constexpr int SPLIT_THREADS = 256;

extern "C" __global__ void split_activations(const Words op) {
    i64 quads = op.number(3) / 4, all = op.number(7) * quads;
    SplitColumns *out = op.address<SplitColumns>(SCRATCH);
    for (i64 i = blockIdx.x * (i64)SPLIT_THREADS + threadIdx.x; i < all; i += (i64)gridDim.x * SPLIT_THREADS) {
        const float *x = op.address<const float>(4) + i / quads * op.number(6) + i % quads * 4;
        out[i] = split_columns(*(const float4 *)x);
    }
}

// --- tiles ---

// As `Tile`, with stages of `columns` columns. Where there are many tokens, their activations
// ARE_SPLIT already.
template <class Format_, int groups, int eights, int warps, int stages, int columns>
struct FloatTile {
    typedef Format_ Format;
    static constexpr bool ARE_SPLIT = eights > 2;
    static constexpr int GROUPS_OF_WARP = groups, EIGHTS = eights, STAGES = stages, COLUMNS = columns;
    static constexpr int THREADS = 32 * warps, GROUPS = groups * warps, TOKENS = 8 * eights;
    static constexpr int GROUP = COLUMNS * Format::BYTES, ROW = 4 * COLUMNS + 64;  // bytes; apart in banks
    static constexpr int X = GROUPS * GROUP, STAGE = X + TOKENS * ROW, SHARED = STAGES * STAGE;
    typedef float Sums[groups][eights][4];
};

// What is multiplied: `groups` groups from w on, with `count` rows of activations.
struct FloatFactors {
    const u8 *w;
    const float *x, *scale;
    i64 stride;
    int groups, count, cols;
};

// Where a column of a stage is in shared memory.
__device__ inline int place_of_column(int column) {
    return column / STEP * STEP + column % 4 * 4 + column % STEP / 4;
}

// The copies of a thread, from stage to stage: a warp copies its own groups, and all together the
// activations.
template <class Shape>
struct FloatCopies {
    static constexpr int BYTES = Shape::Format::BYTES, CHUNKS = BYTES / 16, AT_ONCE = 32 / CHUNKS;
    static constexpr int X_CHUNKS = Shape::COLUMNS / 4, X_STEP = Shape::THREADS / X_CHUNKS;
    const u8 *w;
    const float *x;
    i64 group_bytes, x_step;
    int groups, tokens, column, x_column, left;
    SharedPlace to_w, to_x;

    __device__ FloatCopies(const FloatFactors &f, u8 *shared) {
        int lane = threadIdx.x % 32, first = threadIdx.x / 32 * Shape::GROUPS_OF_WARP, token = threadIdx.x / X_CHUNKS;
        column = lane / CHUNKS, x_column = threadIdx.x % X_CHUNKS * 4, left = f.cols;
        groups = f.groups - first, tokens = min(f.count, Shape::TOKENS) - token;
        group_bytes = (i64)f.cols * BYTES, x_step = X_STEP * f.stride;
        w = f.w + first * group_bytes + 16 * lane;
        x = f.x + token * f.stride + x_column;
        to_w = place_of(shared) + first * Shape::GROUP + place_of_column(column) * BYTES + 16 * (lane % CHUNKS);
        to_x = place_of(shared) + Shape::X + token * Shape::ROW + 4 * x_column;
    }

    // Start the copies of the next stage, as far as there are columns, to a place in the ring.
    __device__ void start(int to) {
#pragma unroll
        for (int m = 0; m < Shape::GROUPS_OF_WARP; ++m)
#pragma unroll
            for (int k = 0; AT_ONCE * k < Shape::COLUMNS; ++k)
                if (m < groups && column + AT_ONCE * k < left)
                    copy_line(to_w + to + m * Shape::GROUP + place_of_column(AT_ONCE * k) * BYTES, w + m * group_bytes + 512 * k);
#pragma unroll
        for (int k = 0; k * X_STEP < Shape::TOKENS; ++k)
            if (k * X_STEP < tokens && x_column < left)
                copy_line(to_x + to + k * X_STEP * Shape::ROW, (const u8 *)(x + k * x_step));
        w += Shape::COLUMNS * BYTES, x += Shape::COLUMNS, left -= Shape::COLUMNS;
    }
};

// Add the products of sixteen columns; w and x are where they start in shared memory.
template <class Shape>
__device__ inline void add_step(typename Shape::Sums &part, const u8 *w, const u8 *x, Place own) {
    typedef typename Shape::Format Format;
    u32 a[Shape::GROUPS_OF_WARP][Format::TERMS][4];
#pragma unroll
    for (int m = 0; m < Shape::GROUPS_OF_WARP; ++m) Format::load(a[m], w + m * Shape::GROUP, own);
#pragma unroll
    for (int n = 0; n < Shape::EIGHTS; ++n) {
        const u8 *stored = x + (8 * n + own.group) * Shape::ROW + 16 * own.member;
        SplitColumns b = Shape::ARE_SPLIT ? *(const SplitColumns *)stored : split_columns(*(const float4 *)stored);
#pragma unroll
        for (int m = 0; m < Shape::GROUPS_OF_WARP; ++m) {
            mma_bf16(part[m][n], a[m][0], b.high, part[m][n]);
            mma_bf16(part[m][n], a[m][0], b.low, part[m][n]);
            if (Format::TERMS == 2) mma_bf16(part[m][n], a[m][Format::TERMS - 1], b.high, part[m][n]);
        }
    }
}

template <class Shape>
__device__ inline void clear(typename Shape::Sums &sums) {
#pragma unroll
    for (int m = 0; m < Shape::GROUPS_OF_WARP; ++m)
#pragma unroll
        for (int n = 0; n < Shape::EIGHTS; ++n)
#pragma unroll
            for (int i = 0; i < 4; ++i) sums[m][n][i] = 0.0f;
}

// sums += the sums of a span * its scale
template <class Shape>
__device__ inline void flush(typename Shape::Sums &sums, typename Shape::Sums &part, float scale) {
#pragma unroll
    for (int m = 0; m < Shape::GROUPS_OF_WARP; ++m)
#pragma unroll
        for (int n = 0; n < Shape::EIGHTS; ++n)
#pragma unroll
            for (int i = 0; i < 4; ++i) sums[m][n][i] = __fmaf_rn(part[m][n][i], scale, sums[m][n][i]);
    clear<Shape>(part);
}

template <class Shape>
__device__ inline void multiply_floats(typename Shape::Sums &sums, const FloatFactors &f, u8 *shared) {
    constexpr int AHEAD = Shape::STAGES - 1, END = Shape::STAGES * Shape::STAGE;
    Place own = own_place();
    FloatCopies<Shape> copies(f, shared);
    int warp_w = threadIdx.x / 32 * Shape::GROUPS_OF_WARP * Shape::GROUP;
    typename Shape::Sums part;
    clear<Shape>(sums);
    clear<Shape>(part);
#pragma unroll
    for (int stage = 0; stage < AHEAD; ++stage) {
        copies.start(stage * Shape::STAGE);
        commit_copies();
    }
    int from = 0, to = AHEAD * Shape::STAGE;
    for (int start = 0; start < f.cols; start += Shape::COLUMNS) {
        float scale = Shape::Format::HAS_SCALES ? f.scale[start / SPAN] : 1.0f;
        wait_for_copies<AHEAD - 1>();
        __syncthreads();
        copies.start(to);
        commit_copies();
        const u8 *w = shared + from + warp_w, *x = shared + from + Shape::X;
        if (start + Shape::COLUMNS <= f.cols) {
#pragma unroll (Shape::EIGHTS > 2 ? 1 : Shape::COLUMNS / STEP)
            for (int step = 0; step < Shape::COLUMNS; step += STEP)
                add_step<Shape>(part, w + step * Shape::Format::BYTES, x + 4 * step, own);
        } else {
#pragma unroll 1
            for (int step = 0; start + step < f.cols; step += STEP)
                add_step<Shape>(part, w + step * Shape::Format::BYTES, x + 4 * step, own);
        }
        if ((start + Shape::COLUMNS) % SPAN == 0 || start + Shape::COLUMNS >= f.cols) flush<Shape>(sums, part, scale);
        from = from + Shape::STAGE == END ? 0 : from + Shape::STAGE;
        to = to + Shape::STAGE == END ? 0 : to + Shape::STAGE;
    }
}

template <class Shape>
__device__ inline void store_floats(const typename Shape::Sums &sums, const FloatFactors &f, u8 *out, i64 stride) {
    Place own = own_place();
#pragma unroll
    for (int m = 0; m < Shape::GROUPS_OF_WARP; ++m) {
        int group = threadIdx.x / 32 * Shape::GROUPS_OF_WARP + m;
        if (group >= f.groups) continue;
#pragma unroll
        for (int n = 0; n < Shape::EIGHTS; ++n)
#pragma unroll
            for (int i = 0; i < 2; ++i) {
                int token = 8 * n + 2 * own.member + i;
                if (token >= f.count) continue;
                float2 both = {sums[m][n][i], sums[m][n][2 + i]};
                *(float2 *)(out + token * stride + 4 * (GROUP_ROWS * group + 2 * own.group)) = both;
            }
    }
}

// The same without tensor cores for bfloat16: one row and token after the other.
template <class Shape>
__device__ inline void multiply_plainly(const FloatFactors &f, u8 *out, i64 stride) {
    typedef typename Shape::Format Format;
    int rows = GROUP_ROWS * min(Shape::GROUPS, f.groups), tokens = min(Shape::TOKENS, f.count);
    for (int i = threadIdx.x; i < rows * tokens; i += Shape::THREADS) {
        int row = i % rows, token = i / rows;
        const u8 *w = f.w + (i64)(row / GROUP_ROWS) * f.cols * Format::BYTES;
        float sum = 0.0f;
        for (int start = 0; start < f.cols; start += SPAN) {
            float part = 0.0f;
            for (int k = start; k < min(start + SPAN, f.cols); ++k)
                part = __fmaf_rn(Format::value(w + (i64)k * Format::BYTES, row % GROUP_ROWS), f.x[token * f.stride + k], part);
            sum = __fmaf_rn(part, Format::HAS_SCALES ? f.scale[start / SPAN] : 1.0f, sum);
        }
        *(float *)(out + token * stride + 4 * row) = sum;
    }
}

// Words: matrix, row groups, columns, x, scales, x row stride in floats, tokens, out, its row stride
// in bytes.
template <class Shape>
__device__ inline void float_gemm(const Words &op, u8 *shared) {
    typedef typename Shape::Format Format;
    static_assert(SPAN % (GROUP_ROWS * Shape::GROUPS_OF_WARP) == 0, "a warp needs one scale");
    i64 groups = op.number(2), cols = op.number(3), tokens = op.number(7), stride = op.number(9);
    i64 tiles = (tokens + Shape::TOKENS - 1) / Shape::TOKENS;
    i64 group = blockIdx.x / tiles * Shape::GROUPS, token = blockIdx.x % tiles * Shape::TOKENS;
    i64 own_group = group + threadIdx.x / 32 * Shape::GROUPS_OF_WARP;
    // those that are split lie close together
    constexpr bool TAKES_SPLIT = Shape::ARE_SPLIT && HAS_BF16;
    i64 x_stride = TAKES_SPLIT ? cols : op.number(6);
    FloatFactors f = {op.address<const u8>(1) + group * cols * Format::BYTES,
                      op.address<const float>(TAKES_SPLIT ? SCRATCH : 4) + token * x_stride,
                      op.address<const float>(5) + min(own_group, groups - 1) * GROUP_ROWS / SPAN * (cols / SPAN),
                      x_stride, (int)(groups - group), (int)(tokens - token), (int)cols};
    u8 *out = op.address<u8>(8) + token * stride + 4 * GROUP_ROWS * group;
#if !defined(LOCALV4_HOST) && __CUDA_ARCH__ < 800
    f.scale = op.address<const float>(5) + group * GROUP_ROWS / SPAN * (cols / SPAN);
    multiply_plainly<Shape>(f, out, stride);
#else
    typename Shape::Sums sums;
    multiply_floats<Shape>(sums, f, shared);
    store_floats<Shape>(sums, f, out, stride);
#endif
}

// As in gemm.cuh.
#define FLOAT_GEMM(name, Format, groups, eights, warps, stages, columns, blocks)            \
    extern "C" __global__ void __launch_bounds__(32 * warps, blocks)                        \
    name(const Words op) {                                                                  \
        DYNAMIC_SHARED(shared);                                                             \
        float_gemm<FloatTile<Format, groups, eights, warps, stages, columns>>(op, shared);  \
    }

#define FLOAT_GEMMS(prefix, Format, columns)                    \
    FLOAT_GEMM(prefix##_gemm_8, Format, 1, 1, 2, 3, columns, 4)   \
    FLOAT_GEMM(prefix##_gemm_16, Format, 1, 2, 2, 3, columns, 4)  \
    FLOAT_GEMM(prefix##_gemm_32, Format, 1, 4, 4, 3, 32, 4)       \
    FLOAT_GEMM(prefix##_gemm_64, Format, 2, 8, 4, 3, 32, 2)

FLOAT_GEMMS(b16, B16, 128)
FLOAT_GEMMS(f8, F8, 128)
FLOAT_GEMMS(f32r, F32R, 64)
