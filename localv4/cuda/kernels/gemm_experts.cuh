// Products of many tokens with experts: twins of `many_tokens.share_experts_gate_up` and `_down`.
//
// Tokens are sorted by expert: rows starts[e] ... starts[e + 1] - 1 of the activations (slots) are
// those of expert e. Only the device knows how many there are, so blocks of threads go through the
// list of tiles with a stride. Tiles that share weights follow one another. The last tile of an
// expert has a shape for the number of tokens that are left.

#pragma once

#include "activations.cuh"
#include "gemm.cuh"

// The shapes of the tiles of experts, for the same rows and 8 * `eights` tokens or fewer.
template <class Format_, int eights, int warps, int many_stages, int few_stages>
struct ExpertTiles {
    typedef Format_ Format;
    typedef Tile<Format, 2, eights, warps, many_stages> Large;
    typedef Tile<Format, 2, eights == 8 ? 6 : eights, warps, many_stages> Most;
    typedef Tile<Format, 2, eights / 2, warps, many_stages> Medium;
    typedef Tile<Format, 2, eights / 4, warps, few_stages> Small;
    typedef Tile<Format, 2, 1, warps, few_stages> Smallest;
    static constexpr int SHARED = Large::SHARED;
    static_assert(Medium::SHARED <= SHARED && Small::SHARED <= SHARED && Smallest::SHARED <= SHARED,
                  "one size of shared memory for all");
};

// The list of tiles: before[e] is the number of tiles of the experts before e, for each panel of
// rows. To be called by all threads.
struct Plan {
    const i64 *starts;
    const int *before;
    int experts, panels;

    __device__ int tiles() const { return before[experts] * panels; }
};

template <int TOKENS>
__device__ inline Plan make_plan(const i64 *starts, int experts, int panels, int *before) {
    if (threadIdx.x < 32) {
        int sum = 0, lane = threadIdx.x;
        for (int first = 0; first < experts; first += 32) {
            int expert = first + lane, count = 0;
            if (expert < experts) count = (int)((starts[expert + 1] - starts[expert] + TOKENS - 1) / TOKENS);
            for (int distance = 1; distance < 32; distance *= 2) {
                int other = __shfl_up_sync(0xffffffffu, count, distance);
                if (lane >= distance) count += other;
            }
            if (expert < experts) before[expert + 1] = sum + count;
            sum += __shfl_sync(0xffffffffu, count, 31);
        }
        if (lane == 0) before[0] = 0;
    }
    __syncthreads();
    return {starts, before, experts, panels};
}

// A tile of the list: `count` slots from `slot` on, and a panel of the matrix of `expert`.
struct ExpertTile {
    int expert, panel;
    i64 slot;
    int count;
};

template <int TOKENS>
__device__ inline ExpertTile find_tile(const Plan &plan, int number) {
    int low = 0, high = plan.experts;  // before[low] * panels <= number < before[high] * panels
    while (high - low > 1) {
        int middle = (low + high) / 2;
        if (plan.before[middle] * plan.panels <= number) low = middle;
        else high = middle;
    }
    int tiles = plan.before[low + 1] - plan.before[low], own = number - plan.before[low] * plan.panels;
    i64 slot = plan.starts[low] + (i64)(own % tiles) * TOKENS, left = plan.starts[low + 1] - slot;
    return {low, own / tiles, slot, (int)(left < TOKENS ? left : TOKENS)};
}

// The factors of a tile; `matrix` is that of its expert.
template <class Shape>
__device__ inline Factors factors_of(const ExpertTile &tile, const u8 *matrix, i64 groups, i64 cols,
                                     const Rounded &x) {
    return Factors::of<typename Shape::Format>(matrix, (i64)tile.panel * Shape::GROUPS, groups, cols,
                                               (const u8 *)x.q, (const u8 *)x.d, (const u8 *)x.b,
                                               tile.slot, tile.slot + tile.count);
}

// Call use.tile<Shape>(tile) for each tile of a block of threads, with the shape that suits it.
template <class Tiles, class Use>
__device__ inline void for_each_tile(const Plan &plan, const Use &use) {
    for (int number = blockIdx.x; number < plan.tiles(); number += gridDim.x) {
        ExpertTile tile = find_tile<Tiles::Large::TOKENS>(plan, number);
        if (Tiles::Most::TOKENS < Tiles::Large::TOKENS && tile.count > Tiles::Most::TOKENS)
            use.template tile<typename Tiles::Large>(tile);
        else if (tile.count > Tiles::Medium::TOKENS) use.template tile<typename Tiles::Most>(tile);
        else if (tile.count > Tiles::Small::TOKENS) use.template tile<typename Tiles::Medium>(tile);
        else if (tile.count > Tiles::Smallest::TOKENS) use.template tile<typename Tiles::Small>(tile);
        else use.template tile<typename Tiles::Smallest>(tile);
    }
}

