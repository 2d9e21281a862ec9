"""Superblocks of 256 columns, whose blocks have a scale and a least value: Q4_K, Q5_K, Q2_K.

value = d * scale * code - m * least, with two half-precision numbers d and m for a superblock and
whole numbers from 0 to `highest` as scale and least value of a block. First the best numbers of
each block are searched without bounds (`best_line`). Then several pairs of d and m are tried, each
with the whole numbers around the quotients; the best pair is refitted to scales and codes in turn.
"""

from typing import Any

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
    negative,
    splat_f32,
    store_f32,
    zeros_f32,
)
from quant.quantizers.lanes import (
    LINE,
    inverse,
    nearest_half,
    rounded,
    where_less,
)
from quant.quantizers.lines import best_line, line_error, plane_solution
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
SCRATCH_LINES = 2 * SUPERBLOCK + 6 * MOST_BLOCKS + 3

# Lines of scratch behind the tile: codes; scales and least values: free, chosen, on trial; d, m
_CODES = SUPERBLOCK
_FREE = 2 * SUPERBLOCK
_CHOSEN = _FREE + 2 * MOST_BLOCKS
_TRIAL = _CHOSEN + 2 * MOST_BLOCKS
_FACTORS = _TRIAL + 2 * MOST_BLOCKS
_ERROR = _FACTORS + 2


