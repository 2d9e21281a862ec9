// CUDA on the host, for tests: each thread of a block is a fiber, blocks run one after the other.
//
// A barrier or a shuffle lets the next fiber run until all that it waits for have arrived. When no
// fiber can go on, the kernel has deadlocked, and the process says so and ends.

#pragma once

#include <algorithm>
#include <array>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <vector>

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __shared__ static
#define __align__(n) __attribute__((aligned(n)))
#define __launch_bounds__(...)
#define __restrict__ __restrict
#define __noinline__
#define __grid_constant__
#define DYNAMIC_SHARED(name) unsigned char *name = cuda_host::shared

struct dim3 { unsigned x = 1, y = 1, z = 1; };
struct alignas(16) uint4 { unsigned x, y, z, w; };
struct alignas(8) uint2 { unsigned x, y; };
struct alignas(16) float4 { float x, y, z, w; };
struct alignas(8) float2 { float x, y; };
struct alignas(16) int4 { int x, y, z, w; };
struct alignas(8) int2 { int x, y; };
inline uint4 make_uint4(unsigned x, unsigned y, unsigned z, unsigned w) { return {x, y, z, w}; }
inline uint2 make_uint2(unsigned x, unsigned y) { return {x, y}; }
inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }
inline float2 make_float2(float x, float y) { return {x, y}; }
inline int4 make_int4(int x, int y, int z, int w) { return {x, y, z, w}; }
inline int2 make_int2(int x, int y) { return {x, y}; }

namespace cuda_host {

struct Fiber {
    void *stack_pointer = nullptr;
    std::vector<char> stack;
    bool done = false;
    dim3 thread;
};

extern "C" void cuda_host_switch(void **from, void *to);
#ifdef __x86_64__
asm(R"(
.text
.weak cuda_host_switch
cuda_host_switch:
    pushq %rbx
    pushq %rbp
    pushq %r12
    pushq %r13
    pushq %r14
    pushq %r15
    movq %rsp, (%rdi)
    movq %rsi, %rsp
    popq %r15
    popq %r14
    popq %r13
    popq %r12
    popq %rbp
    popq %rbx
    ret
)");
#else
#error "the host form of CUDA kernels needs x86-64"
#endif

constexpr size_t STACK_BYTES = 64 * 1024;
constexpr int WARP = 32;

inline std::vector<Fiber> fibers;
inline void *scheduler = nullptr;
inline int current = 0, live = 0;
inline dim3 block, block_size, grid_size;
inline unsigned char *shared = nullptr;
inline long long progress = 0;  // barriers passed and fibers ended: without it, a deadlock
inline void (*body)() = nullptr;

struct Barrier { int arrived = 0; long long generation = 0; };
inline Barrier whole_block;
inline std::vector<Barrier> warps;
inline std::vector<int> warp_live;
inline std::vector<std::array<unsigned long long, 64>> slots;  // of each warp: what lanes exchange

inline std::vector<std::array<unsigned, 192>> fragments;       // of each warp: operands of a product

inline void yield() { cuda_host_switch(&fibers[current].stack_pointer, scheduler); }

inline void wait(Barrier &barrier, const int &members) {
    long long mine = barrier.generation;
    ++barrier.arrived;
    while (barrier.generation == mine) {
        if (barrier.arrived >= members) {
            barrier.arrived = 0;
            ++barrier.generation;
            ++progress;
            return;
        }
        yield();
    }
}

inline int lane() { return current % WARP; }
inline int warp() { return current / WARP; }
inline void sync_warp() { wait(warps[warp()], warp_live[warp()]); }

inline void enter_fiber() {
    body();
    Fiber &own = fibers[current];
    own.done = true;
    --live;
    --warp_live[warp()];
    ++progress;
    cuda_host_switch(&own.stack_pointer, scheduler);
    std::abort();
}

inline void run_block() {
    int count = (int)(block_size.x * block_size.y * block_size.z);
    fibers.resize(count);
    int warp_count = (count + WARP - 1) / WARP;
    warps.assign(warp_count, Barrier());
    warp_live.assign(warp_count, WARP);
    warp_live.back() = count - (warp_count - 1) * WARP;
    slots.resize(warp_count);
    fragments.resize(warp_count);
    whole_block = Barrier();
    live = count;
    for (int i = 0; i < count; ++i) {
        Fiber &fiber = fibers[i];
        fiber.stack.resize(STACK_BYTES);
        fiber.done = false;
        fiber.thread = {i % block_size.x, i / block_size.x % block_size.y, i / (block_size.x * block_size.y)};
        uintptr_t top = ((uintptr_t)fiber.stack.data() + STACK_BYTES) & ~(uintptr_t)63;
        void **frame = (void **)(top - 8);
        *frame = nullptr;               // the return address of enter_fiber, never used
        *--frame = (void *)enter_fiber;
        for (int saved = 0; saved < 6; ++saved) *--frame = nullptr;
        fiber.stack_pointer = frame;
    }
    while (live > 0) {
        long long before = progress;
        for (int i = 0; i < count; ++i) {
            if (fibers[i].done) continue;
            current = i;
            cuda_host_switch(&scheduler, fibers[i].stack_pointer);
        }
        if (progress == before) {
            std::fprintf(stderr, "a CUDA kernel on the host has deadlocked\n");
            std::abort();
        }
    }
}

template <typename T>
T exchange(T value, int source) {
    static_assert(sizeof(T) <= 8, "a lane gives eight bytes at most");
    auto &own = slots[warp()];
    std::memcpy(&own[lane()], &value, sizeof(T));
    sync_warp();
    T result;
    std::memcpy(&result, &own[source & (WARP - 1)], sizeof(T));
    sync_warp();
    return result;
}

}  // namespace cuda_host

