// The k best of many scores, as localv4/kernels/top_entries.py chooses them: of equal scores those of
// the lowest numbers, -0 equal to 0, NaN beyond the infinity of its sign.
//
// The range of the scores is cut into BINS. Those of the bin with the k-th best are compared with one
// another; where they are too many, or a score is not finite, the k-th best is found by bisection.

#pragma once

#include "common.cuh"

constexpr int BINS = 2048;
constexpr int CANDIDATES = 2048;
constexpr int OWN = 32;  // scores that a thread keeps in registers

struct TopMemory {
    int bins[BINS], candidates[CANDIDATES];
    int warps[32], others[32];
    float low[32], high[32];
    int bin, above, found, edge, spare;
};

// An int in the order of the scores.
__device__ inline int order_key(float score) {
    int bits = __float_as_int(score);
    return bits < 0 ? (int)(0x80000000u - (u32)bits) : bits;
}

// A value of which the compiler knows nothing: what is made of it is made again, not kept in registers.
__device__ inline float forgotten(float value) {
#ifndef LOCALV4_HOST
    asm volatile("" : "+f"(value));
#endif
    return value;
}

// The scores of this thread: neighbours, so that it can write what is chosen of them in order.
struct OwnScores {
    float values[OWN];
    const float *scores;
    int first, end, count;
    bool is_kept;

    __device__ inline OwnScores(const float *all, int number) {
        int share = ((number + blockDim.x - 1) / blockDim.x + 3) / 4 * 4;
        scores = all, count = number, first = min((int)threadIdx.x * share, count), end = min(first + share, count);
        is_kept = share <= OWN;
        if (!is_kept) return;
#pragma unroll
        for (int i = 0; i < OWN; i += 4)
            if (first + i < end) *(float4 *)(values + i) = *(const float4 *)(scores + first + i);
    }

    // Call f(score, its number) in the order of the numbers.
    template <typename F>
    __device__ inline void each(F f) const {
        if (is_kept) {
#pragma unroll
            for (int i = 0; i < OWN; ++i)
                if (first + i < end) f(forgotten(values[i]), first + i);
        } else {
            call(f, first, end, 4);
        }
    }

    // Call f(score, its number), the scores being shared out among the threads somehow.
    template <typename F>
    __device__ inline void any(F f) const {
        if (is_kept)
            each(f);
        else
            call(f, 4 * threadIdx.x, count, 4 * blockDim.x);
    }

    // Call f for four scores from `at` on, and for those a step further, up to `stop`.
    template <typename F>
    __device__ inline void call(F f, int at, int stop, int step) const {
        for (; at < stop; at += step) {
            float four[4];
            *(float4 *)four = *(const float4 *)(scores + at);
#pragma unroll
            for (int i = 0; i < 4; ++i)
                if (at + i < stop) f(four[i], at + i);
        }
    }
};

// Return the sum of the values of all threads before this one, and of all in `total`.
__device__ inline int sum_before(int value, int *warps, int &total) {
    int lane = threadIdx.x % 32, warp = threadIdx.x / 32, before = value;
    for (int distance = 1; distance < 32; distance *= 2) {
        int other = __shfl_up_sync(0xffffffffu, before, distance);
        before += lane >= distance ? other : 0;
    }
    __syncthreads();
    if (lane == 31) warps[warp] = before;
    __syncthreads();
    int own = lane < blockDim.x / 32 ? warps[lane] : 0, sum = own;
    for (int distance = 1; distance < 32; distance *= 2) {
        int other = __shfl_up_sync(0xffffffffu, sum, distance);
        sum += lane >= distance ? other : 0;
    }
    total = __shfl_sync(0xffffffffu, sum, 31);
    return before - value + __shfl_sync(0xffffffffu, sum - own, warp);
}

// How the range of scores becomes bins.
struct Scale {
    float low, factor;

    __device__ inline int bin(float score) const {
        return min(max((int)((score - low) * factor), 0), BINS - 1);
    }
};

