// Products of a matrix with many tokens: twins of `many_tokens.share_gemm`.

#include "gemm_formats.cuh"

#define GEMMS(prefix, Format, stages, superblocks)               \
    GEMM(prefix##_gemm_8, Format, 1, 1, 2, 3, superblocks, 8)    \
    GEMM(prefix##_gemm_16, Format, 1, 2, 2, 3, superblocks, 8)   \
    GEMM(prefix##_gemm_32, Format, 1, 4, 4, stages, 1, 4)        \
    GEMM(prefix##_gemm_64, Format, 2, 8, 4, stages, 1, 3)        \
    GEMM(prefix##_gemm_128, Format, 2, 16, 4, stages, 1, 2)

GEMMS(mx4, Mx4Tiles, 2, 2)
GEMMS(q4, Q4Tiles, 3, 4)
GEMMS(q8, Q8Tiles, 3, 4)
