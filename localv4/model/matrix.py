"""A packed weight matrix in the memory map, and the one place that multiplies with it."""

import threading
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from localv4.errors import Cancelled
from localv4.kernels import elementwise, matmul, operation, routing
from localv4.kernels.stored import stored_product
from localv4.kernels.team import Team

if TYPE_CHECKING:
    from localv4.model.weights import Expert

SMALL_PRODUCT = 1 << 18
"""Multiply-adds that one thread does before others would have joined in."""

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
    arithmetic in the same order of steps (the release's own FP8/FP4 activation rounding) is another
    class with these methods.
    """

    def __init__(self, team: Team, widest: int) -> None:
        self.threads = team.members
        self.team = team
        self.cancelled: threading.Event | None = None
        self._scratch = np.empty((team.members, widest + 4), F32)

    def linear(self, x: Floats, weight: Matrix, groups: int = 1) -> Floats:
        """Return weight . x for each token; x (tokens, groups * cols) -> (tokens, rows).

        Raises Cancelled when the event `cancelled` is set: products take nearly all the time.
        """
        self.check_cancelled()
        out = np.empty((x.shape[0], weight.rows), F32)
        if x.shape[0] * weight.rows * weight.cols < SMALL_PRODUCT:
            scratch = self._scratch[0]
            matmul.matmul(out, x, weight.format, weight.data, weight.scale, groups, scratch)
        else:
            self.team.run(_stored_product(out, x, weight, groups, self._scratch))
        return out

    def check_cancelled(self) -> None:
        """Raise Cancelled when the event `cancelled` is set."""
        if self.cancelled is not None and self.cancelled.is_set():
            raise Cancelled("stopped")

    def run_expert(self, x: Floats, expert: "Expert", limit: np.float32) -> Floats:
        """Return w2 . swiglu(w1 . x, w3 . x) for each token, clamped; x (tokens, hidden)."""
        gate = self.linear(x, expert.w1)
        elementwise.swiglu(gate, self.linear(x, expert.w3), limit)
        return self.linear(gate, expert.w2)

    def mix_experts(
        self,
        x: Floats,
        chosen: NDArray[np.int64],
        weights: Floats,
        experts: "tuple[Expert, ...]",
        limit: np.float32,
    ) -> Floats:
        """Return the weighted sum of each token's chosen experts (tokens, hidden).

        chosen, weights (tokens, k); experts: all of the layer. Experts are visited in ascending
        order, so a token's sum does not depend on its neighbours.
        """
        out = np.zeros_like(x)
        for expert in np.unique(chosen):
            slots = np.flatnonzero(chosen == expert)
            tokens = slots // chosen.shape[1]
            rows = self.run_expert(x[tokens], experts[expert], limit)
            routing.add_rows(out, rows, tokens, weights.ravel()[slots])
        return out

    def key_rows(self, rows: Floats) -> Floats:
        """Return window or compressed rows (rows, head_dim) as the state shall hold them."""
        return rows

    def index_rows(self, rows: Floats) -> Floats:
        """Return indexer rows (rows, index_head_dim) as the state shall hold them."""
        return rows


def _stored_product(
    out: Floats, x: Floats, weight: Matrix, groups: int, scratch: Floats
) -> NDArray[np.int64]:
    """Return the program that multiplies with a matrix as it is stored."""
    steps = np.zeros((1, operation.WORDS), np.int64)
    steps[0, :16] = (
        *(stored_product.address, weight.format, weight.data.ctypes.data, *weight.data.shape),
        *(weight.scale.ctypes.data, weight.scale.shape[1], x.ctypes.data, x.shape[1]),
        *(x.shape[0], weight.cols, groups, out.ctypes.data, out.shape[1]),
        *(scratch.ctypes.data, scratch.shape[1]),
    )
    return steps


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
