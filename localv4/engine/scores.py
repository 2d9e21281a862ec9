"""The scores of a whole vocabulary, of which a sampler looks at few.

Blocks of tokens know their highest score and their weight (`kernels.survey`). What comes from them
is exact, or comes with a bound of its error: who needs more asks for all scores.
"""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from localv4.errors import NumericsError
from localv4.kernels.survey import BLOCK, ERROR, TEMPERATURES, survey

Ids = NDArray[np.int64]
Doubles = NDArray[np.float64]

_LIMIT = float(np.finfo(np.float32).max)

_MOST_SHARE = 4
"""A choice of more than this part of the vocabulary is not worth making."""


class Scores:
    """Logits (vocab,) f32, those of the `recent` tokens penalised.

    `best` is the highest. Raises NumericsError for NaN, +inf, or when nothing is allowed. Without a
    `temperature` nothing is known of weights.
    """

    def __init__(
        self,
        logits: NDArray[np.float32],
        recent: Sequence[int] = (),
        penalty: float = 1.0,
        temperature: float | None = None,
    ) -> None:
        self._logits = logits
        self._temperature = temperature or 1.0
        usable = temperature is not None and TEMPERATURES[0] <= temperature <= TEMPERATURES[1]
        ids = np.unique(np.asarray(recent, dtype=np.int64)) if penalty != 1 else np.zeros(0, int)
        self._ids = ids[(ids >= 0) & (ids < logits.size)]
        self._scores = _penalized(logits[self._ids], penalty)
        self._others = _in_blocks(logits, self._ids)
        self._peaks, sums = survey(self._others, temperature if usable else None)
        with np.errstate(invalid="ignore"):
            highest = self._peaks.max()
            _check_best(float(np.maximum(highest, logits[self._ids].max(initial=-np.inf))))
        self.best = max(float(highest), float(self._scores.max(initial=-np.inf)))
        self._sums = sums if usable else None

    def all(self) -> Doubles:
        """Return the scores (vocab,) of all tokens."""
        scores: Doubles = self._logits.astype(np.float64)
        scores[self._ids] = self._scores
        return scores

    def best_id(self) -> int:
        """Return the token with the highest score; of equals the lowest."""
        block = int(self._peaks.argmax())
        highest = float(self._peaks[block])
        other = block * BLOCK + int(self._others[block].argmax())
        if not self._ids.size or self._scores.max() < highest:
            return other
        own = int(self._ids[self._scores.argmax()])
        return min(own, other) if self.best == highest else own

    def highest(self, count: int) -> tuple[Ids, Doubles] | None:
        """Return tokens, ascending, and their scores, the `count` highest among them.

        None if they had better be looked for among all.
        """
        blocks = self._peaks.size
        if count > blocks // 2:
            return None
        # so many blocks have a score that is as high
        return self.at_least(float(np.partition(self._peaks, blocks - count)[blocks - count]))

    def at_least(self, bound: float) -> tuple[Ids, Doubles] | None:
        """Return tokens, ascending, and their scores, all with a score >= bound among them.

        None if they had better be looked for among all.
        """
        if not -_LIMIT <= bound <= _LIMIT:
            return None
        low = np.nextafter(np.float32(bound), np.float32(-np.inf))  # whichever way it was rounded
        blocks = np.flatnonzero(self._peaks >= low)
        some = self._others[blocks]
        rows, columns = np.nonzero(some >= low)
        if rows.size * _MOST_SHARE > self._logits.size:
            return None
        ids = np.concatenate([blocks[rows] * BLOCK + columns, self._ids])
        scores = np.concatenate([some[rows, columns], self._scores])
        if self._ids.size:
            order = np.argsort(ids)
            ids, scores = ids[order], scores[order]
        return ids, scores

    def mass(self) -> float | None:
        """Return the sum of the weights of all tokens within ERROR; None if that is not known.

        The weight of a token is exp((score - best) / temperature).
        """
        masses = self._masses()
        return float(masses.sum()) if masses is not None else None

    def draw(self, chance: float) -> int | None:
        """Return the token at which `chance`, from 0 to below 1, of the mass falls.

        Weights are laid side by side in the order of the tokens. None if it is not certain.
        """
        masses = self._masses()
        if masses is None:
            return None
        held = np.cumsum(masses)
        point, error = chance * held[-1], ERROR * held[-1]
        block = int(np.searchsorted(held, point, side="right"))
        start = held[block - 1] if block else 0.0
        ends = start + np.cumsum(self._weights(self._block(block)))
        place = int(np.searchsorted(ends, point, side="right"))
        if place == BLOCK:
            return None
        begin = ends[place - 1] if place else start
        certain = begin + error < point < ends[place] - error
        return block * BLOCK + place if certain else None

    def _weights(self, scores: Doubles) -> Doubles:
        weights: Doubles = np.exp((scores - self.best) / self._temperature)
        return weights

    def _block(self, block: int) -> Doubles:
        """Return the scores of the tokens of a block."""
        scores: Doubles = self._others[block].astype(np.float64)
        inside = self._ids // BLOCK == block
        scores[self._ids[inside] % BLOCK] = self._scores[inside]
        return scores

    def _masses(self) -> Doubles | None:
        """Return the weights (blocks,) of all blocks."""
        if self._sums is None:
            return None
        peaks = self._peaks.astype(np.float64)
        masses: Doubles = np.where(peaks > -np.inf, self._weights(peaks) * self._sums, 0)
        np.add.at(masses, self._ids // BLOCK, self._weights(self._scores))
        return masses


def _check_best(best: float) -> None:
    """Raise NumericsError unless there is a best token."""
    if np.isnan(best):
        raise NumericsError("the model computed NaN instead of logits")
    if best == np.inf:
        raise NumericsError("the model computed an infinite logit")
    if best == -np.inf:
        raise NumericsError("no token is allowed: all logits are -inf")


def _penalized(logits: NDArray[np.float32], penalty: float) -> Doubles:
    """Return logits divided by the penalty, or multiplied if negative.

    Source: the CTRL paper, arXiv 1909.05858, in the signed form that all engines use.
    """
    scores = logits.astype(np.float64)
    penalized: Doubles = np.where(scores > 0, scores / penalty, scores * penalty)
    return penalized


def _in_blocks(logits: NDArray[np.float32], without: Ids) -> NDArray[np.float32]:
    """Return logits (blocks, BLOCK), -inf behind the last and instead of those of some tokens."""
    missing = -logits.size % BLOCK
    if missing or without.size:
        logits = np.concatenate([logits, np.full(missing, -np.inf, np.float32)])
        logits[without] = -np.inf
    return np.ascontiguousarray(logits).reshape(-1, BLOCK)
