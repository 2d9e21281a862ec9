// The experts of one token: twins of `*_gate_up` and `*_down` in localv4/kernels/formats.py.
//
// `records` are the addresses of packed experts, 0 for one that another operation or the CPU
// computes. All devices give the same bits, so it does not matter which one has done it.

#pragma once

#include "single_token.cuh"

// Words: records, count, row groups, columns, q, d, b, h, limit as f32 bits, 1 if no kernel writes the
// records. A block of threads computes gate and up of a group of an expert, or of ROWS rows of it: their
// groups alternate.
template <class Products, int ROWS>
__device__ inline void gate_up(const Words &op) {
    constexpr int PARTS = GROUP_ROWS / ROWS;
    int groups = (int)op.number(3), cols = (int)op.number(4);
    int part = op.block() % PARTS, group = op.block() / PARTS % groups;
    int expert = op.block() / PARTS / groups;
    if (expert >= op.number(2)) return;
    if (op.number(10) == 0) wait_for_results();
    const u8 *record = op.address<const u8 *>(1)[expert];
    if (record == nullptr) return;
    i64 bytes = group_bytes<typename Products::Weights>(cols);
    Rounded x = {op.address<i8>(5), op.address<float>(6), op.address<int>(7)};
    GroupSource source = {record + 2 * group * bytes, bytes, x};
    float sum = Products::finish(row_products<Products, ROWS>(source, 2, cols / BLOCK, part * (ROWS / 4)));
    if (threadIdx.x >= 32) return;
    float up = __shfl_down_sync(0xffffffffu, sum, ROWS);
    if (threadIdx.x >= ROWS) return;
    float *h = op.address<float>(8) + expert * ((i64)groups * GROUP_ROWS + ROW_GAP);
    h[group * GROUP_ROWS + part * ROWS + threadIdx.x] = swiglu_as_cpu(sum, up, op.real(9));
}

// The same group of some experts, each with activations of its own. Distances are 32 bits wide: they
// are multiplied for each task.
struct DownSource {
    const u8 *const *records;
    i64 offset;  // of the group in a record
    Rounded activations;
    int q_step, d_step, b_step;

    __device__ inline DownSource(const u8 *const *of, i64 group, const Rounded &x, int cols)
        : records(of), offset(group), activations(x), q_step((int)q_row(cols)), d_step((int)d_row(cols)),
          b_step((int)b_row(cols)) {}

    __device__ inline bool exists(int slot) const { return records[slot] != nullptr; }
    __device__ inline const u8 *weights(int slot) const { return records[slot] + offset; }
    __device__ inline Rounded x(int slot) const {
        return {activations.q + slot * q_step, activations.d + slot * d_step, activations.b + slot * b_step};
    }
};

// Words: records, count, row groups, columns, q, d, b, out, weights, offset in a record, 1 to add to
// what `out` holds. A block of threads computes DOWN_ROWS rows of `out`, some experts at a time.
template <class Products>
__device__ inline void down(const Words &op) {
    constexpr int PARTS = GROUP_ROWS / DOWN_ROWS;
    __shared__ float products[TOKEN_THREADS];
    __shared__ const u8 *records[TOKEN_THREADS / DOWN_ROWS];
    int count = (int)op.number(2), cols = (int)op.number(4), blocks = cols / BLOCK;
    int group = op.block() / PARTS, part = op.block() % PARTS;
    if (group >= op.number(3)) return;
    i64 offset = op.number(10) + group * group_bytes<typename Products::Weights>(cols);
    Rounded x = {op.address<i8>(5), op.address<float>(6), op.address<int>(7)};
    float *out = op.address<float>(8) + group * GROUP_ROWS + part * DOWN_ROWS + threadIdx.x;
    bool has_row = threadIdx.x < DOWN_ROWS;
    float sum = has_row && op.number(11) != 0 ? *out : 0.0f;
    int at_once = max(1, min(TABLE_ROWS / DOWN_ROWS / blocks, TOKEN_THREADS / DOWN_ROWS));
    for (int first = 0; first < count; first += at_once) {
        int slots = min(at_once, count - first);
        if (threadIdx.x < slots) records[threadIdx.x] = op.address<const u8 *>(1)[first + threadIdx.x];
        __syncthreads();
        DownSource source(records, offset, x.row(first, cols), cols);
        products[threadIdx.x] =
            Products::finish(row_products<Products, DOWN_ROWS>(source, slots, blocks, part * (DOWN_ROWS / 4)));
        __syncthreads();
        for (int slot = 0; has_row && slot < slots; ++slot)
            if (source.exists(slot))
                sum = __fmaf_rn(products[slot * DOWN_ROWS + threadIdx.x], op.address<float>(9)[first + slot], sum);
        __syncthreads();
    }
    if (has_row) *out = sum;
}

// The words of `down`, but `out` gets the product of each expert by itself, unweighted: (count, 16 *
// row groups) f32, the rows of experts without a record untouched.
template <class Products>
__device__ inline void down_parts(const Words &op) {
    int groups = (int)op.number(3), cols = (int)op.number(4);
    int expert = op.block() / groups, group = op.block() % groups;
    if (expert >= op.number(2)) return;
    i64 offset = op.number(10) + group * group_bytes<typename Products::Weights>(cols);
    Rounded x = {op.address<i8>(5), op.address<float>(6), op.address<int>(7)};
    DownSource source(op.address<const u8 *>(1) + expert, offset, x.row(expert, cols), cols);
    if (!source.exists(0)) return;
    float sum = row_products<Products, GROUP_ROWS>(source, 1, cols / BLOCK, 0);
    if (threadIdx.x < GROUP_ROWS)
        op.address<float>(8)[((i64)expert * groups + group) * GROUP_ROWS + threadIdx.x] = Products::finish(sum);
}

#define EXPERTS(name, Products)                                \
    EARLY_TOKEN_KERNEL(name##_gate_up, 3) { gate_up<Products, 16>(op); } \
    EARLY_TOKEN_KERNEL(name##_gate_up_few, 4) { gate_up<Products, 8>(op); } \
    TOKEN_KERNEL(name##_down, 4) { down<Products>(op); }          \
    TOKEN_KERNEL(name##_down_parts, 3) { down_parts<Products>(op); }
