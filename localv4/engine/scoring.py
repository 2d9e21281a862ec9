"""What a model makes of a window: the probabilities of all tokens, position by position."""

from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from localv4.engine.engine import Engine
from localv4.engine.noise import RoundingNoise
from localv4.engine.session import Network
from localv4.errors import DoesNotFitError, NumericsError
from localv4.kernels.threads import use_threads
from localv4.model.matrix import Floats

Row = NDArray[np.float64]

HEAD_ROWS = 64
"""Tokens whose logits are computed together: 33 MB for a vocabulary of 129,280."""


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
    drawn in turns. Memory is bounded by the logits of HEAD_ROWS tokens. Raises NumericsError for
    a NaN or an infinity, DoesNotFitError, BadFileError when the model's files changed under us.
    """
    network = engine.network
    for start, vectors in final_vectors(engine, network, ids, noise):
        for row in range(max(0, first - start), len(vectors), HEAD_ROWS):
            with noise or nullcontext():
                logits = network.logits(vectors[row : row + HEAD_ROWS])
            if not np.isfinite(logits).all():
                raise NumericsError(f"the logits after token {start + row} or soon after are NaN")
            yield from logits


def final_vectors(
    engine: Engine, network: Network, ids: Sequence[int], noise: RoundingNoise | None = None
) -> Iterator[tuple[int, Floats]]:
    """Yield (position, vectors (tokens, hidden) from there on) for chunks of a text.

    `network` is that of the engine or another one over its weights. A state of its own, without
    the snapshots of a session: nobody will go back.
    """
    try:
        state, size = network.new_state(), network.chunk_tokens
        for start in range(0, len(ids), size):
            engine.checkpoint.check_unchanged()
            use_threads(network.threads)
            with noise or nullcontext():
                vectors = network.forward(np.asarray(ids[start : start + size], np.int64), state)
            yield start, vectors
    except MemoryError:
        raise DoesNotFitError("out of memory", hint="use smaller windows: -c") from None
