// What all CUDA kernels share: the words of an operation, arithmetic with one rounding each, and
// the few instructions that C++ has no name for.
//
// Every kernel computes one operation of a program (localv4/kernels/operation.py) with the words of
// the CPU's function of that name, all addresses being those of device memory. The same files are
// compiled for the host by the tests (LOCALV4_HOST), where blocks run one after the other, so
// nothing here may depend on headers of CUDA, and every instruction that needs one has a host form.

#pragma once

#ifdef LOCALV4_HOST
#include "cuda_host.h"
#else
#define DYNAMIC_SHARED(name) extern __shared__ __align__(128) unsigned char name[]
#endif

typedef long long i64;
typedef unsigned int u32;
typedef unsigned short u16;
typedef unsigned char u8;
typedef signed char i8;
static_assert(sizeof(i64) == 8 && sizeof(u32) == 4, "the widths that the formats are made of");

// Words 0 ... 23 of an operation; word 0 means nothing here.
struct Words {
    i64 words[24];

    __device__ i64 number(int index) const { return words[index]; }
    __device__ float real(int index) const { return __int_as_float((int)words[index]); }
    template <typename T>
    __device__ T *address(int index, i64 distance = 0) const { return (T *)(words[index] + distance); }
    // What the address in a cell points to.
    template <typename T>
    __device__ T *cell(int index) const { return *(T **)words[index]; }
    // The i64 at an address: a context, for instance.
    __device__ i64 at(int index) const { return *(const i64 *)words[index]; }

    // Which of the operation's blocks of threads this is, and how many it has: in a launch of
    // several operations (cuda/merged.py) words 22 and 23 are its first block and the end.
    __device__ int block() const { return (int)blockIdx.x - (int)words[22]; }
    __device__ int blocks() const { return words[23] == 0 ? (int)gridDim.x : (int)(words[23] - words[22]); }
};

constexpr int SCRATCH = 21;  // the word of the device's own scratch memory

#define INFINITE __int_as_float(0x7f800000)

// Kernels of one token follow each other so closely that the start of one is hidden behind the end
// of the one before: its blocks are there already, and wait until all results are.
__device__ inline void let_follow() {
#if !defined(LOCALV4_HOST) && __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.launch_dependents;");
#endif
}

