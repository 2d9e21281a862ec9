"""Groups of eight columns rounded to points of a lattice: IQ2_XXS.

value = d * (2 * scale + 1) / 8 * magnitude * sign. A block of 32 columns has a scale from 0 to 15;
each of its four groups has one of 256 points, which are eight magnitudes out of 8, 25, 43, and
eight signs, of which an even number is minus. So where the number of negative values is odd, the
value that matters least gets the wrong sign.

For magnitudes x of a group (the one with the wrong sign negative) and a step s the point g is best
that has the largest *score* sum w x g - s / 2 sum w g^2: the error is sum w x^2 - 2 s score. All
256 are tried. The second sum does not depend on the row (`norms_of`).
"""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from localv4.kernels.arrays import Bytes, Floats
from localv4.kernels.compiler import kernel
from localv4.kernels.device import device
from localv4.kernels.iquants import GRID
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
    magnitude,
    nearest_half,
    rounded,
    subtract,
    where_less,
)
from quant.quantizers.tiles import (
    LANES,
    add_errors,
    load_tile,
    store_bytes,
    store_codes,
    store_numbers,
)

SUPERBLOCK, BLOCK, GROUP = 256, 32, 8
BLOCKS, GROUPS, POINTS = SUPERBLOCK // BLOCK, SUPERBLOCK // GROUP, len(GRID)
MOST_SCALE = 15.0
LARGEST_MAGNITUDE = 43.0

# Lines of scratch: values, then magnitudes, then signs of all columns; by block: free step,
# chosen scale, scale on trial; by group: the point; then d and the error
_SIZES = SUPERBLOCK
SIGNS = 2 * SUPERBLOCK
_FREE = 3 * SUPERBLOCK
_CHOSEN = _FREE + BLOCKS
_TRIAL = _CHOSEN + BLOCKS
POINT = _TRIAL + BLOCKS
_FACTOR = POINT + GROUPS
_ERROR = _FACTOR + 1
SCRATCH_LINES = _ERROR + 1

_SOURCE = "Array(f4, 2, 'C', readonly=True)"


def norms_of(weights: Floats) -> Floats:
    """Return half of sum w g^2 for every group of columns and every point (cols / 8, 256)."""
    groups = weights.reshape(-1, GROUP).astype(np.float64)
    norms: Floats = (0.5 * np.einsum("gj,pj->gp", groups, GRID**2)).astype(np.float32)
    return norms