@kernel(
    "void(i1[:,::1], i1[:,::1], i1[:,::1], f4[:,::1], f4[:,::1], f8[::1],"
    " Array(f4, 2, 'C', readonly=True), f4[::1], f4[::1], f4[:,::1], f4[:,::1], i8, f4, f4, i8)",
    family="quantize",
)
def search_affine(
    codes: NDArray[np.int8],
    scales: NDArray[np.int8],
    minima: NDArray[np.int8],
    factors: Floats,
    floors: Floats,
    errors: NDArray[np.float64],
    values: Floats,
    weights: Floats,
    scratch: Floats,
    spans: Floats,
    ranges: Floats,
    n: int,
    high: Scalar,
    highest: Scalar,
    polish: int,
) -> None:
    """Choose codes (rows, cols), scales and minima (rows, cols / n), d and m (rows, cols / 256).

    Adds to errors (rows,). weights (cols,); scratch: SCRATCH_LINES vectors; spans (tries, 2): what
    the least and the largest value of a block are multiplied with, to be the ends of the codes;
    ranges (tries, 2): the numbers that the largest scale and least value of a superblock are
    mapped to. Codes lie in 0 ... high, scales and minima in 0 ... highest.
    """
    base = scratch.ctypes.data
    high_code, most = splat_f32(high), splat_f32(highest)
    blocks = SUPERBLOCK // n
    for row in range(0, values.shape[0], LANES):
        for i in range(values.shape[1] // SUPERBLOCK):
            col = SUPERBLOCK * i
            load_tile(scratch, values, row, col, SUPERBLOCK)
            own = weights.ctypes.data + 4 * col
            for block in range(blocks):
                tile = base + LINE * n * block
                own_weights = own + 4 * n * block
                scale, least = best_line(
                    tile, own_weights, n, spans.ctypes.data, spans.shape[0], high_code, polish
                )
                store_f32(base + LINE * (_FREE + block), scale)
                store_f32(base + LINE * (_FREE + MOST_BLOCKS + block), least)
            _choose(base, own, ranges.ctypes.data, ranges.shape[0], n, high_code, most, polish)
            _write(base, n, high_code)
            store_codes(codes, scratch, _CODES, row, col, SUPERBLOCK)
            store_codes(scales, scratch, _CHOSEN, row, blocks * i, blocks)
            store_codes(minima, scratch, _CHOSEN + MOST_BLOCKS, row, blocks * i, blocks)
            store_numbers(factors, scratch, _FACTORS, row, i, 1)
            store_numbers(floors, scratch, _FACTORS + 1, row, i, 1)
            add_errors(errors, scratch, _ERROR, row)


@device
def _choose(
    base: int,
    weights: int,
    ranges: int,
    count: int,
    n: int,
    high: Vector,
    most: Vector,
    polish: int,
) -> None:
    """Write the best d, m, scales, minima and error of a superblock to their lines."""
    unit, floor_unit = zeros_f32(), zeros_f32()
    for block in range(SUPERBLOCK // n):
        unit = at_least(load_f32(base + LINE * (_FREE + block)), unit)
        floor_unit = at_least(load_f32(base + LINE * (_FREE + MOST_BLOCKS + block)), floor_unit)
    best, best_floor = zeros_f32(), zeros_f32()
    chosen, trial = base + LINE * _CHOSEN, base + LINE * _TRIAL
    least = _try_factors(base, weights, best, best_floor, n, high, most)
    keep_better(chosen, trial, 2 * MOST_BLOCKS, zeros_f32(), splat_f32(np.float32(1)))
    for k in range(count + polish):
        if k < count:
            factor = multiply(unit, inverse(broadcast_f32(ranges + 8 * k)))
            floor = multiply(floor_unit, inverse(broadcast_f32(ranges + 8 * k + 4)))
        else:
            factor, floor = _refit(base, weights, best, best_floor, n, high)
        factor, floor = nearest_half(factor), nearest_half(floor)
        error = _try_factors(base, weights, factor, floor, n, high, most)
        keep_better(chosen, trial, 2 * MOST_BLOCKS, error, least)
        best = where_less(error, least, factor, best)
        best_floor = where_less(error, least, floor, best_floor)
        least = where_less(error, least, error, least)
    store_f32(base + LINE * _FACTORS, best)
    store_f32(base + LINE * (_FACTORS + 1), best_floor)
    store_f32(base + LINE * _ERROR, least)


@device
def _try_factors(
    base: int, weights: int, factor: Vector, floor: Vector, n: int, high: Vector, most: Vector
) -> Vector:
    """Choose scales and minima, each pair among nine, to the lines on trial; return the error."""
    inverted, floor_inverted, total = inverse(factor), inverse(floor), zeros_f32()
    zero = zeros_f32()
    for block in range(SUPERBLOCK // n):
        tile, own = base + LINE * n * block, weights + 4 * n * block
        free = load_f32(base + LINE * (_FREE + block))
        free_floor = load_f32(base + LINE * (_FREE + MOST_BLOCKS + block))
        middle = at_least(at_most(rounded(multiply(free, inverted)), most), zero)
        low = at_least(at_most(rounded(multiply(free_floor, floor_inverted)), most), zero)
        best, best_low = middle, low
        least = line_error(tile, own, n, multiply(factor, middle), multiply(floor, low), high)
        for i in range(9):
            up, side = splat_f32(np.float32(i // 3 - 1)), splat_f32(np.float32(i % 3 - 1))
            scale = at_least(at_most(add(middle, up), most), zero)
            minimum = at_least(at_most(add(low, side), most), zero)
            step, offset = multiply(factor, scale), multiply(floor, minimum)
            error = line_error(tile, own, n, step, offset, high)
            best = where_less(error, least, scale, best)
            best_low = where_less(error, least, minimum, best_low)
            least = where_less(error, least, error, least)
        store_f32(base + LINE * (_TRIAL + block), best)
        store_f32(base + LINE * (_TRIAL + MOST_BLOCKS + block), best_low)
        total = add(total, least)
    return total


@device
def _refit(base: int, weights: int, factor: Vector, floor: Vector, n: int, high: Vector) -> Any:
    """Return the best d and m for the chosen numbers and the codes that they have with these."""
    aa, ab, bb, ax, bx = zeros_f32(), zeros_f32(), zeros_f32(), zeros_f32(), zeros_f32()
    zero = zeros_f32()
    for block in range(SUPERBLOCK // n):
        scale = load_f32(base + LINE * (_CHOSEN + block))
        minimum = load_f32(base + LINE * (_CHOSEN + MOST_BLOCKS + block))
        inverted = inverse(multiply(factor, scale))
        offset = multiply(multiply(floor, minimum), inverted)
        for j in range(n * block, n * block + n):
            x = load_f32(base + LINE * j)
            q = at_least(at_most(rounded(multiply_add(x, inverted, offset)), high), zero)
            product, weight = multiply(q, scale), broadcast_f32(weights + 4 * j)
            weighted, below = multiply(weight, product), multiply(weight, minimum)
            aa = multiply_add(weighted, product, aa)
            ab = multiply_add(weighted, minimum, ab)
            bb = multiply_add(below, minimum, bb)
            ax = multiply_add(weighted, x, ax)
            bx = multiply_add(below, x, bx)
    return plane_solution(aa, negative(ab), bb, ax, negative(bx))


@device
def _write(base: int, n: int, high: Vector) -> None:
    """Write the codes of the chosen numbers."""
    factor, floor = load_f32(base + LINE * _FACTORS), load_f32(base + LINE * (_FACTORS + 1))
    for block in range(SUPERBLOCK // n):
        step = multiply(factor, load_f32(base + LINE * (_CHOSEN + block)))
        minimum = load_f32(base + LINE * (_CHOSEN + MOST_BLOCKS + block))
        inverted = inverse(step)
        offset = multiply(multiply(floor, minimum), inverted)
        for j in range(n * block, n * block + n):
            q = rounded(multiply_add(load_f32(base + LINE * j), inverted, offset))
            q = at_least(at_most(q, high), zeros_f32())
            store_f32(base + LINE * (_CODES + j), q)
