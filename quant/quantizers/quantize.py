"""Rows of float32 to rows of blocks: the entry of the quantizers."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from math import isfinite
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from localv4.kernels.arrays import Bytes, Floats
from quant.quantizers.choice import GRIDS, Chosen, ChosenPoints, blocks_of, choose, choose_points
from quant.quantizers.error_feedback import (
    Feedback,
    choose_points_with_feedback,
    choose_with_feedback,
)
from quant.quantizers.grids import Grid, LatticeGrid, PowerGrid, UniformGrid, plain
from quant.quantizers.tiles import LANES

Method = Literal["round", "search", "feedback"]

PACKED_KIN: Mapping[str, str] = {
    "MX4": "MXFP4",
    "Q4": "Q4_0",
    "Q8": "Q8_0",
    "Q4K": "Q4_K",
    "Q6": "Q6_K",
    "Q3": "Q3_K",
    "Q2": "Q2_K",
    "IQ2": "IQ2_XXS",
}
"""The ggml type whose rows a packer of `kernels` turns into a packed format, value for value."""

_CHUNK_VALUES = 1 << 17
_LEAST_WEIGHT = 1e-6


@dataclass(frozen=True, slots=True)
class Quantized:
    """Rows in blocks of a ggml type.

    blocks (rows, bytes of a row) u8; row_errors (rows,) f64: the sum over columns of importance
    times squared difference, or with feedback the squared error of the output that is expected.
    """

    ggml: str
    blocks: Bytes
    row_errors: NDArray[np.float64]

    @property
    def squared_error(self) -> float:
        """The weighted squared error of all rows."""
        return float(self.row_errors.sum())


def quantize_rows(
    values: Floats,
    target: str,
    importance: Floats | None = None,
    *,
    method: Method = "search",
    hessian: Feedback | None = None,
) -> Quantized:
    """Round finite values (rows, cols) to a ggml type or to the values of a packed format.

    importance (cols,): how much a squared error in a column counts, as the mean square of its
    activations; None: all the same. Methods: "round" takes the scales that the largest values ask
    for; "search" looks for those of the least error; "feedback" lets the columns that come later
    make good the error of each column, for activations with the second moments `hessian`
    (`prepare_feedback`); without these, and for MXFP4, it is the search. Every row is rounded on
    its own: rows may be shared among threads in any way, and the compiled searches release Python's
    lock.

    Raises ValueError for an unknown target, a number of columns that is not whole blocks of it,
    importance that is negative or not finite, and a hessian of another number of columns.
    """
    ggml = PACKED_KIN.get(target, target)
    if ggml not in GRIDS:
        raise ValueError(f"there is no quantizer for {target}")
    rows, cols = values.shape
    grid = GRIDS[ggml]
    if cols % grid.columns:
        raise ValueError(f"{cols} columns are not a multiple of {grid.columns} ({target})")
    weights, mean = prepared_weights(importance, cols)
    if method == "feedback" and hessian is not None and not isinstance(grid, PowerGrid):
        if hessian.weights.size != cols:
            raise ValueError(f"second moments of {hessian.weights.size} columns, not {cols}")
        return _with_feedback(values, ggml, grid, hessian)
    search = grid if method != "round" else plain(grid)
    height = max(1, _CHUNK_VALUES // cols // LANES) * LANES
    parts, errors = [], []
    for first in range(0, rows, height):
        part = np.ascontiguousarray(values[first : first + height])
        chosen = _choose_within_range(part, search, weights)
        parts.append(blocks_of(chosen, ggml))
        errors.append(chosen.errors)
    return Quantized(ggml, np.concatenate(parts), mean * np.concatenate(errors))


def has_nonfinite(values: Floats) -> bool:
    """Tell whether there is a NaN or an infinity: such values must not be quantized."""
    # in float64 no sum of finite float32 overflows
    return not isfinite(float(np.sum(values, dtype=np.float64)))


def prepared_weights(importance: Floats | None, cols: int) -> tuple[Floats, float]:
    """Return weights of columns with the mean 1, none of them 0, and the mean of the importance.

    A column that was never active still gets the nearest code, and blocks of such columns a scale.
    """
    if importance is None:
        return np.ones(cols, np.float32), 1.0
    exact = np.asarray(importance, np.float64)
    if exact.shape != (cols,) or not np.isfinite(exact).all() or (exact < 0).any():
        raise ValueError(f"importance must be {cols} finite numbers, none below 0")
    mean = float(exact.mean())
    if mean == 0:
        return np.ones(cols, np.float32), 0.0
    return np.maximum(exact / mean, _LEAST_WEIGHT).astype(np.float32), mean


def _choose_within_range(values: Floats, grid: Grid, weights: Floats) -> Chosen | ChosenPoints:
    """Search for values of any size: those beyond the largest of a format become the largest."""
    largest = np.float32(grid.largest)
    within = max(float(values.max()), -float(values.min())) <= largest
    limited = values if within else np.clip(values, -largest, largest)
    chosen: Chosen | ChosenPoints
    if isinstance(grid, LatticeGrid):
        chosen = choose_points(limited, grid, weights)
    else:
        chosen = choose(limited, grid, weights)
    if within:
        return chosen
    rest = values.astype(np.float64) - chosen.values()
    return replace(chosen, errors=(rest * rest * weights).sum(1))


def _with_feedback(
    values: Floats, ggml: str, grid: UniformGrid | LatticeGrid, feedback: Feedback
) -> Quantized:
    """Round all rows together: each pass reads the whole factor."""
    largest = np.float32(grid.largest)
    limited = np.clip(values, -largest, largest)
    chosen: Chosen | ChosenPoints
    if isinstance(grid, LatticeGrid):
        chosen = choose_points_with_feedback(limited, grid, feedback)
    else:
        chosen = choose_with_feedback(limited, grid, feedback)
    lost = ((values.astype(np.float64) - limited) ** 2 * feedback.weights).sum(1)
    return Quantized(ggml, blocks_of(chosen, ggml), feedback.scale * (chosen.errors + lost))
