"""Blocks of 32 columns with one half-precision scale each: Q8_0, Q4_0, IQ4_NL."""

import numpy as np
from numpy.typing import NDArray

from localv4.kernels.arrays import Floats, Scalar
from localv4.kernels.compiler import kernel
from localv4.kernels.device import device
from localv4.kernels.simd import Vector, broadcast_f32, multiply, splat_f32, store_f32, zeros_f32
from quant.quantizers.lanes import LINE, inverse, nearest_half, where_less
from quant.quantizers.scales import error_of, extreme, fit, write_codes
from quant.quantizers.tiles import LANES, add_errors, load_tile, store_codes, store_numbers

BLOCK = 32
SCRATCH_LINES = 2 * BLOCK + 2


@kernel(
    "void(i1[:,::1], f4[:,::1], f8[::1], Array(f4, 2, 'C', readonly=True), f4[::1], f4[::1],"
    " f4[::1], f4, f4, b1, i8)",
    family="quantize",
)
def search_single(
    codes: NDArray[np.int8],
    scales: Floats,
    errors: NDArray[np.float64],
    values: Floats,
    weights: Floats,
    scratch: Floats,
    fractions: Floats,
    low: Scalar,
    high: Scalar,
    curved: bool,
    polish: int,
) -> None:
    """Choose codes (rows, cols) and scales (rows, cols / 32) for values (rows, cols).

    Adds to errors (rows,). weights (cols,); scratch: SCRATCH_LINES vectors; fractions: the codes
    that the largest value of a block is mapped to in turn.
    """
    tile = scratch.ctypes.data
    out = tile + LINE * BLOCK
    low_code, high_code = splat_f32(low), splat_f32(high)
    for row in range(0, values.shape[0], LANES):
        for block in range(values.shape[1] // BLOCK):
            load_tile(scratch, values, row, BLOCK * block, BLOCK)
            own = weights.ctypes.data + 4 * BLOCK * block
            step = _best_half(
                tile,
                own,
                fractions.ctypes.data,
                fractions.size,
                low_code,
                high_code,
                curved,
                polish,
            )
            write_codes(out, tile, BLOCK, step, low_code, high_code, curved)
            store_f32(out + LINE * BLOCK, step)
            error = error_of(tile, own, BLOCK, step, low_code, high_code, curved)
            store_f32(out + LINE * (BLOCK + 1), error)
            store_codes(codes, scratch, BLOCK, row, BLOCK * block, BLOCK)
            store_numbers(scales, scratch, 2 * BLOCK, row, block, 1)
            add_errors(errors, scratch, 2 * BLOCK + 1, row)


@device
def _best_half(
    tile: int,
    weights: int,
    fractions: int,
    count: int,
    low: Vector,
    high: Vector,
    curved: bool,
    polish: int,
) -> Vector:
    """Return the best scale among halves; errors are taken with the scale as it is stored."""
    unit = inverse(extreme(tile, BLOCK))
    best = zeros_f32()
    least = error_of(tile, weights, BLOCK, best, low, high, curved)
    for k in range(count + polish):
        inverted = multiply(broadcast_f32(fractions + 4 * k), unit) if k < count else inverse(best)
        scale, _ = fit(tile, weights, BLOCK, inverted, low, high, curved)
        step = nearest_half(scale)
        error = error_of(tile, weights, BLOCK, step, low, high, curved)
        best = where_less(error, least, step, best)
        least = where_less(error, least, error, least)
    return best
