"""How much each column of a matrix matters: the mean square of its inputs."""

import threading
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from localv4.model.matrix import Floats

PRIOR_TOKENS = 50
"""Few tokens tell little: those of an expert are averaged with this many of its layer's mean."""

_MOST_KNOWN = 256
_ROWS_UNIT = 128  # groups of rows begin where strips may


class Statistics(Protocol):
    """What is asked of an importance matrix (`localv4.storage.imatrix_file.ImatrixFile`)."""

    def weights_for(self, official: str, cols: int | None = None) -> Floats | None:
        """Return mean squares of inputs: (cols,), or (groups, cols); None: nothing is known."""

    def expert_counts(self, layer: int) -> Floats | None:
        """Return how many tokens chose each expert of a layer."""


@dataclass(slots=True)
class Importance:
    """Importances of columns, those of rare experts blended with the mean of their layer.

    What was asked for last is remembered: strips of a matrix come one after the other.
    """

    statistics: Statistics
    _known: dict[str, Floats | None] = field(default_factory=dict)
    _means: dict[str, Floats | None] = field(default_factory=dict)
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def of(self, name: str, rows: int, cols: int, first: int = 0) -> Floats | None:
        """Return the importances (cols,) of the rows from `first` on of a matrix (rows, cols).

        They hold as far as the group of rows goes that `first` is in.
        """
        found = self._of_matrix(name, cols)
        if found is None or found.ndim == 1:
            return found
        if self.groups(name, rows, cols) == 1:
            mean: Floats = found.mean(0, dtype=np.float64).astype(np.float32)
            return mean
        return np.ascontiguousarray(found[first * len(found) // rows])

    def groups(self, name: str, rows: int, cols: int) -> int:
        """Return into how many groups of rows a matrix falls that have inputs of their own."""
        found = self._of_matrix(name, cols)
        if found is None or found.ndim == 1 or rows % (len(found) * _ROWS_UNIT):
            return 1
        return len(found)

    def _of_matrix(self, name: str, cols: int) -> Floats | None:
        with self._lock:
            if name in self._known:
                return self._known[name]
        found = self._blended(name, cols)
        with self._lock:
            while len(self._known) >= _MOST_KNOWN:
                self._known.pop(next(iter(self._known)))
            self._known[name] = found
        return found

    def _blended(self, name: str, cols: int) -> Floats | None:
        own = self.statistics.weights_for(name, cols)
        head, expert, tail = name.rpartition(".experts.")
        if not expert or own is None:
            return own
        number, _, part = tail.partition(".")
        counts = self.statistics.expert_counts(int(head.split(".")[1]))
        mean = self._mean_of_experts(f"{head}.experts.{{}}.{part}", cols, counts)
        if counts is None or mean is None:
            return own
        count = float(counts[int(number)])
        blended = (count * own + PRIOR_TOKENS * mean) / (count + PRIOR_TOKENS)
        return blended.astype(np.float32)

    def _mean_of_experts(self, pattern: str, cols: int, counts: Floats | None) -> Floats | None:
        if counts is None:
            return None
        with self._lock:
            if pattern in self._means:
                return self._means[pattern]
        total, tokens = np.zeros(cols), float(counts.sum())
        for number in np.flatnonzero(counts):
            own = self.statistics.weights_for(pattern.format(number), cols)
            if own is not None:
                total += counts[number] * own.astype(np.float64)
        mean = (total / tokens).astype(np.float32) if tokens else None
        with self._lock:
            self._means[pattern] = mean
        return mean


def heat_of(counts: NDArray[np.float32]) -> Mapping[int, float]:
    """Return for each expert the share of experts that at least as many tokens choose.

    The busiest of n experts has 1 / n, the idlest 1; equals go by their number.
    """
    order = np.argsort(-counts, kind="stable")
    return {int(expert): (place + 1) / len(order) for place, expert in enumerate(order)}
