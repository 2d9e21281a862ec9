// A packed matrix times one token: twins of `*_matvec` in localv4/kernels/formats.py.

#pragma once

#include "single_token.cuh"

// Words: matrix, row groups, columns, q, d, b, out. A block of threads computes as many groups as
// the grid leaves to it, or eight rows of a group, where there are few of them.
template <class Products, int ROWS>
__device__ inline void matvec(const Words &op) {
    constexpr int PARTS = GROUP_ROWS / ROWS;
    int groups = (int)op.number(2), cols = (int)op.number(3);
    int slots = PARTS == 1 ? (groups + (int)gridDim.x - 1) / (int)gridDim.x : 1;
    int group = blockIdx.x / PARTS * slots, part = blockIdx.x % PARTS;
    slots = min(slots, groups - group);
    if (slots <= 0) return;
    i64 bytes = group_bytes<typename Products::Weights>(cols);
    Rounded x = {op.address<i8>(4), op.address<float>(5), op.address<int>(6)};
    GroupSource source = {op.address<u8>(1) + group * bytes, bytes, x};
    float sum = row_products<Products, ROWS>(source, slots, cols / BLOCK, part * (ROWS / 4));
    if (threadIdx.x < slots * ROWS)
        op.address<float>(7)[group * GROUP_ROWS + part * ROWS + threadIdx.x] = Products::finish(sum);
}

#define MATVEC(name, Products)                          \
    MATVEC_OF(name##_matvec, Products, GROUP_ROWS)      \
    MATVEC_OF(name##_matvec_few, Products, 8)

#define MATVEC_OF(name, Products, rows)                 \
    EARLY_KERNEL(__launch_bounds__(TOKEN_THREADS, 4), name) { matvec<Products, rows>(op); }
