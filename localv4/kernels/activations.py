"""Activations as int8, for products with packed weights of any integer format.

Of a row of n activations (n a multiple of 32) there are three buffers, one entry for each block of
32; rows follow one another, those of q with a line between them, so that equal columns of many rows
do not fall into the same sets of a cache:

| buffer | bytes of a row | holds                                                        |
|--------|----------------|--------------------------------------------------------------|
| q      | n + 64         | int8: x * 127 / size, rounded to nearest even                |
| d      | n / 32 * 4     | float32 scale: size / 127, size the largest absolute value   |
| b      | n / 32 * 16    | four int32 of q: -bias * sum for 4-bit weights, the same for |
|        |                | 8-bit weights, the sum of columns 0 ... 15, that of 16 ... 31 |

The first two sums are where a product starts: on x86 weights are unsigned, value + bias
(`kernels.isa`); where they are not, the bias is 0. The others are for weights with a minimum. Sizes
below 1e-30 count as 1e-30, so that nothing overflows. A block with NaN or infinity gets such a
scale, and so do all products with it: no error is lost.

`binary` scales are the least powers of two that are not less than size / 127, so that tiles of AMX
can multiply q * d as bfloat16 (`kernels.pair_gemm`); that costs half a bit of a code on average.
"""

import numpy as np

from localv4.kernels.device import device
from localv4.kernels.isa import ISA
from localv4.kernels.packed import BLOCK
from localv4.kernels.pairs import store_pairs
from localv4.kernels.simd import (
    Vector,
    add,
    at_least,
    at_most,
    divide,
    largest_i32,
    largest_magnitude,
    load_f32,
    magnitudes,
    multiply,
    multiply_add,
    negative,
    power_of_two,
    power_of_two_above,
    round_i32,
    splat_f32,
    store_i8,
    sum_i32,
    to_f32,
    write_f32,
    write_i32,
)

SMALLEST = np.float32(1e-30)
LEVELS = np.float32(127)
PER_LEVEL = np.float32(1 / 127)
_CODE_BIAS = np.int32(-ISA.code_bias)
_BYTE_BIAS = np.int32(-ISA.byte_bias)

# exp(x) = 2^n * p(r) with n whole and |r| <= ln(2) / 2 (Cephes `expf`, 2 ulp)
_LOG2_E = np.float32(1.44269504)
_LN2_HIGH, _LN2_LOW = np.float32(0.693359375), np.float32(-2.12194440e-4)
_P5, _P4, _P3 = (
    np.float32(1.9875691500e-4),
    np.float32(1.3981999507e-3),
    np.float32(8.3334519073e-3),
)
_P2, _P1, _P0 = np.float32(4.1665795894e-2), np.float32(1.6666665459e-1), np.float32(0.5)
_ONE = np.float32(1)
_EXP_LOW, _EXP_HIGH = np.float32(-87), np.float32(88)


Q_GAP = 64
"""Bytes between two rows of q."""

SUMS_BYTES = 16
"""Bytes of the sums of a block."""


@device
def q_row(cols: int) -> int:
    """Return the bytes from a row of q to the next."""
    return cols + Q_GAP


@device
def d_row(cols: int) -> int:
    """Return the bytes from a row of d to the next."""
    return cols // BLOCK * 4


@device
def b_row(cols: int) -> int:
    """Return the bytes from a row of b to the next."""
    return cols // BLOCK * SUMS_BYTES


def row_bytes(cols: int) -> tuple[int, int, int]:
    """Return the bytes from a row to the next of q, d and b, for callers outside of kernels."""
    return cols + Q_GAP, cols // BLOCK * 4, cols // BLOCK * SUMS_BYTES


@device
def quantize(q: int, d: int, b: int, x: int, first: int, end: int, binary: int) -> None:
    """Fill blocks first ... end - 1 of a row of the buffers q, d, b from the float32 at x."""
    for i in range(first, end):
        low, high = load_f32(x + 128 * i), load_f32(x + 128 * i + 64)
        quantize_block(q + 32 * i, d + 4 * i, b + SUMS_BYTES * i, low, high, binary)


@device
def widen(pairs: int, distance: int, q: int, d: int, first: int, end: int) -> None:
    """Fill blocks first ... end - 1 of a row of pairs from those of the buffers q and d."""
    for i in range(first, end):
        store_pairs(pairs + distance * i, q + 32 * i, d + 4 * i)


@device
def quantize_block(q: int, d: int, b: int, low: Vector, high: Vector, binary: int) -> None:
    """Write one block of the buffers from its two vectors; `binary` is 0 or 1."""
    size = at_least_smallest(largest_magnitude(largest_i32(magnitudes(low), magnitudes(high))))
    scale, inverse = size * PER_LEVEL, LEVELS / size
    if binary:
        scale = power_of_two_above(scale)
        inverse = _ONE / scale
    factor = splat_f32(inverse)
    low_q, high_q = round_i32(multiply(low, factor)), round_i32(multiply(high, factor))
    store_i8(q, low_q)
    store_i8(q + 16, high_q)
    write_f32(d, scale)
    low_sum, high_sum = sum_i32(low_q), sum_i32(high_q)
    write_i32(b, np.int32((low_sum + high_sum) * _CODE_BIAS))
    write_i32(b + 4, np.int32((low_sum + high_sum) * _BYTE_BIAS))
    write_i32(b + 8, low_sum)
    write_i32(b + 12, high_sum)


@device
def at_least_smallest(size: np.float32) -> np.float32:
    """Return the size of a block, SMALLEST if it is less; NaN stays NaN."""
    return SMALLEST if size < SMALLEST else size


@device
def exp(x: Vector) -> Vector:
    """e^x within 2 ulp; x is taken as -87 ... 88, NaN stays NaN."""
    x = at_least(at_most(x, splat_f32(_EXP_HIGH)), splat_f32(_EXP_LOW))
    n = round_i32(multiply(x, splat_f32(_LOG2_E)))
    whole = negative(to_f32(n))
    r = multiply_add(whole, splat_f32(_LN2_HIGH), x)
    r = multiply_add(whole, splat_f32(_LN2_LOW), r)
    p = multiply_add(splat_f32(_P5), r, splat_f32(_P4))
    p = multiply_add(p, r, splat_f32(_P3))
    p = multiply_add(p, r, splat_f32(_P2))
    p = multiply_add(p, r, splat_f32(_P1))
    p = multiply_add(p, r, splat_f32(_P0))
    p = multiply_add(p, multiply(r, r), r)
    return multiply_add(p, power_of_two(n), power_of_two(n))


@device
def swiglu(gate: Vector, up: Vector, limit: np.float32) -> Vector:
    """silu(min(gate, limit)) * clip(up, -limit, limit)"""
    gate = at_most(gate, splat_f32(limit))
    up = at_least(at_most(up, splat_f32(limit)), splat_f32(-limit))
    return multiply(divide(gate, add(exp(negative(gate)), splat_f32(_ONE))), up)
