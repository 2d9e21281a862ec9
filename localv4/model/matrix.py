"""A packed weight matrix in the memory map, and the one place that multiplies with it."""

import threading
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from localv4.errors import Cancelled
from localv4.kernels import matmul

SMALL_PRODUCT = 1 << 18
"""Multiply-adds below which one thread is done before others have woken up."""

F32 = np.float32
Floats = NDArray[np.float32]
Packed = NDArray[np.uint8]


@dataclass(frozen=True, slots=True)
class Matrix:
    """rows x cols weights as they are stored; nothing is decoded until a kernel reads a row.

    `data` (rows, row_bytes) and `scale` are read-only views into the file; `format` is a code of
    `kernels.blocks`. Formats that carry their scales inside have a (1, 1) dummy scale.
    """

    format: int
    rows: int
    cols: int
    data: Packed
    scale: Packed

    @property
    def nbytes(self) -> int:
        """Bytes that one product reads."""
        return self.data.nbytes + (self.scale.nbytes if self.scale.size > 1 else 0)


class Numerics:
    """Arithmetic `exact`: float32 activations and rows, as transformers computes in float32.

    Every product and every row that enters the decoder state passes through this object, so another
    arithmetic (the release's own FP8/FP4 activation rounding) is another class with these methods.
    """

    name = "exact"

    def __init__(self, threads: int, widest: int) -> None:
        self.threads = threads
        self.cancelled: threading.Event | None = None
        self._scratch = np.empty((threads, widest + 4), F32)

    def linear(self, x: Floats, weight: Matrix, groups: int = 1) -> Floats:
        """Return weight . x for each token; x (tokens, groups * cols) -> (tokens, rows).

        Raises Cancelled when the event `cancelled` is set: products take nearly all the time.
        """
        if self.cancelled is not None and self.cancelled.is_set():
            raise Cancelled("stopped")
        out = np.empty((x.shape[0], weight.rows), F32)
        small = x.shape[0] * weight.rows * weight.cols < SMALL_PRODUCT
        product = matmul.matmul_small if small else matmul.matmul
        product(out, x, weight.format, weight.data, weight.scale, groups, self._scratch)
        return out

    def key_rows(self, rows: Floats) -> Floats:
        """Return window or compressed rows (rows, head_dim) as the state shall hold them."""
        return rows

    def index_rows(self, rows: Floats) -> Floats:
        """Return indexer rows (rows, index_head_dim) as the state shall hold them."""
        return rows


def decode(weight: Matrix) -> Floats:
    """Return all values of a small matrix as float32 (rows, cols)."""
    out = np.empty((weight.rows, weight.cols), F32)
    everything = np.arange(weight.rows, dtype=np.int64)
    matmul.gather_rows(out, everything, weight.format, weight.data, weight.scale)
    return out


def look_up(weight: Matrix, rows: NDArray[np.int64]) -> Floats:
    """Return the given rows as float32 (len(rows), cols); rows must be in range."""
    out = np.empty((rows.shape[0], weight.cols), F32)
    matmul.gather_rows(out, rows, weight.format, weight.data, weight.scale)
    return out
