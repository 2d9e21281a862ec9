"""Choose, while tokens run, how fast counts of uses decay.

How long a count stays true differs from text to text. So several half-lives are tried at the same
time on a few layers: whichever would have kept more of the experts that the next token used is
taken for all layers.
"""

import numpy as np
from numpy.typing import NDArray

from localv4.paging.uses import Heat, Uses

HALF_LIVES = (8.0, 24.0, 72.0, 256.0)
"""Tokens; the last is where counting begins."""

_LAYERS = 6  # that are watched
_SHARES = (1 / 8, 1 / 4, 1 / 2)  # of the experts that a layer may keep: hits of all are added
_MEMORY = 0.5 ** (1 / 64)  # hits are averaged with a half-life of 64 tokens
_PATIENCE = 32  # tokens before the first change and between two
_ADVANTAGE = 1.03  # by which another one must be better


class HalfLives:
    """Watches the uses of experts and sets their half-life."""

    def __init__(self) -> None:
        self._heats: NDArray[np.float32] | None = None  # (half-lives, watched layers, experts)
        self._watched: NDArray[np.int64] = np.zeros(0, np.int64)
        self._decay = (0.5 ** (1 / np.array(HALF_LIVES, np.float32)))[:, None, None]
        self._hits = np.zeros(len(HALF_LIVES))
        self._waited = 0

    def observe(self, uses: Uses) -> None:
        """Learn from the token that has the clock's time and whose uses are recorded."""
        if self._heats is None:
            layers = len(uses.heat)
            self._watched = np.unique(np.linspace(0, layers - 1, _LAYERS).astype(np.int64))
            self.restart(uses.scores())
            return
        used = uses.last[self._watched] == uses.clock[0]
        self._hits = self._hits * _MEMORY + _hits(self._heats, used)
        self._heats *= self._decay
        self._heats[:, used] += 1
        self._waited += 1
        best = int(np.argmax(self._hits))
        current = HALF_LIVES.index(uses.half_life)
        if self._waited >= _PATIENCE and self._hits[best] > _ADVANTAGE * self._hits[current]:
            uses.half_life = HALF_LIVES[best]
            self._waited = 0

    def restart(self, scores: Heat) -> None:
        """Count on from the scores of all layers, as `Uses.restart` does."""
        watched = scores[self._watched]
        self._heats = np.repeat(watched[None], len(HALF_LIVES), axis=0)


def _hits(heats: NDArray[np.float32], used: NDArray[np.bool_]) -> NDArray[np.float64]:
    """Return the share of used experts that each half-life would have kept, for all limits."""
    experts = heats.shape[2]
    order = np.argsort(-heats, axis=2)
    ranks = np.empty_like(order)
    np.put_along_axis(ranks, order, np.arange(experts)[None, None], axis=2)
    found = ranks[:, used]
    limits = [max(1, int(share * experts)) for share in _SHARES]
    hits: NDArray[np.float64] = sum(np.mean(found < limit, axis=1) for limit in limits)
    return hits