__device__ inline void wait_for_results() {
#if !defined(LOCALV4_HOST) && __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

// A kernel that takes the words of an operation, `op`; `bounds` are its launch bounds or nothing. An
// early one waits for the results by itself, when it has asked for what no kernel writes: weights.
// Where several are to be merged into one, only their bodies are wanted.
#ifdef MERGED
#define KERNEL_WITH(early, late, bounds, name)                                           \
    __device__ __forceinline__ void name##_body(const Words &op);                         \
    __device__ __forceinline__ void name##_merged(const Words &op) { late; name##_body(op); } \
    __device__ __forceinline__ void name##_body(const Words &op)
#else
#define KERNEL_WITH(early, late, bounds, name)                        \
    __device__ __forceinline__ void name##_body(const Words &op);     \
    extern "C" __global__ void bounds name(const Words op) {          \
        early;                                                        \
        late;                                                         \
        name##_body(op);                                              \
    }                                                                 \
    __device__ __forceinline__ void name##_body(const Words &op)
#endif

#define BOUNDED_KERNEL(bounds, name) KERNEL_WITH(let_follow(), wait_for_results(), bounds, name)
#define EARLY_KERNEL(bounds, name) KERNEL_WITH(let_follow(), , bounds, name)
#define KERNEL(name) BOUNDED_KERNEL(, name)

// --- numbers ---

// Products and sums are rounded one by one unless fma says otherwise: NVRTC gets --fmad=false.

__device__ inline float half_bits_to_float(u32 bits) {
#ifdef LOCALV4_HOST
    return host_half_to_float((u16)bits);
#else
    float value;
    asm("cvt.f32.f16 %0, %1;" : "=f"(value) : "h"((u16)bits));
    return value;
#endif
}

// Both halves of a word, the lower one first.
__device__ inline float2 halves_to_floats(u32 word) {
#ifdef LOCALV4_HOST
    return make_float2(host_half_to_float((u16)word), host_half_to_float((u16)(word >> 16)));
#else
    float2 v;
    asm("{ .reg .b16 low, high; mov.b32 {low, high}, %2; cvt.f32.f16 %0, low; cvt.f32.f16 %1, high; }"
        : "=f"(v.x), "=f"(v.y) : "r"(word));
    return v;
#endif
}

// 2^(code - 127), and 0 for code 0, as the CPU's products read UE8M0 scales.
__device__ inline float e8m0_to_float(u32 code) { return __int_as_float((int)(code << 23)); }

// acc + the four products of signed bytes of a and b
__device__ inline int dot4(u32 a, u32 b, int acc) {
#if defined(LOCALV4_HOST) || __CUDA_ARCH__ >= 610
    return __dp4a((int)a, (int)b, acc);
#endif
}

// Bytes of low (0 ... 3) and high (4 ... 7) by four nibbles of a selector, whose upper half is not
// used. A nibble with bit 3 set gives the sign of the byte instead, 0 or 255: __byte_perm does not.
__device__ inline u32 permute_bytes(u32 low, u32 high, u32 selector) {
#ifdef LOCALV4_HOST
    return host_permute_bytes(low, high, selector);
#else
    u32 result;
    asm("prmt.b32 %0, %1, %2, %3;" : "=r"(result) : "r"(low), "r"(high), "r"(selector));
    return result;
#endif
}

// 1 / x within 1 ulp, with one instruction: where the CPU's bits are not wanted.
__device__ inline float fast_inverse(float x) {
#ifdef LOCALV4_HOST
    return 1.0f / x;
#else
    float value;
    asm("rcp.approx.f32 %0, %1;" : "=f"(value) : "f"(x));
    return value;
#endif
}

// --- memory ---

// Loads of one, two and four words; `memory` says how.
#ifdef LOCALV4_HOST
#define LOADERS(name, memory)                                                                                       \
    __device__ inline u32 name##_u32(const void *address) { return *(const u32 *)address; }                         \
    __device__ inline uint2 name##_u64(const void *address) { return *(const uint2 *)address; }                     \
    __device__ inline uint4 name##_u128(const void *address) { return *(const uint4 *)address; }
#else
#define LOADERS(name, memory)                                                                                       \
    __device__ inline u32 name##_u32(const void *address) {                                                         \
        u32 v;                                                                                                      \
        asm volatile("ld.global" memory ".u32 %0, [%1];" : "=r"(v) : "l"(address));                                 \
        return v;                                                                                                   \
    }                                                                                                               \
    __device__ inline uint2 name##_u64(const void *address) {                                                       \
        uint2 v;                                                                                                    \
        asm volatile("ld.global" memory ".v2.u32 {%0, %1}, [%2];" : "=r"(v.x), "=r"(v.y) : "l"(address));           \
        return v;                                                                                                   \
    }                                                                                                               \
    __device__ inline uint4 name##_u128(const void *address) {                                                      \
        uint4 v;                                                                                                    \
        asm volatile("ld.global" memory ".v4.u32 {%0, %1, %2, %3}, [%4];"                                           \
                     : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w) : "l"(address));                                  \
        return v;                                                                                                   \
    }
#endif

// None of these is a load of what never changes (`ld.global.nc`): ptxas moves such loads to either side
// of `wait_for_results`, activations to where they are still those of the layer before.

// Read once, past the first cache: weights. What is beside them will be wanted, too.
LOADERS(load_stream, ".L1::no_allocate.L2::128B")

// Read by many threads: activations.
LOADERS(load_input, "")

__device__ inline uint4 load_stream(const void *address) { return load_stream_u128(address); }
__device__ inline float load_input(const float *address) { return __int_as_float((int)load_input_u32(address)); }

// --- tensor cores ---

// The numbers of d and c are of a register's `kind`.
#define TENSOR_PRODUCT(shape, kind)                                                            \
    asm volatile("mma.sync.aligned." shape " {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "   \
                 "{%10, %11, %12, %13};"                                                       \
                 : "=" kind(d[0]), "=" kind(d[1]), "=" kind(d[2]), "=" kind(d[3])              \
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]),           \
                   kind(c[0]), kind(c[1]), kind(c[2]), kind(c[3]))

