"""Weights of a source into weights of the formats that a recipe chooses, strip by strip."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from localv4.errors import BadFileError
from localv4.kernels import blocks
from localv4.model.matrix import Floats, Matrix, Packed, decode
from quant.choice import Choice
from quant.errors_made import ErrorTotals
from quant.formats import GGML_TARGETS, PACKED_TARGETS, Target
from quant.importance import Importance
from quant.moments import SecondMoments
from quant.recipe import Method
from quant.strips import is_finite, strip, strips_of
from quant.tensor_class import class_of

_FLOAT_TYPES = ("BF16", "F32")
_NO_SCALE = np.zeros((1, 1), np.uint8)
_NO_SCALE.setflags(write=False)


@dataclass(slots=True)
class Converter:
    """Rounds strips of matrices; may be used from any thread.

    `path` is the source, for messages; `importance` None: all columns of a matrix matter the same.
    `moments` are for the method "feedback".
    """

    path: Path
    importance: Importance | None = None
    moments: SecondMoments | None = None
    errors: ErrorTotals = field(default_factory=ErrorTotals)

    def spans(self, name: str, matrix: Matrix) -> Iterator[tuple[int, int]]:
        """Yield first and end row of the strips of a matrix; none has rows of two groups."""
        known = (self.importance, self.moments)
        groups = max(
            one.groups(name, matrix.rows, matrix.cols) if one is not None else 1 for one in known
        )
        rows = matrix.rows // groups
        for group in range(groups):
            for first, end in strips_of(rows, matrix.cols):
                yield group * rows + first, group * rows + end

    def rows(self, name: str, matrix: Matrix, first: int, end: int, choice: Choice) -> Matrix:
        """Return rows `first` to `end` in blocks of the chosen ggml type, or as they are stored.

        Raises BadFileError where a value is not finite.
        """
        if choice.target is None:
            return self._kept(name, matrix, first, end)
        return self._rounded(name, matrix, first, end, choice.target, choice.method)

    def _kept(self, name: str, matrix: Matrix, first: int, end: int) -> Matrix:
        part = strip(matrix, first, end)
        if not is_finite(part):
            raise BadFileError(self.path, f"tensor {name!r} holds a NaN or an infinity")
        return part

    def _rounded(
        self, name: str, matrix: Matrix, first: int, end: int, target: Target, method: Method
    ) -> Matrix:
        """Return rows in blocks of a ggml type: that of `target` or its kin.

        What a packed format holds is the same numbers in another order.
        """
        from quant.quantizers import quantize_rows

        part = strip(matrix, first, end)
        values = decode(part)
        if not np.isfinite(values).all():
            raise BadFileError(self.path, f"tensor {name!r} holds a NaN or an infinity")
        importance = None
        if self.importance is not None:
            importance = self.importance.of(name, matrix.rows, matrix.cols, first)
        kind = ggml_name(target)
        if kind in _FLOAT_TYPES:
            data, error = _as_floats(values, kind), 0.0
        elif method == "feedback":
            known = self.moments.of(name, matrix.rows, matrix.cols, first) if self.moments else None
            assert known is not None  # the chooser has seen to that
            found = quantize_rows(values, kind, method=method, hessian=known.feedback)
            data, importance = found.blocks, known.squares
            rest = values - decode(ggml_matrix(kind, matrix.cols, data))
            error = _signal(rest, importance)
        else:
            found = quantize_rows(values, kind, importance, method=method)
            data, error = found.blocks, found.squared_error
        self.errors.add(class_of(name), error, _signal(values, importance))
        return ggml_matrix(kind, matrix.cols, data)

    def convert(self, name: str, matrix: Matrix, choice: Choice) -> Matrix:
        """Return a whole matrix in blocks of the chosen ggml type, or as it is stored."""
        if choice.target is None:
            return self.rows(name, matrix, 0, matrix.rows, choice)
        parts = [self.rows(name, matrix, *span, choice).data for span in self.spans(name, matrix)]
        return ggml_matrix(ggml_name(choice.target), matrix.cols, np.concatenate(parts))


def ggml_name(target: Target) -> str:
    """Return the ggml type that has the numbers of a format."""
    return target.name if target.name in GGML_TARGETS else PACKED_TARGETS[target.name].kin


def ggml_matrix(kind: str, cols: int, data: Packed) -> Matrix:
    """Return rows of blocks as a matrix."""
    return Matrix(blocks.FORMATS.index(kind), len(data), cols, data, _NO_SCALE)


def _as_floats(values: Floats, kind: str) -> Packed:
    """Return rows as float32, or rounded to bfloat16, ties to even."""
    bits = np.ascontiguousarray(values).view(np.uint32)
    if kind == "F32":
        return bits.view(np.uint8)
    odd = (bits >> 16) & np.uint32(1)
    halves = ((bits + np.uint32(0x7FFF) + odd) >> 16).astype("<u2")
    return halves.view(np.uint8)


def _signal(values: Floats, importance: Floats | None) -> float:
    if importance is None:
        return float(np.vdot(values, values))
    return float((np.square(values) @ importance).sum(dtype=np.float64))
