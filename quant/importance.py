"""How much each column of a matrix matters: the mean square of its inputs."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from localv4.model.matrix import Floats

PRIOR_TOKENS = 50
"""Few tokens tell little: those of an expert are averaged with this many of its layer's mean."""


class Statistics(Protocol):
    """What is asked of an importance matrix (`localv4.storage.imatrix_file.ImatrixFile`)."""

    def weights_for(self, official: str) -> Floats | None:
        """Return mean squares of inputs: (cols,), or (groups, cols); None: nothing is known."""

    def expert_counts(self, layer: int) -> Floats | None:
        """Return how many tokens chose each expert of a layer."""


@dataclass(slots=True)
class Importance:
    """Importances of columns, those of rare experts blended with the mean of their layer."""

    statistics: Statistics
    _means: dict[str, Floats | None] = field(default_factory=dict)

    def of(self, name: str, first: int, rows: int) -> Floats | None:
        """Return the importances (cols,) of the rows from `first` on of a matrix of `rows`.

        They hold as far as the group of rows goes that `first` is in.
        """
        found = self._of_matrix(name)
        if found is None or found.ndim == 1:
            return found
        return np.ascontiguousarray(found[first * len(found) // rows])

    def groups(self, name: str) -> int:
        """Return into how many groups of rows a matrix falls that have inputs of their own."""
        found = self.statistics.weights_for(name)
        return 1 if found is None or found.ndim == 1 else len(found)

    def _of_matrix(self, name: str) -> Floats | None:
        own = self.statistics.weights_for(name)
        head, expert, tail = name.rpartition(".experts.")
        if not expert or own is None:
            return own
        number, _, part = tail.partition(".")
        layer = int(head.split(".")[1])
        counts = self.statistics.expert_counts(layer)
        mean = self._mean_of_experts(f"{head}.experts.{{}}.{part}", counts)
        if counts is None or mean is None:
            return own
        count = float(counts[int(number)])
        blended = (count * own + PRIOR_TOKENS * mean) / (count + PRIOR_TOKENS)
        return blended.astype(np.float32)

    def _mean_of_experts(self, pattern: str, counts: Floats | None) -> Floats | None:
        if counts is None:
            return None
        if pattern not in self._means:
            total, tokens = np.zeros(1), float(counts.sum())
            for number in np.flatnonzero(counts):
                own = self.statistics.weights_for(pattern.format(number))
                if own is not None:
                    total = total + counts[number] * own.astype(np.float64)
            self._means[pattern] = (total / tokens).astype(np.float32) if tokens else None
        return self._means[pattern]


def heat_of(counts: NDArray[np.float32]) -> Mapping[int, float]:
    """Return for each expert the share of experts that at least as many tokens choose.

    The busiest of n experts has 1 / n, the idlest 1; equals go by their number.
    """
    order = np.argsort(-counts, kind="stable")
    return {int(expert): (place + 1) / len(order) for place, expert in enumerate(order)}
