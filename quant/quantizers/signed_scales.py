"""Superblocks of 256 columns, whose blocks have whole numbers as scales: Q6_K, Q3_K, IQ4_XS.

value = d * scale * code, with one half-precision d for a superblock. The best scale of each block
is searched first, without bounds. Then several d are tried, each with the whole numbers around the
quotient as scales; the best d is refitted to scales and codes in turn:
d = sum w (scale code) x / sum w (scale code)^2.
"""

import numpy as np
from numpy.typing import NDArray

from localv4.kernels.arrays import Floats, Scalar
from localv4.kernels.compiler import kernel
from localv4.kernels.device import device
from localv4.kernels.simd import (
    Vector,
    add,
    at_least,
    at_most,
    broadcast_f32,
    load_f32,
    multiply,
    multiply_add,
    splat_f32,
    store_f32,
    zeros_f32,
)
from quant.quantizers.lanes import LINE, inverse, nearest_half, rounded, where_less
from quant.quantizers.scales import best_scale, error_of, extreme, nearest_code, write_codes
from quant.quantizers.tiles import (
    LANES,
    add_errors,
    keep_better,
    load_tile,
    store_codes,
    store_numbers,
)

SUPERBLOCK = 256
MOST_BLOCKS = 16
SCRATCH_LINES = 2 * SUPERBLOCK + 3 * MOST_BLOCKS + 2

# Lines of scratch behind the tile: codes; scales: free, chosen, on trial; d; error
_CODES = SUPERBLOCK
_FREE = 2 * SUPERBLOCK
_CHOSEN = _FREE + MOST_BLOCKS
_TRIAL = _CHOSEN + MOST_BLOCKS
_FACTOR = _TRIAL + MOST_BLOCKS
_ERROR = _FACTOR + 1


@kernel(
    "void(i1[:,::1], i1[:,::1], f4[:,::1], f8[::1], Array(f4, 2, 'C', readonly=True), f4[::1],"
    " f4[::1], f4[::1], f4[::1], i8, f4, f4, f4, f4, b1, i8)",
    family="quantize",
)
def search_signed(
    codes: NDArray[np.int8],
    scales: NDArray[np.int8],
    factors: Floats,
    errors: NDArray[np.float64],
    values: Floats,
    weights: Floats,
    scratch: Floats,
    fractions: Floats,
    ranges: Floats,
    n: int,
    low: Scalar,
    high: Scalar,
    lowest: Scalar,
    highest: Scalar,
    curved: bool,
    polish: int,
) -> None:
    """Choose codes (rows, cols), scales (rows, cols / n), d (rows, cols / 256) for values.

    Adds to errors (rows,). weights (cols,); scratch: SCRATCH_LINES vectors; fractions: the codes
    that the largest value of a block is mapped to in turn; ranges: the scales that the largest one
    of a superblock is mapped to. Codes lie in low ... high, scales in lowest ... highest.
    """
    base = scratch.ctypes.data
    bounds = (splat_f32(low), splat_f32(high), splat_f32(lowest), splat_f32(highest))
    blocks = SUPERBLOCK // n
    for row in range(0, values.shape[0], LANES):
        for i in range(values.shape[1] // SUPERBLOCK):
            col = SUPERBLOCK * i
            load_tile(scratch, values, row, col, SUPERBLOCK)
            own = weights.ctypes.data + 4 * col
            for block in range(blocks):
                free = best_scale(
                    base + LINE * n * block,
                    own + 4 * n * block,
                    n,
                    fractions.ctypes.data,
                    fractions.size,
                    bounds[0],
                    bounds[1],
                    curved,
                    polish,
                )
                store_f32(base + LINE * (_FREE + block), free)
            _choose(base, own, ranges.ctypes.data, ranges.size, n, bounds, curved, polish)
            _write(base, n, bounds, curved)
            store_codes(codes, scratch, _CODES, row, col, SUPERBLOCK)
            store_codes(scales, scratch, _CHOSEN, row, blocks * i, blocks)
            store_numbers(factors, scratch, _FACTOR, row, i, 1)
            add_errors(errors, scratch, _ERROR, row)


@device
def _choose(
    base: int,
    weights: int,
    ranges: int,
    count: int,
    n: int,
    bounds: Vector,
    curved: bool,
    polish: int,
) -> None:
    """Write the best d, scales and error of a superblock to their lines."""
    unit = extreme(base + LINE * _FREE, SUPERBLOCK // n)
    best = zeros_f32()
    chosen, trial = base + LINE * _CHOSEN, base + LINE * _TRIAL
    least = _try_factor(base, weights, best, n, bounds, curved)
    keep_better(chosen, trial, SUPERBLOCK // n, zeros_f32(), splat_f32(np.float32(1)))
    for k in range(count + polish):
        if k < count:
            factor = multiply(unit, inverse(broadcast_f32(ranges + 4 * k)))
        else:
            factor = _refit(base, weights, best, n, bounds, curved)
        factor = nearest_half(factor)
        error = _try_factor(base, weights, factor, n, bounds, curved)
        keep_better(chosen, trial, SUPERBLOCK // n, error, least)
        best = where_less(error, least, factor, best)
        least = where_less(error, least, error, least)
    store_f32(base + LINE * _FACTOR, best)
    store_f32(base + LINE * _ERROR, least)


@device
def _try_factor(
    base: int, weights: int, factor: Vector, n: int, bounds: Vector, curved: bool
) -> Vector:
    """Choose the scales for a d, each among three, to the lines on trial; return the error."""
    low, high, lowest, highest = bounds
    inverted, total = inverse(factor), zeros_f32()
    for block in range(SUPERBLOCK // n):
        tile, own = base + LINE * n * block, weights + 4 * n * block
        middle = rounded(multiply(load_f32(base + LINE * (_FREE + block)), inverted))
        middle = at_least(at_most(middle, highest), lowest)
        best = middle
        least = error_of(tile, own, n, multiply(factor, middle), low, high, curved)
        for offset in range(-1, 2, 2):
            scale = add(middle, splat_f32(np.float32(offset)))
            scale = at_least(at_most(scale, highest), lowest)
            error = error_of(tile, own, n, multiply(factor, scale), low, high, curved)
            best = where_less(error, least, scale, best)
            least = where_less(error, least, error, least)
        store_f32(base + LINE * (_TRIAL + block), best)
        total = add(total, least)
    return total


@device
def _refit(base: int, weights: int, factor: Vector, n: int, bounds: Vector, curved: bool) -> Vector:
    """Return the best d for the chosen scales and the codes that they have with this d."""
    xq, qq = zeros_f32(), zeros_f32()
    for block in range(SUPERBLOCK // n):
        scale = load_f32(base + LINE * (_CHOSEN + block))
        inverted = inverse(multiply(factor, scale))
        for j in range(n * block, n * block + n):
            x = load_f32(base + LINE * j)
            q = nearest_code(multiply(x, inverted), bounds[0], bounds[1], curved)
            product = multiply(q, scale)
            weighted = multiply(broadcast_f32(weights + 4 * j), product)
            xq = multiply_add(weighted, x, xq)
            qq = multiply_add(weighted, product, qq)
    return multiply(xq, inverse(qq))


@device
def _write(base: int, n: int, bounds: Vector, curved: bool) -> None:
    """Write the codes of the chosen scales."""
    factor = load_f32(base + LINE * _FACTOR)
    for block in range(SUPERBLOCK // n):
        step = multiply(factor, load_f32(base + LINE * (_CHOSEN + block)))
        at = LINE * n * block
        write_codes(base + LINE * _CODES + at, base + at, n, step, bounds[0], bounds[1], curved)
