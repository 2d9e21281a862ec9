// The experts of one token: twins of `*_gate_up` and `*_down` in localv4/kernels/formats.py.

#include "experts.cuh"

EXPERTS(mx4, BlockProducts<Mx4>)
EXPERTS(q4, BlockProducts<Q4>)
EXPERTS(q8, BlockProducts<Q8>)

// Words: parts (count, stride) f32, stride, count, rows, weights, out, 1 to add to what `out` holds,
// used (count,) i64: 0 for an expert that is left out.
KERNEL(combine) {
    i64 stride = op.number(2), row = blockIdx.x * (i64)blockDim.x + threadIdx.x;
    if (row >= op.number(4)) return;
    const float *parts = op.address<float>(1), *weights = op.address<float>(5);
    float *out = op.address<float>(6), sum = op.number(7) != 0 ? out[row] : 0.0f;
    for (i64 expert = 0; expert < op.number(3); ++expert)
        if (op.address<i64>(8)[expert] != 0) sum = __fmaf_rn(parts[expert * stride + row], weights[expert], sum);
    out[row] = sum;
}