#define threadIdx (cuda_host::fibers[cuda_host::current].thread)
#define blockIdx (cuda_host::block)
#define blockDim (cuda_host::block_size)
#define gridDim (cuda_host::grid_size)
constexpr int warpSize = 32;

inline void __syncthreads() { cuda_host::wait(cuda_host::whole_block, cuda_host::live); }
inline void __syncwarp(unsigned = 0xffffffffu) { cuda_host::sync_warp(); }
inline void __threadfence() {}
inline void __threadfence_block() {}

template <typename T> T __shfl_sync(unsigned, T v, int lane) { return cuda_host::exchange(v, lane); }
template <typename T> T __shfl_xor_sync(unsigned, T v, int mask) { return cuda_host::exchange(v, cuda_host::lane() ^ mask); }
template <typename T> T __shfl_down_sync(unsigned, T v, int by) {
    int from = cuda_host::lane() + by;
    return cuda_host::exchange(v, from < 32 ? from : cuda_host::lane());
}
template <typename T> T __shfl_up_sync(unsigned, T v, int by) {
    int from = cuda_host::lane() - by;
    return cuda_host::exchange(v, from >= 0 ? from : cuda_host::lane());
}
inline unsigned __ballot_sync(unsigned, int yes) {
    unsigned result = 0;
    for (int i = 0; i < 32; ++i) result |= (unsigned)(cuda_host::exchange(yes != 0, i) ? 1 : 0) << i;
    return result;
}
inline int __any_sync(unsigned mask, int yes) { return __ballot_sync(mask, yes) != 0; }
inline int __all_sync(unsigned mask, int yes) { return __ballot_sync(mask, yes) == 0xffffffffu; }

