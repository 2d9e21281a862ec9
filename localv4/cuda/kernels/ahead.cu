// Weights on their way into the second cache before the products that want them: while operations
// that move little do their work, the memory would rest.

#include "common.cuh"

#if !defined(LOCALV4_HOST) && __CUDA_ARCH__ >= 900
constexpr int FETCHED = 2048;  // bytes that a thread asks for at a time
#else
constexpr int FETCHED = 128;
#endif

__device__ inline void fetch(const char *address, i64 bytes) {
#if !defined(LOCALV4_HOST) && __CUDA_ARCH__ >= 900
    asm volatile("cp.async.bulk.prefetch.L2.global [%0], %1;" :: "l"(address), "r"((u32)bytes) : "memory");
#else
    prefetch_far(address);
#endif
}

// Words: up to nine pairs of an address and bytes, multiples of 16; an address of 0 ends them.
KERNEL(fetch_ahead) {
    i64 start = ((i64)op.block() * blockDim.x + threadIdx.x) * FETCHED, step = (i64)op.blocks() * blockDim.x * FETCHED;
    for (int i = 1; i < 19 && op.number(i) != 0; i += 2)
        for (i64 at = start; at < op.number(i + 1); at += step)
            fetch(op.address<char>(i) + at, min((i64)FETCHED, op.number(i + 1) - at));
}
