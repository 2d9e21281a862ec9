"""Rounding with feedback: quantize a matrix for the activations that it will meet."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields
from functools import cache
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray
from threadpoolctl import ThreadpoolController

from localv4.kernels.arrays import Floats
from localv4.kernels.iquants import GRID
from quant.quantizers import diffusion, lattice_diffusion
from quant.quantizers.choice import Chosen, ChosenPoints, choose, choose_points, scratch_lines
from quant.quantizers.grids import AffineGrid, LatticeGrid, UniformGrid
from quant.quantizers.lattice import GROUP, norms_of

DAMPING = 0.01
"""What is added to the diagonal of the second moments, as a share of its mean."""

PASSES = 2
"""How often each code of a unit is improved; more passes change little."""

_ROWS = 4
_LEAST_HALF = 32

Result = TypeVar("Result", Chosen, ChosenPoints)


@dataclass(frozen=True, slots=True)
class Feedback:
    """How the error of each column is made good by the columns after it.

    factor (cols, cols) f32, upper triangular: column j deviating by e changes column k by
    -e factor[j, k]. weights (cols,) f32, with the mean 1: how much a squared error counts when it
    is made good so; `scale` times their sum over such errors is the squared error of the output.
    metrics (units, columns, columns) f32: how much the errors of a unit count together.
    """

    factor: Floats
    weights: Floats
    scale: float
    metrics: Floats


def prepare_feedback(
    second_moments: NDArray[np.float32] | NDArray[np.float64], tokens: float
) -> Feedback:
    """Return what `quantize_rows` needs of the mean of x x^T over activations x (cols, cols).

    `tokens` is how many activations the mean was taken over: what few of them say about pairs of
    columns is mostly chance, and is believed accordingly (`trust`). Takes memory for five matrices
    of float64. Not for several threads at a time: NumPy's linear algebra is held to one thread,
    for the whole process. More of them would wait for each other longer than they work on most
    inputs, and their number would show in the last bits. Raises ValueError unless the moments are
    square, finite, and positive semidefinite up to rounding.
    """
    moments = np.array(second_moments, np.float64)
    if moments.ndim != 2 or moments.shape[0] != moments.shape[1] or not np.isfinite(moments).all():
        raise ValueError("second moments must be a square matrix of finite numbers")
    believed = trust(len(moments), tokens)
    moments = believed * moments + np.diag((1 - believed) * np.diag(moments))
    cols = len(moments)
    mean = float(np.trace(moments)) / cols
    if mean <= 0:
        moments, mean = np.eye(cols), 0.0
    moments[np.diag_indices(cols)] += DAMPING * mean
    # H = R R^T with R upper triangular is Cholesky's factor read backwards; then U = R^-1
    with _linear_algebra().limit(limits=1, user_api="blas"):
        try:
            backwards = np.linalg.cholesky(moments[::-1, ::-1])
        except np.linalg.LinAlgError:
            raise ValueError("second moments are not positive semidefinite") from None
        outer = np.ascontiguousarray(backwards[::-1, ::-1])
        metrics = np.stack(list(_metrics(outer))).astype(np.float32)
        upper = inverse_of_upper(outer)
    diagonal = np.diag(upper)
    weights = 1 / (diagonal * diagonal)
    return Feedback(
        (upper / diagonal[:, None]).astype(np.float32),
        (weights / weights.mean()).astype(np.float32),
        float(weights.mean()) if mean else 0.0,
        metrics,
    )


@cache
def _linear_algebra() -> ThreadpoolController:
    return ThreadpoolController()


def inverse_of_upper(upper: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return the inverse of an upper triangular matrix, half by half.

    Zeros stay zeros, and it takes a sixth of the work of NumPy's, which knows no triangles.
    """
    half = len(upper) // 2
    if half < _LEAST_HALF:
        return np.triu(np.linalg.inv(upper))
    found = np.zeros_like(upper)
    first = found[:half, :half] = inverse_of_upper(upper[:half, :half])
    last = found[half:, half:] = inverse_of_upper(upper[half:, half:])
    found[:half, half:] = -first @ (upper[:half, half:] @ last)
    return found


