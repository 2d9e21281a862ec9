// The router: twins of localv4/kernels/route.py. How often experts are used is counted by the host.

#include "activations.cuh"

constexpr int MOST_EXPERTS = 1024;
constexpr int MOST_FORMS = 64;
constexpr int CHUNK = 8192;  // slots that are sorted while their experts are in shared memory

// --- choosing experts ---

// log(1 + y) for 0 <= y <= 1: 2 artanh(y / (2 + y))
__device__ inline float log1p_as_cpu(float y) {
    float s = __fdiv_rn(y, y + 2.0f), z = __fmul_rn(s, s);
    float p = __fmaf_rn(0.14089167118f, z, 0.13980300725f);
    p = __fmaf_rn(p, z, 0.20012454689f);
    p = __fmaf_rn(p, z, 0.33333158493f);
    p = __fmaf_rn(p, z, 1.0f);
    return __fmul_rn(s + s, p);
}

// sqrt(softplus(x))
__device__ inline float affinity_of(float x) {
    float size = -x > x ? -x : x, positive = 0.0f > x ? 0.0f : x;
    return __fsqrt_rn(positive + log1p_as_cpu(exp_as_cpu(-size)));
}

// An int in the order of the floats, NaN on top.
__device__ inline int rank_of(float x) {
    int bits = __float_as_int(x);
    return x == x ? bits ^ (bits >> 31 & 0x7fffffff) : 0x7fffffff;
}

// The largest int of a warp.
__device__ inline int warp_largest(int value) {
#if !defined(LOCALV4_HOST) && __CUDA_ARCH__ >= 800
    return __reduce_max_sync(0xffffffffu, value);
#else
    for (int distance = 16; distance > 0; distance /= 2)
        value = max(value, __shfl_xor_sync(0xffffffffu, value, distance));
    return value;
#endif
}

// List the k experts of the highest ranks, among equals those of lower numbers first; a
// warp, whose lanes have every 32nd expert. Ranks of those that are listed are lost.
__device__ inline void choose(int *found, int *ranks, int n_experts, i64 k) {
    constexpr int NONE = (int)0x80000000;
    int lane = threadIdx.x % 32;
    for (i64 i = 0; i < k; ++i) {
        int largest = NONE, at = lane;
#pragma unroll 8
        for (int e = lane; e < n_experts; e += 32) {
            int rank = ranks[e];
            if (rank > largest) largest = rank, at = e;
        }
        int wanted = warp_largest(largest);
        // the lowest number is the largest of the numbers below none
        int number = -warp_largest(largest == wanted ? -at : -MOST_EXPERTS);
        if (number == at && largest == wanted) {
            ranks[at] = NONE;
            found[i] = at;
        }
        __syncwarp();
    }
}

// Put numbers into ascending order; all threads of a block.
__device__ inline void sort(int *sorted, const int *numbers, i64 count) {
    for (i64 i = threadIdx.x; i < count; i += blockDim.x) {
        int own = numbers[i], before = 0;
        for (i64 j = 0; j < count; ++j) before += numbers[j] < own || (numbers[j] == own && j < i);
        sorted[before] = own;
    }
}

// Choose the experts of a token: words as `route` has them; all threads of a block. Arrays are in
// shared memory, as long as there are experts (`twins/router.py` has its size).
struct Choice {
    i64 *places;
    float *affinities, *bias;
    int *ranks, *found, *chosen, *forms;

    __device__ inline Choice(void *memory, i64 n_experts) {
        i64 count = (n_experts + 1) / 2 * 2;
        places = (i64 *)memory;
        affinities = (float *)(places + count);
        bias = affinities + count;
        ranks = (int *)(bias + count);
        found = ranks + count, chosen = found + count, forms = chosen + count;
    }

    // What no kernel writes.
    __device__ inline void load(const Words &op, i64 token) const {
        i64 k = op.number(7);
        const float *given = op.address<float>(4);
        const i64 *table = op.address<i64>(5);
        if (table != nullptr)
            for (i64 i = threadIdx.x; i < k; i += blockDim.x) found[i] = (int)table[k * op.address<i64>(6)[token] + i];
        else
            for (int e = threadIdx.x; e < op.number(3); e += blockDim.x) bias[e] = given[e];
    }

    __device__ inline void make(const Words &op, i64 token) const {
        i64 k = op.number(7);
        int n_experts = (int)op.number(3);
        const float *logits = op.address<float>(1) + op.number(2) * token;
        bool chooses = op.number(5) == 0;
        for (int e = threadIdx.x; e < n_experts; e += blockDim.x) {
            affinities[e] = affinity_of(logits[e]);
            if (chooses) ranks[e] = rank_of(affinities[e] + bias[e]);
        }
        __syncthreads();
        if (chooses && threadIdx.x < 32) choose(found, ranks, n_experts, k);
        __syncthreads();
        sort(chosen, found, k);
        __syncthreads();
        float total = 0.0f, scaling = op.real(8);
        for (i64 i = 0; i < k; ++i) total += affinities[chosen[i]];
        for (i64 i = threadIdx.x; i < k; i += blockDim.x) {
            op.address<i64>(9)[k * token + i] = chosen[i];
            op.address<float>(10)[k * token + i] = __fmul_rn(__fdiv_rn(affinities[chosen[i]], total + 1e-20f), scaling);
        }
    }
};

// Words: logits, their row stride, n_experts, bias or 0, table or 0, ids or 0, k, scaling, experts,
// weights, tokens. 256 threads a token.
EARLY_KERNEL(, route) {
    DYNAMIC_SHARED(memory);
    Choice choice(memory, op.number(3));
    choice.load(op, op.block());
    wait_for_results();
    choice.make(op, op.block());
}