// Put the sums of a tile into shared memory, `row` floats for each token.
template <class Shape>
__device__ inline void put_tile(const typename Shape::Sums &sums, float *values, int row) {
    Place own = own_place();
#pragma unroll
    for (int m = 0; m < Shape::GROUPS_OF_WARP; ++m)
#pragma unroll
        for (int n = 0; n < Shape::EIGHTS; ++n)
#pragma unroll
            for (int i = 0; i < 2; ++i) {
                const float *total = sums[m][n].total;
                float2 both = {total[i] * Shape::Format::FACTOR, total[2 + i] * Shape::Format::FACTOR};
                int group = threadIdx.x / 32 * Shape::GROUPS_OF_WARP + m, token = Shape::token(n, 2 * own.member + i);
                *(float2 *)(values + token * row + GROUP_ROWS * group + 2 * own.group) = both;
            }
}

// Words: records, experts, starts, row groups, columns, q, d, b, q, d, b of the hidden layer,
// scratch of the CPU, limit as f32 bits.
struct GateUp {
    const Words &op;
    u8 *shared;

    template <class Shape>
    __device__ void tile(const ExpertTile &tile) const {
        static_assert(Shape::GROUPS_OF_WARP == 2, "a warp has a group of gate and the same of up");
        const u8 *record = op.address<const u8 *const>(1)[tile.expert];
        Rounded x = {op.address<i8>(6), op.address<float>(7), op.address<int>(8)};
        typename Shape::Sums sums;
        multiply_tile<Shape>(sums, factors_of<Shape>(tile, record, op.number(4), op.number(5), x), shared);
        round_hidden<Shape>(sums, tile);
    }

    // Groups of gate and up alternate: two of each are a block of 32 values of the hidden layer.
    template <class Shape>
    __device__ void round_hidden(const typename Shape::Sums &sums, const ExpertTile &tile) const {
        constexpr int ROW = GROUP_ROWS * Shape::GROUPS + 4, BLOCKS = GROUP_ROWS * Shape::GROUPS / 2 / BLOCK;
        static_assert(4 * ROW * Shape::TOKENS <= Shape::SHARED, "the products take the place of stages");
        float *values = (float *)shared, limit = op.real(13);
        Rounded hidden = {op.address<i8>(9), op.address<float>(10), op.address<int>(11), op.number(14) != 0};
        i64 inner = op.number(4) / 2 * GROUP_ROWS;
        put_tile<Shape>(sums, values, ROW);
        __syncthreads();
        int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
        for (int task = warp; task < tile.count * BLOCKS; task += Shape::THREADS / 32) {
            int token = task / BLOCKS, part = task % BLOCKS, pair = 2 * part + lane / GROUP_ROWS;
            i64 block = (i64)tile.panel * BLOCKS + part;
            if (block >= inner / BLOCK) continue;
            const float *gate = values + token * ROW + 2 * GROUP_ROWS * pair + lane % GROUP_ROWS;
            round_values(hidden.row(tile.slot + token, inner), block, {swiglu_as_cpu(gate[0], gate[GROUP_ROWS], limit)});
        }
        __syncthreads();
    }
};

// The products of all slots with down, row after row in scratch memory.
//
// Words: records, experts, starts, row groups, columns, q, d, b, out, its row stride in bytes,
// scratch of the CPU, rows (i64), weights (f32), offset of down in a record; SCRATCH.
struct Down {
    const Words &op;
    u8 *shared;

    template <class Shape>
    __device__ void tile(const ExpertTile &tile) const {
        const u8 *down = op.address<const u8 *const>(1)[tile.expert] + op.number(14);
        Rounded x = {op.address<i8>(6), op.address<float>(7), op.address<int>(8)};
        Factors factors = factors_of<Shape>(tile, down, op.number(4), op.number(5), x);
        typename Shape::Sums sums;
        multiply_tile<Shape>(sums, factors, shared);
        i64 stride = 4 * GROUP_ROWS * op.number(4), slot = tile.slot - *op.address<const i64>(3);
        u8 *products = op.address<u8>(SCRATCH) + slot * stride;
        store_tile<Shape>(sums, factors, products + 4 * GROUP_ROWS * (i64)tile.panel * Shape::GROUPS, stride);
    }
};

// Compute all tiles of the words of GateUp or Down, which is `Use`.
template <class Tiles, class Use>
__device__ inline void experts(const Words &op, u8 *shared) {
    typedef typename Tiles::Large Large;
    int experts = (int)op.number(2), groups = (int)op.number(4);
    int panels = (groups + Large::GROUPS - 1) / Large::GROUPS;
    Plan plan = make_plan<Large::TOKENS>(op.address<const i64>(3), experts, panels, (int *)(shared + Tiles::SHARED));
    Tiles::Format::prepare();
    for_each_tile<Tiles>(plan, Use{op, shared});
}

// Kernels of a format; so many blocks of threads are to run beside each other.
#define EXPERTS(prefix, Format, eights, warps, many_stages, few_stages, blocks)                                   \
    EXPERTS_KERNEL(prefix##_experts_gate_up, GateUp, 32 * warps, blocks, Format, eights, warps, many_stages, few_stages) \
    EXPERTS_KERNEL(prefix##_experts_down, Down, 32 * warps, blocks, Format, eights, warps, many_stages, few_stages)

#define EXPERTS_KERNEL(name, Use, threads, blocks, ...)                       \
    extern "C" __global__ void __launch_bounds__(threads, blocks)             \
    name(const Words op) {                                                    \
        DYNAMIC_SHARED(shared);                                               \
        experts<ExpertTiles<__VA_ARGS__>, Use>(op, shared);                   \
    }
