// The experts of one token: twins of `*_gate_up` and `*_down` in localv4/kernels/formats.py.

#include "experts.cuh"

EXPERTS(mx4, BlockProducts<Mx4>)
EXPERTS(q4, BlockProducts<Q4>)
EXPERTS(q8, BlockProducts<Q8>)

// Words: parts (count, stride) f32, stride, count, rows, weights, out, 1 to add to what `out` holds,
// turns (count,) i64: experts of turn 1 are added first, then those of turn 2 ...; 0: not at all.
KERNEL(combine) {
    i64 stride = op.number(2), count = op.number(3), row = blockIdx.x * (i64)blockDim.x + threadIdx.x;
    if (row >= op.number(4)) return;
    const float *parts = op.address<float>(1), *weights = op.address<float>(5);
    const i64 *turns = op.address<i64>(8);
    float *out = op.address<float>(6), sum = op.number(7) != 0 ? out[row] : 0.0f;
    i64 last = 0;
    for (i64 expert = 0; expert < count; ++expert) last = max(last, turns[expert]);
    for (i64 turn = 1; turn <= last; ++turn) {
#pragma unroll 8
        for (i64 expert = 0; expert < count; ++expert) {
            float part = load_input(parts + expert * stride + row);  // wanted or not: none waits for another
            float more = __fmaf_rn(part, load_input(weights + expert), sum);
            sum = turns[expert] == turn ? more : sum;
        }
    }
    out[row] = sum;
}
