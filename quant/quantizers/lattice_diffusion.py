"""Points of the lattice chosen group by group, each error made good by the columns after it.

As in `diffusion`; but eight columns are rounded together, for their values as they are when all
earlier groups have been made good.
"""

import numpy as np

from localv4.kernels.arrays import Bytes, Floats
from localv4.kernels.compiler import kernel
from localv4.kernels.device import device
from localv4.kernels.simd import Vector, load_f32, store_f32
from quant.quantizers import diffusion, lattice
from quant.quantizers.diffusion import make_good
from quant.quantizers.lanes import LINE
from quant.quantizers.lattice import BLOCK, BLOCKS, GROUP, GROUPS, SUPERBLOCK, best_point, split
from quant.quantizers.tiles import LANES, load_tile, store_bytes, store_numbers

SCRATCH_LINES = diffusion.SCRATCH_LINES + lattice.SCRATCH_LINES

_CHANGED, _ROUNDED, _ERRORS = diffusion.CHANGED, diffusion.ROUNDED, diffusion.ERRORS
_LATTICE = diffusion.SCRATCH_LINES
_STEPS = diffusion.STEPS


@kernel(
    "void(u1[:,::1], u1[:,::1], f4[:,::1], f4[:,::1], f4[:,::1], f4[:,::1], f4[::1], f4[:,::1],"
    " Array(f4, 2, 'C', readonly=True), f4[::1], i8)",
    family="quantize",
)
def diffuse_points(
    points: Bytes,
    signs: Bytes,
    errors: Floats,
    values: Floats,
    steps: Floats,
    factor: Floats,
    weights: Floats,
    norms: Floats,
    grid: Floats,
    scratch: Floats,
    first: int,
) -> None:
    """Choose points and signs of columns first ... first + 255 of values (rows, all columns).

    points, signs (rows, 32) and errors (rows, 256) are those of the unit, which has the minus sign:
    what to `spread`; steps (rows, 8); factor (all columns, all columns) f32: U_jk / U_jj; weights
    (256,), `norms_of` them; grid (256, 8). scratch: SCRATCH_LINES vectors.
    """
    base = scratch.ctypes.data
    stride = 4 * factor.shape[1]
    ratios = factor.ctypes.data + first * stride + 4 * first
    for row in range(0, values.shape[0], LANES):
        load_tile(scratch[LANES * _CHANGED :], values, row, first, SUPERBLOCK)
        load_tile(scratch[LANES * _STEPS :], steps, row, 0, BLOCKS)
        for group in range(GROUPS):
            step = load_f32(base + LINE * (_STEPS + GROUP * group // BLOCK))
            _choose_point(base, group, weights.ctypes.data, norms.ctypes.data, grid, step)
            _decode(scratch, group, grid)
            for j in range(GROUP * group, GROUP * group + GROUP):
                make_good(base, j, SUPERBLOCK, ratios + stride * j)
        store_bytes(points, scratch, _LATTICE + lattice.POINT, row, 0, GROUPS)
        lattice.store_signs(signs, scratch[LANES * _LATTICE :], row, 0)
        store_numbers(errors, scratch, _ERRORS, row, 0, SUPERBLOCK)


@device
def _choose_point(
    base: int, group: int, weights: int, norms: int, grid: Floats, step: Vector
) -> None:
    """Write signs and point of a group for its values as they are now."""
    own = base + LINE * _LATTICE
    for j in range(GROUP * group, GROUP * group + GROUP):
        store_f32(own + LINE * j, load_f32(base + LINE * (_CHANGED + j)))
    split(own, GROUP * group, weights)
    best, _, _ = best_point(own, group, weights, norms, grid.ctypes.data, step)
    store_f32(own + LINE * (lattice.POINT + group), best)


@device
def _decode(scratch: Floats, group: int, grid: Floats) -> None:
    """Write the values of the chosen points of a group."""
    steps = LANES * (_STEPS + GROUP * group // BLOCK)
    for lane in range(LANES):
        number = np.int64(scratch[LANES * (_LATTICE + lattice.POINT + group) + lane])
        step = scratch[steps + lane]
        for j in range(GROUP):
            column = GROUP * group + j
            sign = scratch[LANES * (_LATTICE + lattice.SIGNS + column) + lane]
            scratch[LANES * (_ROUNDED + column) + lane] = step * grid[number, j] * sign
