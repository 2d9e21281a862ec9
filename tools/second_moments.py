"""Second moments of the activations that the matrices of a model meet in a text."""

from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from localv4.engine.engine import Engine
from localv4.engine.setup import Setup
from localv4.kernels.team import Team
from localv4.model.matrix import Floats, Matrix, Numerics, look_up
from localv4.model.state import State
from localv4.model.transformer import Transformer
from localv4.model.weights import Weights

Doubles = NDArray[np.float64]

CHUNK, WINDOW = 128, 1024
"""Tokens that are processed at once, and those that know one another."""


@dataclass
class Moments:
    """The sum of x x^T over activations x, and how many there were."""

    products: Doubles
    tokens: int = 0

    def mean(self) -> Doubles:
        """Return the mean of x x^T (cols, cols)."""
        mean: Doubles = self.products / max(self.tokens, 1)
        return mean


@dataclass
class Met:
    """A matrix with the moments of two parts of a text: one to learn from, one to judge by."""

    matrix: Matrix
    parts: list[Moments] = field(default_factory=list)

    def values(self) -> Floats:
        """Return the matrix in float32."""
        return look_up(self.matrix, np.arange(self.matrix.rows))


class Recorder(Numerics):
    """Arithmetic `exact` that adds up what its products meet."""

    def __init__(self, weights: Weights) -> None:
        super().__init__(Team(2), weights.widest)
        self.part = 0
        self.met: dict[tuple[int, int], Met] = {}

    def linear(self, x: Floats, weight: Matrix, groups: int = 1) -> Floats:
        """Multiply, and remember the activations of matrices of one group."""
        if groups == 1:
            key = (weight.data.ctypes.data, weight.rows)
            if key not in self.met:
                empty = np.zeros((weight.cols, weight.cols))
                self.met[key] = Met(weight, [Moments(empty.copy()), Moments(empty)])
            moments = self.met[key].parts[self.part]
            moments.products += x.T.astype(np.float64) @ x
            moments.tokens += len(x)
        return super().linear(x, weight, groups)


def record(path: Path, text: str, tokens: int) -> list[Met]:
    """Run a model over a text, half of the tokens for each part; return all matrices it used."""
    engine = Engine.load(path, Setup(numerics="exact"))
    network = engine.network
    assert isinstance(network, Transformer)
    recorder = Recorder(network.weights)
    recording = Transformer(network.config, network.weights, recorder)
    ids = np.array(engine.tokenizer.encode(text)[:tokens], np.int64)
    for recorder.part, half in enumerate(np.array_split(ids, 2)):
        for start in range(0, len(half), WINDOW):
            window = half[start : start + WINDOW]
            state = State(network.config, 2 * CHUNK)
            for first in range(0, len(window), CHUNK):
                recording.logits(recording.forward(window[first : first + CHUNK], state))
    return list(recorder.met.values())
