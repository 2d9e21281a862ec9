// Rows of activations between the big products: twins of localv4/kernels/rows.py.

#include "common.cuh"

// Words: x, its row stride in floats, tokens, columns.
KERNEL(clear) {
    float *x = op.address<float>(1);
    i64 stride = op.number(2), tokens = op.number(3), cols = op.number(4);
    for (i64 i = blockIdx.x * (i64)blockDim.x + threadIdx.x; i < tokens * cols; i += (i64)gridDim.x * blockDim.x)
        x[i / cols * stride + i % cols] = 0.0f;
}
