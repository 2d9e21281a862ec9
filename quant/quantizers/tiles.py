"""Tiles: columns of sixteen rows as vectors, a lane for each row.

All searches work on tiles, so that every row has its own scales while the importance of a column is
shared. Line j of a tile holds column j. A tile is filled up with copies of the last row; results of
those lanes are dropped.
"""

import numpy as np
from numpy.typing import NDArray

from localv4.kernels.arrays import Bytes, Floats
from localv4.kernels.device import device
from localv4.kernels.simd import Vector, load_f32, store_f32
from quant.quantizers.lanes import LINE, where_less

LANES = 16


@device
def load_tile(scratch: Floats, values: Floats, row: int, col: int, cols: int) -> None:
    """Copy columns col ... col + cols - 1 of sixteen rows from `row` on to the start of scratch."""
    last = values.shape[0] - 1
    for lane in range(LANES):
        source = values[min(row + lane, last)]
        for j in range(cols):
            scratch[LANES * j + lane] = source[col + j]


@device
def store_codes(
    codes: NDArray[np.int8], scratch: Floats, line: int, row: int, col: int, cols: int
) -> None:
    """Write whole numbers from a line of scratch on to columns of up to sixteen rows."""
    for lane in range(min(LANES, codes.shape[0] - row)):
        target = codes[row + lane]
        for j in range(cols):
            target[col + j] = np.int8(np.int32(scratch[LANES * (line + j) + lane]))


@device
def store_bytes(out: Bytes, scratch: Floats, line: int, row: int, col: int, cols: int) -> None:
    """Write numbers from 0 to 255 from a line of scratch on to columns of up to sixteen rows."""
    for lane in range(min(LANES, out.shape[0] - row)):
        for j in range(cols):
            out[row + lane, col + j] = np.uint8(np.int32(scratch[LANES * (line + j) + lane]))


@device
def store_numbers(out: Floats, scratch: Floats, line: int, row: int, col: int, cols: int) -> None:
    """Write floats from a line of scratch on to columns of up to sixteen rows."""
    for lane in range(min(LANES, out.shape[0] - row)):
        for j in range(cols):
            out[row + lane, col + j] = scratch[LANES * (line + j) + lane]


@device
def add_errors(out: NDArray[np.float64], scratch: Floats, line: int, row: int) -> None:
    """Add one line of errors to those of up to sixteen rows."""
    for lane in range(min(LANES, out.shape[0] - row)):
        out[row + lane] += np.float64(scratch[LANES * line + lane])


@device
def keep_better(chosen: int, trial: int, lines: int, error: Vector, least: Vector) -> None:
    """Copy lines from the address `trial` to `chosen` in the lanes where error is below least."""
    for offset in range(0, LINE * lines, LINE):
        kept = where_less(error, least, load_f32(trial + offset), load_f32(chosen + offset))
        store_f32(chosen + offset, kept)
