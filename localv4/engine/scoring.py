"""What a model makes of a window: the probabilities of all tokens, position by position."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from localv4.engine.engine import Engine
from localv4.engine.noise import RoundingNoise
from localv4.errors import NumericsError

Row = NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Estimate:
    """A figure and its standard error."""

    value: float
    error: float


def mean(samples: Row) -> Estimate:
    """Return the mean of samples taken as independent: error = std / sqrt(n - 1), as llama.cpp."""
    count = samples.size
    error = float(samples.std() / np.sqrt(count - 1)) if count > 1 else float("nan")
    return Estimate(float(samples.mean()), error)


def exponential(logarithm: Estimate) -> Estimate:
    """Return e to the power of an estimate; its relative error is the error of the logarithm."""
    value = float(np.exp(logarithm.value))
    return Estimate(value, value * logarithm.error)


def log_softmax(logits: NDArray[np.float32]) -> Row:
    """Return log p (..., vocab) in float64: differences of tiny divergences need its digits."""
    wide = logits.astype(np.float64)
    wide -= wide.max(axis=-1, keepdims=True)
    wide -= np.log(np.exp(wide).sum(axis=-1, keepdims=True))
    return wide


def logits_rows(
    engine: Engine, ids: Sequence[int], first: int = 0, noise: RoundingNoise | None = None
) -> Iterator[NDArray[np.float32]]:
    """Yield the logits (vocab,) at the positions from `first` on.

    The network bears the noise only while it computes, so that rows with and without it can be
    drawn in turns. Raises NumericsError for a NaN or an infinity.
    """
    position = 0
    chunks = engine.logits(ids)
    while position < len(ids):
        if noise is None:
            chunk = next(chunks)
        else:
            with noise:
                chunk = next(chunks)
        if not np.isfinite(chunk).all():
            raise NumericsError(f"the logits after token {position} or soon after are not finite")
        yield from chunk[max(0, first - position) :]
        position += len(chunk)