// Find the range of the scores; whether all of them are finite and not all the same.
__device__ inline bool find_range(TopMemory &shared, const OwnScores &own, Scale &scale) {
    float low = INFINITE, high = -INFINITE;
    bool is_finite = true;
    own.any([&](float score, int) {
        low = fminf(low, score), high = fmaxf(high, score);
        is_finite = is_finite && score - score == 0.0f;
    });
    if (!is_finite) low = -INFINITE;
    int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    high = warp_max(high), low = -warp_max(-low);
    if (lane == 0) shared.low[warp] = low, shared.high[warp] = high;
    __syncthreads();
    bool exists = lane < blockDim.x / 32;
    scale.low = -warp_max(exists ? -shared.low[lane] : -INFINITE);
    float range = warp_max(exists ? shared.high[lane] : -INFINITE) - scale.low;
    scale.factor = __fdiv_rn((float)BINS, range);
    return range > 1e-30f && range < 1e30f;
}

// Find the bin of the k-th best: `bin`, and how many scores are above it: `above`.
__device__ inline void find_bin(TopMemory &shared, const OwnScores &own, const Scale &scale, int k) {
    for (int i = threadIdx.x; i < BINS; i += blockDim.x) shared.bins[i] = 0;
    if (threadIdx.x == 0) shared.found = 0;
    __syncthreads();
    own.any([&](float score, int) { atomicAdd(&shared.bins[BINS - 1 - scale.bin(score)], 1); });
    __syncthreads();
    // bins from the best one on
    int share = BINS / blockDim.x, first = share * threadIdx.x, sum = 0, total;
    for (int i = 0; i < share; ++i) sum += shared.bins[first + i];
    int before = sum_before(sum, shared.warps, total);
    for (int i = 0; i < share; ++i) {
        int count = shared.bins[first + i];
        if (before < k && before + count >= k) shared.bin = BINS - 1 - first - i, shared.above = before;
        before += count;
    }
    __syncthreads();
}

// List the scores of the bin and find the edge among them; false if there are too many.
__device__ inline bool find_edge(TopMemory &shared, const OwnScores &own, const Scale &scale, int k) {
    int bin = shared.bin;
    own.any([&](float score, int) {
        if (scale.bin(score) != bin) return;
        int place = atomicAdd(&shared.found, 1);
        if (place < CANDIDATES) shared.candidates[place] = order_key(score);
    });
    __syncthreads();
    int found = shared.found, wanted = k - shared.above;
    if (found > CANDIDATES) return false;
    for (int i = threadIdx.x; i < found; i += blockDim.x) {
        int key = shared.candidates[i], better = 0, equal = 0;
        for (int j = 0; j < found; ++j) better += shared.candidates[j] > key, equal += shared.candidates[j] == key;
        if (better < wanted && better + equal >= wanted) shared.edge = key, shared.spare = wanted - better;
    }
    __syncthreads();
    return true;
}

// Find the edge among all scores, whatever they are.
__device__ inline void bisect(TopMemory &shared, const OwnScores &own, int k) {
    i64 low = -0x7fffffffLL - 1, high = 0x7fffffffLL;
    int total, above = 0;
    while (low < high) {
        i64 middle = (low + high + 1) >> 1;
        int count = 0;
        own.any([&](float score, int) { count += order_key(score) >= middle; });
        sum_before(count, shared.warps, total);
        if (total >= k)
            low = middle;
        else
            high = middle - 1;
    }
    own.any([&](float score, int) { above += order_key(score) > low; });
    sum_before(above, shared.warps, total);
    if (threadIdx.x == 0) shared.edge = (int)low, shared.spare = k - total;
    __syncthreads();
}

// Write the numbers of the k best of count > k scores, ascending. All threads of a block; the scores
// are on a line of 16 bytes.
__device__ inline void write_top(TopMemory &shared, int *chosen, const float *scores, int count, int k) {
    OwnScores own(scores, count);
    Scale scale;
    bool is_found = find_range(shared, own, scale);
    if (is_found) {
        find_bin(shared, own, scale, k);
        is_found = find_edge(shared, own, scale, k);
    }
    if (!is_found) bisect(shared, own, k);
    int edge = shared.edge, spare = shared.spare, better = 0, equal = 0, total;
    own.each([&](float score, int) {
        int key = order_key(score);
        better += key > edge, equal += key == edge;
    });
    int equal_before = sum_before(equal, shared.others, total);
    int place = sum_before(better, shared.warps, total) + min(equal_before, spare);
    own.each([&](float score, int number) {
        int key = order_key(score);
        bool is_equal = key == edge;
        if (key > edge || (is_equal && equal_before < spare)) chosen[place++] = number;
        equal_before += is_equal;
    });
}
