"""What a conversion knows of second moments: feedback for a matrix, prepared once."""

import threading
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np

from localv4.kernels.packed import F8_SPAN
from localv4.model.matrix import Floats
from localv4.storage.moments_file import input_of, layer_input_of
from quant.quantizers import Feedback, prepare_feedback

KEPT_BYTES = 256 << 20
"""Prepared feedback that is remembered; one is kept whatever its size."""


class MomentSource(Protocol):
    """What is asked of a file of second moments (`localv4.storage.moments_file.MomentsFile`)."""

    @property
    def inputs(self) -> Mapping[str, tuple[int, int]]:
        """Blocks and columns of each input."""

    def tokens(self, name: str) -> int:
        """Return over how many tokens an input was summed."""

    def products(self, name: str, block: int = 0) -> Floats:
        """Return the sum of x x^T of a block of an input (cols, cols)."""


@dataclass(frozen=True, slots=True)
class Known:
    """Feedback, and the mean squares of the columns (cols,)."""

    feedback: Feedback
    squares: Floats


@dataclass(slots=True)
class SecondMoments:
    """Feedback for matrices; may be used from any thread.

    Matrices that read the same vectors share it. One is prepared at a time: that takes memory for
    six matrices of cols x cols float64.
    """

    source: MomentSource
    _prepared: OrderedDict[tuple[str, int], Known] = field(default_factory=OrderedDict)
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def knows(self, name: str, rows: int, cols: int) -> bool:
        """Tell whether the inputs of a matrix (rows, cols) are known."""
        return self._input(name, rows, cols) is not None

    def groups(self, name: str, rows: int, cols: int) -> int:
        """Return into how many groups of rows a matrix falls that have inputs of their own."""
        found = self._input(name, rows, cols)
        return 1 if found is None else self.source.inputs[found][0]

    def of(self, name: str, rows: int, cols: int, first: int) -> Known | None:
        """Return what is known for the group of rows that row `first` of a matrix is in."""
        found = self._input(name, rows, cols)
        if found is None:
            return None
        key = (found, first * self.source.inputs[found][0] // rows)
        with self._lock:
            if key not in self._prepared:
                self._prepared[key] = self._prepare(*key)
            self._prepared.move_to_end(key)
            known = self._prepared[key]
            while len(self._prepared) > 1 and self._nbytes() > KEPT_BYTES:
                self._prepared.popitem(last=False)
        return known

    def _input(self, name: str, rows: int, cols: int) -> str | None:
        """Return the input of a matrix, or what all experts of its layer read."""
        for found in (input_of(name), layer_input_of(name)):
            shape = self.source.inputs.get(found) if found is not None else None
            if shape is not None and shape[1] == cols:
                blocks = shape[0]
                if blocks == 1 or rows % (blocks * F8_SPAN) == 0:
                    return found
        return None

    def _prepare(self, name: str, block: int) -> Known:
        tokens = self.source.tokens(name)
        mean = self.source.products(name, block) / np.float32(tokens)
        return Known(prepare_feedback(mean, tokens), np.ascontiguousarray(mean.diagonal()))

    def _nbytes(self) -> int:
        parts = (known.feedback for known in self._prepared.values())
        return sum(one.factor.nbytes + one.metrics.nbytes for one in parts)