// --- where experts lie ---

// The record of an expert among those of a form, or 0: it is of another one, or not in device memory.
__device__ inline i64 record_of(i64 place, i64 form, i64 wanted) { return place > 0 && form == wanted ? place : 0; }

// Words: experts, k, table of records (not in device memory: 0 or less), forms of the experts,
// number of forms, records (forms, k). Records that are not there become 0; nothing halts. One block.
KERNEL(resolve) {
    const i64 *experts = op.address<i64>(1), *table = op.address<i64>(3), *forms = op.address<i64>(4);
    i64 k = op.number(2), *records = op.address<i64>(6);
    for (i64 i = threadIdx.x; i < k * op.number(5); i += blockDim.x) {
        i64 number = experts[i % k];
        records[i] = record_of(table[number], forms[number], i / k);
    }
}

// `route` and `resolve` of one token: words 12 ... 15 are words 3 ... 6 of `resolve`.
EARLY_KERNEL(, route_and_resolve) {
    DYNAMIC_SHARED(memory);
    Choice choice(memory, op.number(3));
    for (int e = threadIdx.x; e < op.number(3); e += blockDim.x) {
        choice.places[e] = op.address<i64>(12)[e];
        choice.forms[e] = (int)op.address<i64>(13)[e];
    }
    choice.load(op, 0);
    wait_for_results();
    choice.make(op, 0);
    i64 k = op.number(7), *records = op.address<i64>(15);
    for (i64 i = threadIdx.x; i < k * op.number(14); i += blockDim.x) {
        int number = choice.chosen[i % k];
        records[i] = record_of(choice.places[number], choice.forms[number], i / k);
    }
}

// The experts of `group` in shared memory.
struct Groups {
    int counts[MOST_EXPERTS], forms[MOST_EXPERTS], listed[MOST_FORMS], slots[MOST_FORMS];
    __align__(16) u16 chunk[CHUNK];
};

__device__ inline void count_slots(const Words &op, Groups &groups) {
    const i64 *experts = op.address<i64>(1), *forms = op.address<i64>(4);
    int e = threadIdx.x, n_experts = (int)op.number(18);
    groups.counts[e] = 0;
    groups.forms[e] = e < n_experts ? (int)forms[e] : MOST_FORMS;
    if (e < MOST_FORMS) groups.listed[e] = groups.slots[e] = 0;
    __syncthreads();
    for (i64 i = e; i < op.number(13) * op.number(2); i += blockDim.x) atomicAdd(&groups.counts[experts[i]], 1);
    __syncthreads();
    if (groups.counts[e] > 0) {
        atomicAdd(&groups.listed[groups.forms[e]], 1);
        atomicAdd(&groups.slots[groups.forms[e]], groups.counts[e]);
    }
    __syncthreads();
}

// List the expert of this thread; return its first slot.
__device__ inline i64 list_expert(const Words &op, const Groups &groups, i64 total) {
    int e = threadIdx.x, form = groups.forms[e], listed = 0;
    if (groups.counts[e] == 0) return 0;
    i64 first = 0, record = op.address<i64>(3)[e];
    for (int i = 0; i < form; ++i) first += groups.slots[i];
    for (int i = 0; i < e; ++i) {
        bool comes_before = groups.forms[i] == form && groups.counts[i] > 0;
        listed += comes_before;
        first += comes_before ? groups.counts[i] : 0;
    }
    op.address<i64>(6)[form * total + listed] = record > 0 ? record : 0;
    op.address<i64>(14)[form * (total + 1) + listed] = first;
    return first;
}

// Words: experts (tokens, k), k, table, forms, number of forms, records (forms, tokens * k), heat,
// last use, clock, decay, steps, halt, tokens, starts (forms, tokens * k + 1), token of each slot,
// weights, weight of each slot, n_experts. One block of MOST_EXPERTS threads, one for each expert.
KERNEL(group) {
    __shared__ Groups groups;
    i64 k = op.number(2), total = op.number(13) * k, end = 0;
    count_slots(op, groups);
    i64 slot = list_expert(op, groups, total);
    for (i64 form = 0; form < op.number(5); ++form) {
        end += groups.slots[form];
        i64 *starts = op.address<i64>(14) + form * (total + 1);
        for (i64 i = groups.listed[form] + threadIdx.x; i <= total; i += blockDim.x) starts[i] = end;
    }
    const i64 *experts = op.address<i64>(1);
    const float *weights = op.address<float>(16);
    for (i64 first = 0; first < total; first += CHUNK) {
        i64 count = min(total - first, (i64)CHUNK);
        __syncthreads();
        for (i64 i = threadIdx.x; i < (count + 7) / 8 * 8; i += blockDim.x)
            groups.chunk[i] = i < count ? (u16)experts[first + i] : (u16)0xffff;
        __syncthreads();
        if (groups.counts[threadIdx.x] == 0) continue;
        for (i64 i = 0; i < count; i += 8) {
            uint4 eight = *(const uint4 *)(groups.chunk + i);
            u32 pairs[4] = {eight.x, eight.y, eight.z, eight.w};
#pragma unroll
            for (int j = 0; j < 8; ++j) {
                if ((pairs[j / 2] >> 16 * (j % 2) & 0xffff) != threadIdx.x) continue;
                op.address<i64>(15)[slot] = (first + i + j) / k;
                op.address<float>(17)[slot] = weights[first + i + j];
                ++slot;
            }
        }
    }
}
