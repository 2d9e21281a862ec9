"""Collect second moments: the sum of x x^T over the inputs x of each matrix."""

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np

from localv4.engine.imatrix import Collector, named_matrices
from localv4.kernels.team import Team
from localv4.model.matrix import Floats, Matrix
from localv4.model.weights import Weights
from localv4.storage.moments_file import Moments, input_of

DEFAULT_LIMIT = 128 << 20
"""Bytes for one kind of input in a layer, all experts and blocks together."""


@dataclass(slots=True)
class Skipped:
    """A kind of input that would take too much: how many layers have it, and the bytes of each."""

    layers: int = 0
    nbytes: int = 0


@dataclass(slots=True)
class _Open:
    """Sums that grow."""

    products: Floats
    tokens: int = 0


@dataclass(slots=True)
class _Budget:
    """Which inputs are small enough to be kept."""

    limit: int
    skipped: dict[str, Skipped] = field(default_factory=dict)
    nbytes: int = 0

    def allows(self, name: str, nbytes: int, copies: int) -> bool:
        """Tell whether an input is kept, of which a layer has `copies`; take note of the answer."""
        if nbytes * copies <= self.limit:
            self.nbytes += nbytes
            return True
        parts = name.split(".")
        kind = ".".join(part for part in parts if part != "layers" and not part.isdigit())
        found = self.skipped.setdefault(kind, Skipped(nbytes=nbytes * copies))
        if copies == 1 or parts[-2] == "0":
            found.layers += 1
        return False


class MomentCollector(Collector):
    """A collector of importance that adds up x x^T as well, where an input is small enough.

    `limit` is in bytes of one kind of input in a layer, `groups` the blocks of `wo_a`. Matrices
    that read the same vectors share their sums. An input of n columns takes n^2 float32 and n^2
    multiply-adds for each token.
    """

    def __init__(self, team: Team, weights: Weights, groups: int, limit: int) -> None:
        super().__init__(team, weights)
        self._budget = _Budget(limit)
        self._inputs: dict[int, str] = {}
        self._open: dict[str, _Open] = {}
        experts, seen = len(weights.layers[0].experts), set[str]()
        for official, matrix in named_matrices(weights):
            name = input_of(official)
            if name is None or name in seen:
                continue
            seen.add(name)
            blocks = groups if name.endswith("attn.heads") else 1
            nbytes = 4 * matrix.cols * matrix.cols * blocks
            if self._budget.allows(name, nbytes, experts if ".experts." in name else 1):
                self._inputs[id(matrix)] = name

    @property
    def nbytes(self) -> int:
        """Bytes that all sums take at most."""
        return self._budget.nbytes

    @property
    def skipped(self) -> Mapping[str, Skipped]:
        """What was too large, by kind of input."""
        return self._budget.skipped

    def add(self, x: Floats, weight: Matrix, groups: int = 1) -> None:
        """Take note of inputs (tokens, groups * cols) of a matrix. Raises NumericsError."""
        super().add(x, weight, groups)
        name = self._inputs.get(id(weight))
        if name is None:
            return
        if name not in self._open:
            self._open[name] = _Open(np.zeros((groups, weight.cols, weight.cols), np.float32))
        found = self._open[name]
        found.tokens += len(x)
        for block, part in enumerate(np.split(x, groups, axis=1)):
            found.products[block] += part.T @ part

    def moments(self) -> dict[str, Moments]:
        """Return the sums; experts that met fewer tokens than columns are left out.

        So few tell nothing about pairs of columns.
        """
        return {
            name: Moments(found.products, found.tokens)
            for name, found in self._open.items()
            if ".experts." not in name or found.tokens >= found.products.shape[1]
        }
