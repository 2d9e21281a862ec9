"""Blocks of 32 columns of E2M1 with a power of two as scale: MXFP4."""

import numpy as np
from numpy.typing import NDArray

from localv4.kernels.arrays import Floats
from localv4.kernels.compiler import kernel
from localv4.kernels.device import device
from localv4.kernels.simd import (
    Vector,
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
from quant.quantizers.lanes import (
    LINE,
    e2m1_code,
    e2m1_level,
    inverse,
    power_below,
    subtract,
    where_less,
)
from quant.quantizers.scales import extreme
from quant.quantizers.tiles import LANES, load_tile, store_codes, store_numbers

BLOCK = 32
SCRATCH_LINES = 2 * BLOCK + 2

# A quarter of the power of two below the largest value puts that value between 4 and 8, of which
# the codes reach 6. A smaller scale clips more and a larger one nothing.
_USUAL = np.float32(0.25)
_LEAST_SCALE = np.float32(2.0**-126)
_LARGEST_SCALE = np.float32(2.0**125)  # six times the next one is no finite float32


@kernel(
    "void(i1[:,::1], f4[:,::1], f8[::1], Array(f4, 2, 'C', readonly=True), f4[::1], f4[::1], i8)",
    family="quantize",
)
def search_powers(
    codes: NDArray[np.int8],
    scales: Floats,
    errors: NDArray[np.float64],
    values: Floats,
    weights: Floats,
    scratch: Floats,
    reach: int,
) -> None:
    """Choose codes (rows, cols), -7 ... 7, and scales (rows, cols / 32) for values (rows, cols).

    The code is the number of a magnitude of E2M1 with its sign. Scales are tried up to `reach`
    powers away from the usual one. Adds to errors (rows,). weights (cols,); scratch: SCRATCH_LINES
    vectors.
    """
    tile = scratch.ctypes.data
    out = tile + LINE * BLOCK
    for row in range(0, values.shape[0], LANES):
        for block in range(values.shape[1] // BLOCK):
            load_tile(scratch, values, row, BLOCK * block, BLOCK)
            own = weights.ctypes.data + 4 * BLOCK * block
            usual = multiply(power_below(extreme(tile, BLOCK)), splat_f32(_USUAL))
            usual = _bounded(usual)
            scale, least = _best_power(tile, own, usual, reach)
            inverted = inverse(scale)
            for j in range(BLOCK):
                x = load_f32(tile + LINE * j)
                store_f32(out + LINE * j, e2m1_code(multiply(x, inverted)))
            store_f32(out + LINE * BLOCK, scale)
            store_f32(out + LINE * (BLOCK + 1), least)
            store_codes(codes, scratch, BLOCK, row, BLOCK * block, BLOCK)
            store_numbers(scales, scratch, 2 * BLOCK, row, block, 1)
            _add_scaled_errors(errors, scales, scratch, row, block)


@device
def _best_power(tile: int, weights: int, usual: Vector, reach: int) -> tuple[Vector, Vector]:
    """Return the scale of the least error, and this error as a multiple of the scale squared."""
    scale, least = usual, _error(tile, weights, usual)
    for k in range(2 * reach):
        power = np.float32(2.0) if k % 2 else np.float32(0.5)
        factor = splat_f32(power ** np.float32(k // 2 + 1))
        trial = _bounded(multiply(usual, factor))
        ratio = multiply(trial, inverse(scale))
        error = _error(tile, weights, trial)
        better = multiply(multiply(error, ratio), ratio)
        scale, least = (
            where_less(better, least, trial, scale),
            where_less(better, least, error, least),
        )
    return scale, least


@device
def _bounded(scale: Vector) -> Vector:
    return at_most(at_least(scale, splat_f32(_LEAST_SCALE)), splat_f32(_LARGEST_SCALE))


@device
def _error(tile: int, weights: int, scale: Vector) -> Vector:
    """Return the weighted squared error as a multiple of the scale squared: it cannot overflow."""
    inverted, error = inverse(scale), zeros_f32()
    for j in range(BLOCK):
        x = multiply(load_f32(tile + LINE * j), inverted)
        rest = subtract(x, e2m1_level(x))
        error = multiply_add(multiply(broadcast_f32(weights + 4 * j), rest), rest, error)
    return error


@device
def _add_scaled_errors(
    errors: NDArray[np.float64], scales: Floats, scratch: Floats, row: int, block: int
) -> None:
    for lane in range(min(LANES, errors.size - row)):
        scale = np.float64(scales[row + lane, block])
        relative = np.float64(scratch[LANES * (2 * BLOCK + 1) + lane])
        errors[row + lane] += relative * scale * scale
