"""How often a chosen expert is in memory, by the share of experts that memory holds."""

from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import ArrayLike, NDArray


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


FEW_EXPERTS = 5
"""Fewer experts that were chosen equally often tell nothing of the next choices."""

LEARNING = (1.25, 1.1, 0.9)
"""Misses of decayed frequencies for each one of a fixed choice of the most frequent experts: 0.9 to
1.25 in the simulations, 1.1 measured with random weights."""

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
    source: str = "typical text, simulated"

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


class CountedRouting:
    """What a model's own runs have counted.

    A cache of the most frequent experts would hit as often as they are chosen. A real one gains on
    that from what is chosen several times in a row, and loses by what it has to learn.
    """

    def __init__(self, counts: ArrayLike, source: str = "counted in earlier runs") -> None:
        """`counts` (layers, experts): how often each expert was chosen, rounded to whole times.

        Raises ValueError if none was chosen.
        """
        whole = np.rint(np.asarray(counts, np.float64)).ravel()
        if not whole.size or whole.max() < 1 or whole.min() < 0:
            raise ValueError("no expert was counted")
        ordered = np.sort(_expected(whole.astype(np.int64)))[::-1]
        self.source = source
        self._covered = np.concatenate([[0.0], np.cumsum(ordered) / ordered.sum()])

    def hit_rate(self, share: float) -> Bounds:
        """Return the share of choices that the most frequent experts have, less what is learnt."""
        if share >= 1.0:
            return Bounds(1.0, 1.0, 1.0)
        place = share * (len(self._covered) - 1)
        covered = float(np.interp(place, np.arange(len(self._covered)), self._covered))
        low, middle, high = (max(0.0, 1.0 - factor * (1.0 - covered)) for factor in LEARNING)
        return Bounds(low, middle, high)


class SeveralTopics:
    """What a model's own runs have counted, topic by topic.

    A cache that follows the text has to hold the experts of one topic at a time, not of all.
    """

    source = "counted in earlier runs"

    def __init__(self, topics: Sequence[ArrayLike]) -> None:
        """Counts (layers, experts) of each topic; ValueError if nothing was counted in any."""
        arrays = [np.asarray(counts, np.float64) for counts in topics]
        self._topics = [CountedRouting(a) for a in arrays if a.size and np.rint(a).max() >= 1]
        self._weights = [float(a.sum()) for a in arrays if a.size and np.rint(a).max() >= 1]
        if not self._topics:
            raise ValueError("no expert was counted")

    def hit_rate(self, share: float) -> Bounds:
        """Return the mean of the topics, each counting as much as it was used."""
        rates = [topic.hit_rate(share) for topic in self._topics]
        values = np.array([(rate.low, rate.likely, rate.high) for rate in rates])
        return Bounds(*np.average(values, axis=0, weights=self._weights).tolist())


def _expected(counts: NDArray[np.int64]) -> NDArray[np.float64]:
    """Return how often each expert would be chosen in as many choices that come.

    Of those that were chosen c times, Good and Turing expect (c + 1) * n(c + 1) / n(c): few choices
    among many experts look uneven even if they are not. Where n is too small to tell, c stands.
    """
    times = np.bincount(counts)
    expected = np.arange(len(times), dtype=np.float64)
    for count in range(len(times) - 1):
        if min(times[count], times[count + 1]) < FEW_EXPERTS:
            break
        expected[count] = (count + 1) * times[count + 1] / times[count]
    values: NDArray[np.float64] = np.maximum.accumulate(expected)[counts]
    return values
