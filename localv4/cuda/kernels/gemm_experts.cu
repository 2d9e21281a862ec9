// Products of many tokens with experts in the formats of localv4/kernels/packed.py, and the sum of
// the results of all formats.

#include "gemm_experts.cuh"
#include "gemm_formats.cuh"

EXPERTS(mx4, Mx4Tiles, 8, 4, 2, 3, 3)
EXPERTS(q4, Q4Tiles, 8, 4, 4, 6, 3)
EXPERTS(q8, Q8Tiles, 8, 4, 3, 4, 3)

// out[rows[i]] += weights[i] * products[i], the slots i of a row in ascending order.
//
// The words of `experts_down`. A block of threads takes the slots that are the first of their row,
// with a stride, and looks for the others of the row.

constexpr int SUM_THREADS = 256;

// Whether a slot before this one has the same row; for all threads alike.
__device__ inline bool has_earlier_slot(const i64 *rows, int slot) {
    __shared__ int earlier;
    if (threadIdx.x == 0) earlier = 0;
    __syncthreads();
    for (int other = threadIdx.x; other < slot; other += SUM_THREADS)
        if (rows[other] == rows[slot]) earlier = 1;
    __syncthreads();
    bool result = earlier;
    __syncthreads();  // before the next call
    return result;
}

// Write the slots of the same row from `slot` on, in order; returns their number.
__device__ inline int collect_slots(int *own, const i64 *rows, int slot, int count) {
    __shared__ int of_warps[2][SUM_THREADS / 32];
    int warp = threadIdx.x / 32, lane = threadIdx.x % 32, found = 0, turn = 0;
    for (int first = slot; first < count; first += SUM_THREADS, turn ^= 1) {
        int other = first + threadIdx.x;
        bool is_own = other < count && rows[other] == rows[slot];
        u32 lanes = __ballot_sync(0xffffffffu, is_own);
        if (lane == 0) of_warps[turn][warp] = __popc(lanes);
        __syncthreads();
        int place = found + __popc(lanes & ((1u << lane) - 1));
        for (int i = 0; i < SUM_THREADS / 32; ++i) {
            if (i < warp) place += of_warps[turn][i];
            found += of_warps[turn][i];
        }
        if (is_own) own[place] = other;
    }
    __syncthreads();
    return found;
}

__device__ inline void add_weighted(float4 &sum, const float4 &product, float weight) {
    sum.x = __fmaf_rn(product.x, weight, sum.x);
    sum.y = __fmaf_rn(product.y, weight, sum.y);
    sum.z = __fmaf_rn(product.z, weight, sum.z);
    sum.w = __fmaf_rn(product.w, weight, sum.w);
}

KERNEL(experts_down_sum) {
    DYNAMIC_SHARED(shared);
    int *own = (int *)shared;
    const i64 *starts = op.address<const i64>(3), *rows = op.address<const i64>(12) + starts[0];
    const float *weights = op.address<const float>(13) + starts[0];
    const float *products = op.address<const float>(SCRATCH);
    int count = (int)(starts[op.number(2)] - starts[0]), width = GROUP_ROWS * (int)op.number(4);
    for (int slot = blockIdx.x; slot < count; slot += gridDim.x) {
        if (has_earlier_slot(rows, slot)) continue;
        int found = collect_slots(own, rows, slot, count);
        float *out = (float *)(op.address<u8>(9) + rows[slot] * op.number(10));
        for (int at = 4 * threadIdx.x; at < width; at += 4 * SUM_THREADS) {
            float4 sum = *(const float4 *)(out + at);
#pragma unroll 4
            for (int i = 0; i < found; ++i)
                add_weighted(sum, *(const float4 *)(products + (i64)own[i] * width + at), weights[own[i]]);
            *(float4 *)(out + at) = sum;
        }
        __syncthreads();
    }
}