inline int __float_as_int(float v) { int r; std::memcpy(&r, &v, 4); return r; }
inline unsigned __float_as_uint(float v) { unsigned r; std::memcpy(&r, &v, 4); return r; }
inline float __int_as_float(int v) { float r; std::memcpy(&r, &v, 4); return r; }
inline float __uint_as_float(unsigned v) { float r; std::memcpy(&r, &v, 4); return r; }
inline float __fmaf_rn(float a, float b, float c) { return std::fmaf(a, b, c); }
inline float __fmul_rn(float a, float b) { return a * b; }
inline float __fadd_rn(float a, float b) { return a + b; }
inline float __fsub_rn(float a, float b) { return a - b; }
inline float __fdiv_rn(float a, float b) { return a / b; }
inline float __fsqrt_rn(float a) { return std::sqrt(a); }
inline float __frcp_rn(float a) { return 1.0f / a; }
inline float rsqrtf(float a) { return 1.0f / std::sqrt(a); }
inline int __float2int_rn(float a) { return (int)std::nearbyintf(a); }
inline float __int2float_rn(int a) { return (float)a; }
inline int __popc(unsigned v) { return __builtin_popcount(v); }
inline int __clz(int v) { return v ? __builtin_clz((unsigned)v) : 32; }
inline int __ffs(int v) { return __builtin_ffs(v); }
inline int __dp4a(int a, int b, int c) {
    for (int i = 0; i < 4; ++i) c += (int)(int8_t)(a >> (8 * i)) * (int)(int8_t)(b >> (8 * i));
    return c;
}
// prmt.b32: the upper bit of a selector asks for the sign of a byte. __byte_perm has no such bit.
inline unsigned host_permute_bytes(unsigned a, unsigned b, unsigned s) {
    unsigned long long both = (unsigned long long)b << 32 | a;
    unsigned result = 0;
    for (int i = 0; i < 4; ++i) {
        unsigned selector = s >> (4 * i) & 15, byte = (unsigned)(both >> (8 * (selector & 7))) & 255;
        if (selector & 8) byte = byte & 128 ? 255 : 0;
        result |= byte << (8 * i);
    }
    return result;
}
inline unsigned __byte_perm(unsigned a, unsigned b, unsigned s) { return host_permute_bytes(a, b, s & 0x7777); }
template <typename T> T __ldg(const T *p) { return *p; }
using std::max;
using std::min;
template <typename T> T atomicAdd(T *p, T v) { T old = *p; *p = old + v; return old; }
template <typename T> T atomicMax(T *p, T v) { T old = *p; *p = std::max(old, v); return old; }
template <typename T> T atomicMin(T *p, T v) { T old = *p; *p = std::min(old, v); return old; }
template <typename T> T atomicExch(T *p, T v) { T old = *p; *p = v; return old; }
template <typename T> T atomicCAS(T *p, T c, T v) { T old = *p; if (old == c) *p = v; return old; }
template <typename T> T atomicOr(T *p, T v) { T old = *p; *p = old | v; return old; }

inline float host_half_to_float(uint16_t bits) {
    _Float16 value;
    std::memcpy(&value, &bits, 2);
    return (float)value;
}

// Fragments as the PTX manual has them: lane = 4 * group + member.
struct HostFragments { unsigned a[4][32], b[2][32]; };

inline void host_exchange(HostFragments &all, const unsigned (&a)[4], const unsigned (&b)[2]) {
    auto &shared = cuda_host::fragments[cuda_host::warp()];
    int lane = cuda_host::lane();
    for (int i = 0; i < 4; ++i) shared[32 * i + lane] = a[i];
    for (int i = 0; i < 2; ++i) shared[128 + 32 * i + lane] = b[i];
    cuda_host::sync_warp();
    std::memcpy(&all, shared.data(), sizeof all);
    cuda_host::sync_warp();
}

inline void host_mma_s8(int (&d)[4], const unsigned (&a)[4], const unsigned (&b)[2], const int (&c)[4]) {
    HostFragments all;
    host_exchange(all, a, b);
    int group = cuda_host::lane() / 4, member = cuda_host::lane() % 4;
    for (int i = 0; i < 4; ++i) {
        int row = group + 8 * (i / 2), col = 2 * member + i % 2, sum = c[i];
        for (int k = 0; k < 32; ++k) {
            int owner = k % 16 / 4, byte = k % 4;
            int x = (int8_t)(all.a[row / 8 + 2 * (k / 16)][4 * (row % 8) + owner] >> (8 * byte));
            int y = (int8_t)(all.b[k / 16][4 * col + owner] >> (8 * byte));
            sum += x * y;
        }
        d[i] = sum;
    }
}

inline void host_mma_bf16(float (&d)[4], const unsigned (&a)[4], const unsigned (&b)[2], const float (&c)[4]) {
    HostFragments all;
    host_exchange(all, a, b);
    int group = cuda_host::lane() / 4, member = cuda_host::lane() % 4;
    for (int i = 0; i < 4; ++i) {
        int row = group + 8 * (i / 2), col = 2 * member + i % 2;
        double sum = c[i];
        for (int k = 0; k < 16; ++k) {
            int owner = k % 8 / 2, half = k % 2;
            float x = __uint_as_float((all.a[row / 8 + 2 * (k / 8)][4 * (row % 8) + owner] >> (16 * half)) << 16);
            float y = __uint_as_float((all.b[k / 8][4 * col + owner] >> (16 * half)) << 16);
            sum += (double)x * y;
        }
        d[i] = (float)sum;
    }
}