def trust(cols: int, tokens: float) -> float:
    """Return the share of pairs in what feedback believes; the rest is the diagonal alone.

    1 / (1 + 2 (cols / tokens)^(3/4)), which fits the best shares that were measured on unseen text
    for a token for each column (0.33), for two (0.43) and for eight (0.7); see docs/quantizers.md.
    """
    return 1 / (1 + 2 * (cols / tokens) ** 0.75) if tokens > 0 else 0.0


def _metrics(outer: NDArray[np.floating[Any]]) -> Iterator[NDArray[np.floating[Any]]]:
    """Yield S of each unit: R R^T of its part of R, since U of the part is its inverse."""
    columns = next(size for size in (256, 128, 64, 32, 1) if len(outer) % size == 0)
    for first in range(0, len(outer), columns):
        own = outer[first : first + columns, first : first + columns]
        yield own @ own.T


def choose_with_feedback(
    values: Floats, grid: UniformGrid, feedback: Feedback, passes: int = PASSES
) -> Chosen:
    """Choose codes and scales of values (rows, cols); scales by search, unit by unit.

    The errors of the result are those of the output, as multiples of the feedback's scale: with
    errors made good as they are, d H d^T is the weighted sum of their squares.
    """
    low = 0 if isinstance(grid, AffineGrid) else grid.low
    curved = not isinstance(grid, AffineGrid) and grid.curved
    scratch = scratch_lines(diffusion.SCRATCH_LINES)

    def round_unit(work: Floats, unit: int, own: slice) -> tuple[Chosen, Floats]:
        chosen = choose(np.ascontiguousarray(work[:, own]), grid, feedback.weights[own])
        errors, steps = np.empty(chosen.codes.shape, np.float32), chosen.steps()
        diffusion.diffuse(
            chosen.codes,
            errors,
            work,
            steps,
            chosen.offsets() if chosen.minima.size else np.zeros_like(steps),
            feedback.factor,
            feedback.metrics[unit],
            scratch,
            own.start,
            low,
            grid.high,
            curved,
            passes,
        )
        return chosen, errors

    return _round_units(values, feedback, round_unit)


def choose_points_with_feedback(
    values: Floats, grid: LatticeGrid, feedback: Feedback
) -> ChosenPoints:
    """Choose points and scales of values (rows, cols) likewise."""
    scratch = scratch_lines(lattice_diffusion.SCRATCH_LINES)
    norms = norms_of(feedback.weights)

    def round_unit(work: Floats, unit: int, own: slice) -> tuple[ChosenPoints, Floats]:
        chosen = choose_points(np.ascontiguousarray(work[:, own]), grid, feedback.weights[own])
        errors = np.empty((len(work), grid.columns), np.float32)
        lattice_diffusion.diffuse_points(
            chosen.points,
            chosen.signs,
            errors,
            work,
            chosen.steps(),
            feedback.factor,
            feedback.weights[own],
            norms[own.start // GROUP : own.stop // GROUP],
            GRID,
            scratch,
            own.start,
        )
        return chosen, errors

    return _round_units(values, feedback, round_unit)


def _round_units(
    values: Floats,
    feedback: Feedback,
    round_unit: Callable[[Floats, int, slice], tuple[Result, Floats]],
) -> Result:
    """Round one unit of columns after the other, and let the later ones make its errors good."""
    rows, cols = values.shape
    work = np.zeros((-(-rows // _ROWS) * _ROWS, cols), np.float32)
    work[:rows] = values
    columns = feedback.metrics.shape[1]
    parts, squares = [], np.zeros(rows)
    for unit in range(cols // columns):
        own = slice(unit * columns, (unit + 1) * columns)
        chosen, errors = round_unit(work, unit, own)
        diffusion.spread(work, errors, feedback.factor, own.start)
        parts.append(chosen)
        squares += (np.square(errors[:rows], dtype=np.float64) * feedback.weights[own]).sum(1)
    return _joined(parts, squares)


def _joined(parts: list[Result], errors: NDArray[np.float64]) -> Result:
    """Put the columns of parts side by side; rows that filled up the last four are left out."""
    rows, names = len(errors), [field.name for field in fields(parts[0]) if field.name != "errors"]
    columns = {name: np.concatenate([getattr(p, name) for p in parts], 1)[:rows] for name in names}
    return type(parts[0])(errors=errors, **columns)
