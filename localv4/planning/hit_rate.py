"""How often a chosen expert is in memory, by the share of experts that memory holds."""

from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import ArrayLike


@dataclass(frozen=True, slots=True)
class Bounds:
    """A number that is not known exactly: 0 <= low <= likely <= high."""

    low: float
    likely: float
    high: float

    def scaled(self, factor: float) -> "Bounds":
        """Return all three times a factor."""
        return Bounds(self.low * factor, self.likely * factor, self.high * factor)


class Routing(Protocol):
    """What is known of the experts that tokens choose; `source` says from where."""

    source: str

    def hit_rate(self, share: float) -> Bounds:
        """Return the share of chosen experts that are in memory when `share` of all are."""


_SHARES = (0.0, 0.1, 0.2, 0.34, 0.56, 0.78, 1.0)
_CALIBRATED = (0.0, 0.672, 0.793, 0.878, 0.945, 0.980, 1.0)
_DIVERSE = (0.0, 0.561, 0.704, 0.816, 0.912, 0.967, 1.0)
"""Decayed frequency over the whole pool, on two synthetic kinds of text: one calibrated to what
others measured on V4-Flash (LRU hits 61 % at a tenth of the experts, 93 % at half), and one whose
choices are flatter. docs/paging.md has the method."""


@dataclass(frozen=True, slots=True)
class TypicalText:
    """A released model on text and code: between the calibrated and the diverse simulation.

    `cycle_share` is the share of all experts that one token needs: with less than that nothing
    stays until it is needed again.
    """

    cycle_share: float
    source: str = "typical text (simulated)"

    def hit_rate(self, share: float) -> Bounds:
        """Return the share of hits; the likely one is the mean of both simulations."""
        if share >= 1.0:
            return Bounds(1.0, 1.0, 1.0)
        low, high = (_curve(share, values, self.cycle_share) for values in (_DIVERSE, _CALIBRATED))
        return Bounds(low, (low + high) / 2, high)


def _curve(share: float, values: Sequence[float], cycle_share: float) -> float:
    shares = [min(cycle_share, 0.099), *_SHARES[1:]]
    right = bisect_left(shares, share)
    if right == 0:
        return 0.0
    left = right - 1
    part = (share - shares[left]) / (shares[right] - shares[left])
    return values[left] + part * (values[right] - values[left])


@dataclass(frozen=True, slots=True)
class EvenRouting:
    """Every expert equally often, as random weights choose: the worst case for a cache."""

    source: str = "experts chosen evenly"

    def hit_rate(self, share: float) -> Bounds:
        """Return the share that is in memory."""
        share = min(1.0, share)
        return Bounds(share, share, share)


class CountedRouting:
    """What a model's own runs have counted.

    A cache of the most frequent experts would hit as often as they are chosen. A real one gains on
    that from what is chosen several times in a row, and loses by what it has to learn.
    """

    def __init__(self, counts: ArrayLike, source: str = "counted in earlier runs") -> None:
        """`counts` (layers, experts): how often each expert was chosen, decayed or not."""
        ordered = np.sort(np.asarray(counts, np.float64), axis=None)[::-1]
        if not ordered.size or ordered.sum() <= 0 or ordered[-1] < 0:
            raise ValueError("no expert was counted")
        self.source = source
        self._covered = np.concatenate([[0.0], np.cumsum(ordered) / ordered.sum()])

    def hit_rate(self, share: float) -> Bounds:
        """Return the share of choices that the most frequent experts have."""
        if share >= 1.0:
            return Bounds(1.0, 1.0, 1.0)
        place = share * (len(self._covered) - 1)
        likely = float(np.interp(place, np.arange(len(self._covered)), self._covered))
        missed = 1.0 - likely
        return Bounds(max(0.0, 1.0 - 1.2 * missed), likely, 1.0 - 0.85 * missed)