@kernel(
    f"void(u1[:,::1], u1[:,::1], i1[:,::1], f4[:,::1], f8[::1], {_SOURCE}, f4[::1], f4[:,::1],"
    f" {_SOURCE}, f4[::1], f4[::1], f4[::1])",
    family="quantize",
)
def search_lattice(
    points: Bytes,
    signs: Bytes,
    scales: NDArray[np.int8],
    factors: Floats,
    errors: NDArray[np.float64],
    values: Floats,
    weights: Floats,
    norms: Floats,
    grid: Floats,
    scratch: Floats,
    fractions: Floats,
    ranges: Floats,
) -> None:
    """Choose points and signs (rows, cols / 8), scales (rows, cols / 32), d (rows, cols / 256).

    Bit j of signs says that column j of the group is negative. Adds to errors (rows,). weights
    (cols,), `norms_of` them, grid (256, 8): the points. scratch: SCRATCH_LINES vectors; fractions:
    what the largest magnitude of a block is mapped to, as multiples of that of the points; ranges:
    what the largest step of a superblock is mapped to.
    """
    base, table = scratch.ctypes.data, grid.ctypes.data
    for row in range(0, values.shape[0], LANES):
        for i in range(values.shape[1] // SUPERBLOCK):
            load_tile(scratch, values, row, SUPERBLOCK * i, SUPERBLOCK)
            own = weights.ctypes.data + 4 * SUPERBLOCK * i
            own_norms = norms.ctypes.data + 4 * POINTS * GROUPS * i
            energy = zeros_f32()
            for j in range(SUPERBLOCK):
                x, w = load_f32(base + LINE * j), broadcast_f32(own + 4 * j)
                energy = multiply_add(multiply(w, x), x, energy)
            for group in range(GROUPS):
                split(base, GROUP * group, own)
            for block in range(BLOCKS):
                _find_step(base, block, own, own_norms, table, fractions)
            reduction = _choose(base, own, own_norms, table, ranges)
            store_f32(base + LINE * _ERROR, at_least(subtract(energy, reduction), zeros_f32()))
            store_bytes(points, scratch, POINT, row, GROUPS * i, GROUPS)
            store_signs(signs, scratch, row, GROUPS * i)
            store_codes(scales, scratch, _CHOSEN, row, BLOCKS * i, BLOCKS)
            store_numbers(factors, scratch, _FACTOR, row, i, 1)
            add_errors(errors, scratch, _ERROR, row)


@device
def store_signs(out: Bytes, scratch: Floats, row: int, first: int) -> None:
    """Write the signs of a superblock as bits, for groups from `first` on."""
    for lane in range(min(LANES, out.shape[0] - row)):
        for group in range(GROUPS):
            bits = 0
            for j in range(GROUP):
                line = SIGNS + GROUP * group + j
                bits |= (1 << j) if scratch[LANES * line + lane] < np.float32(0) else 0
            out[row + lane, first + group] = np.uint8(bits)


@device
def split(base: int, first: int, weights: int) -> None:
    """Write magnitudes and signs of a group; the signs get an even number of minus."""
    one, zero = splat_f32(np.float32(1)), zeros_f32()
    parity, least, place = one, splat_f32(np.float32(3e38)), zero
    for j in range(first, first + GROUP):
        x = load_f32(base + LINE * j)
        sign = where_less(x, zero, negative(one), one)
        parity = multiply(parity, sign)
        size = magnitude(x)
        matters = multiply(broadcast_f32(weights + 4 * j), size)
        place = where_less(matters, least, splat_f32(np.float32(j)), place)
        least = where_less(matters, least, matters, least)
        store_f32(base + LINE * (_SIZES + j), size)
        store_f32(base + LINE * (SIGNS + j), sign)
    for j in range(first, first + GROUP):
        apart = magnitude(subtract(place, splat_f32(np.float32(j))))
        turn = where_less(apart, splat_f32(np.float32(0.5)), parity, one)
        for lines in (_SIZES, SIGNS):
            at = base + LINE * (lines + j)
            store_f32(at, multiply(turn, load_f32(at)))


@device
def best_point(base: int, group: int, weights: int, norms: int, table: int, step: Vector) -> Any:
    """Return the number of the best point, its score, and sum w x g."""
    first = GROUP * group
    at, own = base + LINE * (_SIZES + first), weights + 4 * first
    x0 = multiply(broadcast_f32(own), load_f32(at))
    x1 = multiply(broadcast_f32(own + 4), load_f32(at + LINE))
    x2 = multiply(broadcast_f32(own + 8), load_f32(at + 2 * LINE))
    x3 = multiply(broadcast_f32(own + 12), load_f32(at + 3 * LINE))
    x4 = multiply(broadcast_f32(own + 16), load_f32(at + 4 * LINE))
    x5 = multiply(broadcast_f32(own + 20), load_f32(at + 5 * LINE))
    x6 = multiply(broadcast_f32(own + 24), load_f32(at + 6 * LINE))
    x7 = multiply(broadcast_f32(own + 28), load_f32(at + 7 * LINE))
    down = negative(step)
    best, score, product = zeros_f32(), splat_f32(np.float32(-3e38)), zeros_f32()
    for number in range(POINTS):
        point = table + 4 * GROUP * number
        low = multiply(broadcast_f32(point), x0)
        high = multiply(broadcast_f32(point + 4), x1)
        low = multiply_add(broadcast_f32(point + 8), x2, low)
        high = multiply_add(broadcast_f32(point + 12), x3, high)
        low = multiply_add(broadcast_f32(point + 16), x4, low)
        high = multiply_add(broadcast_f32(point + 20), x5, high)
        low = multiply_add(broadcast_f32(point + 24), x6, low)
        high = multiply_add(broadcast_f32(point + 28), x7, high)
        own_product = add(low, high)
        norm = broadcast_f32(norms + 4 * (POINTS * group + number))
        own_score = multiply_add(down, norm, own_product)
        best = where_less(score, own_score, splat_f32(np.float32(number)), best)
        product = where_less(score, own_score, own_product, product)
        score = at_least(own_score, score)
    return best, score, product


@device
def _try_step(base: int, block: int, weights: int, norms: int, table: int, step: Vector) -> Any:
    """Return for a block the sums of w x g and of w g^2 / 2 over the best points."""
    products, norm = zeros_f32(), zeros_f32()
    inverted = inverse(step)
    for group in range(4 * block, 4 * block + 4):
        best, score, product = best_point(base, group, weights, norms, table, step)
        store_f32(base + LINE * (POINT + group), best)
        products = add(products, product)
        norm = multiply_add(subtract(product, score), inverted, norm)
    return products, norm


@device
def _reduction(step: Vector, products: Vector, norm: Vector) -> Vector:
    """Return by how much a step makes the error smaller than the energy."""
    half = multiply(step, subtract(products, multiply(step, norm)))
    return add(half, half)


@device
def _find_step(
    base: int, block: int, weights: int, norms: int, table: int, fractions: Floats
) -> None:
    """Write the best step of a block, without bounds."""
    largest = zeros_f32()
    for j in range(BLOCK * block, BLOCK * block + BLOCK):
        largest = at_least(magnitude(load_f32(base + LINE * j)), largest)
    unit = multiply(largest, splat_f32(np.float32(1 / LARGEST_MAGNITUDE)))
    best, most = zeros_f32(), zeros_f32()
    for k in range(fractions.size):
        step = multiply(unit, splat_f32(np.float32(1) / fractions[k]))
        products, norm = _try_step(base, block, weights, norms, table, step)
        # the best step for these points: half of products / norm, which sums half of the squares
        step = multiply(multiply(products, splat_f32(np.float32(0.5))), inverse(norm))
        own = _reduction(step, products, norm)
        best = where_less(most, own, step, best)
        most = at_least(own, most)
    store_f32(base + LINE * (_FREE + block), best)


@device
def _choose(base: int, weights: int, norms: int, table: int, ranges: Floats) -> Vector:
    """Write the best d, scales and points of a superblock; return the reduction of its error."""
    unit = zeros_f32()
    for block in range(BLOCKS):
        unit = at_least(load_f32(base + LINE * (_FREE + block)), unit)
        store_f32(base + LINE * (_CHOSEN + block), zeros_f32())
    best, most = zeros_f32(), zeros_f32()
    for k in range(ranges.size + 1):
        if k < ranges.size:
            factor = multiply(unit, splat_f32(np.float32(8) / ranges[k]))
        else:
            factor = _refit(base, weights, norms, table, best)
        factor = nearest_half(factor)
        total = zeros_f32()
        for block in range(BLOCKS):
            total = add(total, _try_scales(base, block, weights, norms, table, factor))
        for block in range(BLOCKS):
            at = base + LINE * (_CHOSEN + block)
            trial = load_f32(base + LINE * (_TRIAL + block))
            store_f32(at, where_less(most, total, trial, load_f32(at)))
        best = where_less(most, total, factor, best)
        most = at_least(total, most)
    store_f32(base + LINE * _FACTOR, best)
    total = zeros_f32()
    for block in range(BLOCKS):
        step = _step(best, load_f32(base + LINE * (_CHOSEN + block)))
        products, norm = _try_step(base, block, weights, norms, table, step)
        total = add(total, _reduction(step, products, norm))
    return total


@device
def _step(factor: Vector, scale: Vector) -> Vector:
    """Return d * (2 * scale + 1) / 8."""
    odd = multiply_add(scale, splat_f32(np.float32(2)), splat_f32(np.float32(1)))
    return multiply(multiply(factor, splat_f32(np.float32(0.125))), odd)


@device
def _try_scales(
    base: int, block: int, weights: int, norms: int, table: int, factor: Vector
) -> Vector:
    """Write the best of three scales of a block to the lines on trial; return its reduction."""
    # step / d * 8 = 2 * scale + 1
    place = multiply(load_f32(base + LINE * (_FREE + block)), inverse(factor))
    place = multiply_add(place, splat_f32(np.float32(4)), splat_f32(np.float32(-0.5)))
    middle = rounded(place)
    best, most = zeros_f32(), splat_f32(np.float32(-3e38))
    for k in range(3):
        scale = add(middle, splat_f32(np.float32(k - 1)))
        scale = at_least(at_most(scale, splat_f32(np.float32(MOST_SCALE))), zeros_f32())
        step = _step(factor, scale)
        products, norm = _try_step(base, block, weights, norms, table, step)
        own = _reduction(step, products, norm)
        best = where_less(most, own, scale, best)
        most = at_least(own, most)
    store_f32(base + LINE * (_TRIAL + block), best)
    return most


@device
def _refit(base: int, weights: int, norms: int, table: int, factor: Vector) -> Vector:
    """Return the best d for the chosen scales and the points that they have with this d."""
    products, squares = zeros_f32(), zeros_f32()
    for block in range(BLOCKS):
        scale = load_f32(base + LINE * (_CHOSEN + block))
        own, norm = _try_step(base, block, weights, norms, table, _step(factor, scale))
        odd = multiply_add(scale, splat_f32(np.float32(2)), splat_f32(np.float32(1)))
        products = multiply_add(own, odd, products)
        squares = multiply_add(multiply(norm, odd), odd, squares)
    # d / 8 = products / (2 * squares), since norms are half of the squares
    return multiply(multiply(products, inverse(squares)), splat_f32(np.float32(4)))