// d = a (16 x 32) . b (32 x 8) + c, signed bytes; fragments as PTX has them for m16n8k32.
__device__ inline void mma_s8(int (&d)[4], const u32 (&a)[4], const u32 (&b)[2], const int (&c)[4]) {
#ifdef LOCALV4_HOST
    host_mma_s8(d, a, b, c);
#elif __CUDA_ARCH__ >= 800
    TENSOR_PRODUCT("m16n8k32.row.col.s32.s8.s8.s32", "r");
#else
    // sm_75 multiplies 8 x 16 by 16 x 8 at a time
    int low[2] = {c[0], c[1]}, high[2] = {c[2], c[3]};
    for (int half = 0; half < 2; ++half) {
        asm volatile("mma.sync.aligned.m8n8k16.row.col.s32.s8.s8.s32 {%0, %1}, {%2}, {%3}, {%0, %1};"
                     : "+r"(low[0]), "+r"(low[1]) : "r"(a[2 * half]), "r"(b[half]));
        asm volatile("mma.sync.aligned.m8n8k16.row.col.s32.s8.s8.s32 {%0, %1}, {%2}, {%3}, {%0, %1};"
                     : "+r"(high[0]), "+r"(high[1]) : "r"(a[2 * half + 1]), "r"(b[half]));
    }
    d[0] = low[0], d[1] = low[1], d[2] = high[0], d[3] = high[1];
#endif
}

// d = a (16 x 16) . b (16 x 8) + c, bf16 with float sums; fragments as PTX has them for m16n8k16.
__device__ inline void mma_bf16(float (&d)[4], const u32 (&a)[4], const u32 (&b)[2], const float (&c)[4]) {
#ifdef LOCALV4_HOST
    host_mma_bf16(d, a, b, c);
#elif __CUDA_ARCH__ >= 800
    TENSOR_PRODUCT("m16n8k16.row.col.f32.bf16.bf16.f32", "f");
#else
    // sm_75 has no such product: lanes ask each other for what they need
    int lane = threadIdx.x % 32, group = lane / 4, column = lane % 4 * 2;
    for (int i = 0; i < 4; ++i) d[i] = c[i];
#pragma unroll
    for (int half = 0; half < 2; ++half) {
#pragma unroll 1
        for (int member = 0; member < 4; ++member) {
            u32 x[2], y[2];
            for (int i = 0; i < 2; ++i) {
                x[i] = __shfl_sync(0xffffffffu, a[2 * half + i], 4 * group + member);
                y[i] = __shfl_sync(0xffffffffu, b[half], 4 * (column + i) + member);
            }
            for (int i = 0; i < 4; ++i) {
                d[i] = __fmaf_rn(__uint_as_float(x[i / 2] << 16), __uint_as_float(y[i % 2] << 16), d[i]);
                d[i] = __fmaf_rn(__uint_as_float(x[i / 2] & 0xffff0000u), __uint_as_float(y[i % 2] & 0xffff0000u), d[i]);
            }
        }
    }
#endif
}

// --- asynchronous copies into shared memory ---

__device__ inline void commit_copies() {
#if !defined(LOCALV4_HOST) && __CUDA_ARCH__ >= 800
    asm volatile("cp.async.commit_group;");
#endif
}

// Wait until at most `groups` of the committed groups of copies are on their way.
template <int groups>
__device__ inline void wait_for_copies() {
#if !defined(LOCALV4_HOST) && __CUDA_ARCH__ >= 800
    asm volatile("cp.async.wait_group %0;" :: "n"(groups));
#endif
}

// --- sums over a warp ---

__device__ inline float warp_sum(float value) {
    for (int distance = 16; distance > 0; distance /= 2)
        value += __shfl_xor_sync(0xffffffffu, value, distance);
    return value;
}

__device__ inline float warp_max(float value) {
    for (int distance = 16; distance > 0; distance /= 2)
        value = fmaxf(value, __shfl_xor_sync(0xffffffffu, value, distance));
    return value;
}
