"""Rings: rows of the last positions, for what the next tokens read no further back."""

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from localv4.model.config import LayerKind, ModelConfig
from localv4.model.matrix import F32, Floats


@dataclass(frozen=True, slots=True)
class RingShape:
    """Rows of `width` values, one for each position, of which the last are read again.

    After P tokens they are those from position P // period * period - back on.
    """

    width: int
    period: int
    back: int

    def capacity(self, slack: int) -> int:
        """Return the positions that a ring holds which goes back by `slack` tokens."""
        return self.period + self.back + slack

    def first_needed(self, position: int) -> int:
        """Return the first position whose row is read again after `position` tokens."""
        return max(0, position // self.period * self.period - self.back)

    def most_needed(self, step: int) -> int:
        """Return the most rows that are read again after any multiple of `step` tokens."""
        return self.period - math.gcd(self.period, step) + self.back


class Ring:
    """Rows by position: position p lies in slot p % capacity."""

    def __init__(self, shape: RingShape, slack: int) -> None:
        self.values = np.zeros((shape.capacity(slack), shape.width), F32)
        self.first_needed = shape.first_needed

    def write(self, first: int, rows: Floats) -> None:
        """Store the rows of positions first, first + 1, ..."""
        self.values[self._slots(first, first + rows.shape[0])] = rows

    def read(self, first: int, end: int) -> Floats:
        """Return a copy of the rows of positions first ... end - 1."""
        rows: Floats = self.values[self._slots(first, end)]
        return rows

    def _slots(self, first: int, end: int) -> NDArray[np.int64]:
        slots: NDArray[np.int64] = np.arange(first, end) % self.values.shape[0]
        return slots


def window_shape(config: ModelConfig) -> RingShape:
    """Return the shape of the keys in the raw window."""
    return RingShape(config.head_dim, period=1, back=config.window - 1)


def pooling_shape(width: int, ratio: int, reach: int) -> RingShape:
    """Return the shape of what a compressor pools: `reach` windows of `ratio` into an entry.

    Each of the windows has its own `width` channels.
    """
    return RingShape(reach * width, period=ratio, back=(reach - 1) * ratio)


def ring_shapes(config: ModelConfig, layer: int) -> list[RingShape]:
    """Return the shapes of a layer's rings: window; keys and gates of compressor and indexer."""
    kind, ratio = config.layer_kinds[layer], config.ratios[layer]
    shapes = [window_shape(config)]
    if kind is LayerKind.HCA:
        shapes += 2 * [pooling_shape(config.head_dim, ratio, 1)]
    elif kind is LayerKind.CSA:
        shapes += 2 * [pooling_shape(config.head_dim, ratio, 2)]
        shapes += 2 * [pooling_shape(config.index_head_dim, ratio, 2)]
    return shapes
