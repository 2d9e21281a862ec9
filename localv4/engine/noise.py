"""Harmless noise: the same network with the last bits of some values moved."""

from collections.abc import Iterator
from types import TracebackType
from typing import Self

import numpy as np

from localv4.model.matrix import F32, Floats
from localv4.model.weights import Weights


class RoundingNoise:
    """Moves each gain of each norm to the next float32, up or down by chance, while it is entered.

    So every value that a norm hands to a matrix is off by one rounding of float32, in all layers,
    as after another order of additions. Differences of results that are not larger than those
    this makes mean nothing.
    """

    def __init__(self, weights: Weights, seed: int = 0) -> None:
        chance = np.random.default_rng(seed)
        self._gains = list(_gains(weights))
        self._own = [gain.copy() for gain in self._gains]
        self._moved = [_moved(gain, chance) for gain in self._gains]

    def __enter__(self) -> Self:
        # in place: programs of the network know the addresses of these arrays
        for gain, moved in zip(self._gains, self._moved, strict=True):
            gain[:] = moved
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for gain, own in zip(self._gains, self._own, strict=True):
            gain[:] = own


def _gains(weights: Weights) -> Iterator[Floats]:
    """Yield the gains of all norms of a network."""
    for layer in weights.layers:
        yield layer.attn_norm
        yield layer.ffn_norm
        yield layer.attention.q_norm
        yield layer.attention.kv_norm
        indexer = layer.attention.indexer
        for compressor in (layer.attention.compressor, indexer.compressor if indexer else None):
            if compressor is not None:
                yield compressor.norm
    yield weights.norm


def _moved(gain: Floats, chance: np.random.Generator) -> Floats:
    towards = np.where(chance.random(gain.shape) < 0.5, F32(-np.inf), F32(np.inf))
    return np.nextafter(gain, towards)
