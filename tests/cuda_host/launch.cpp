// The entry point that the tests call; appended to a file of kernels.

namespace cuda_host {
#ifdef MERGED
typedef Merged Parameters;
#else
typedef Words Parameters;
#endif
static void (*kernel)(Parameters);
static const Parameters *arguments;
static void call() { kernel(*arguments); }
}

extern "C" void cuda_host_launch(void (*kernel)(cuda_host::Parameters), unsigned grid, unsigned block,
                                 unsigned shared_bytes, const cuda_host::Parameters *words) {
    using namespace cuda_host;
    constexpr size_t BEHIND = 4096;  // nothing may be written there
    std::vector<unsigned char> memory(shared_bytes + 128 + BEHIND, 0xcd);
    shared = (unsigned char *)(((uintptr_t)memory.data() + 127) & ~(uintptr_t)127);
    cuda_host::kernel = kernel;
    arguments = words;
    body = call;
    grid_size = {grid, 1, 1};
    block_size = {block, 1, 1};
    for (unsigned i = 0; i < grid; ++i) {
        cuda_host::block = {i, 0, 0};
        run_block();
    }
    for (size_t i = 0; i < BEHIND; ++i) {
        if (shared[shared_bytes + i] == 0xcd) continue;
        std::fprintf(stderr, "a CUDA kernel wrote behind its shared memory\n");
        std::abort();
    }
}
