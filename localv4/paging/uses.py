"""How often and when each expert was used: arrays that kernels update, so a hit needs no Python."""

import math

import numpy as np
from numpy.typing import NDArray

STEPS = 4096
"""Ages in tokens that `Uses.decay` tells apart; older uses count as the oldest of them: nothing."""

NEVER = -(1 << 40)
"""`Uses.last` of an expert that was not used yet."""

GUARD_TOKENS = 2
"""Experts that the running token or the one before used are given up last: an expert is likelier
to be used again at once than its count says yet."""

DEFAULT_HALF_LIFE = 256.0
"""Tokens after which a use counts half; docs/paging_policy.md has the measurements."""

Heat = NDArray[np.float32]
"""Decayed numbers of uses, (layers, experts)."""


class Uses:
    """A decayed count of the uses of each expert, and its last use.

    `clock` (1,) i64 is the number of the token that runs: whoever runs tokens raises it before
    each. `last` (layers, experts) i64 is the clock of the last use, `heat` (layers, experts) f32
    the decayed count at that time, `decay` (STEPS,) f32 what is left of a count after so many
    tokens. The arrays stay where they are for as long as this object lives: kernels know their
    addresses.
    """

    def __init__(self, layers: int, experts: int, half_life: float = DEFAULT_HALF_LIFE) -> None:
        self.heat: Heat = np.zeros((layers, experts), np.float32)
        self.last = np.full((layers, experts), NEVER, np.int64)
        self.clock = np.zeros(1, np.int64)
        self.decay = np.ones(STEPS, np.float32)
        self._half_life = math.inf
        self.half_life = half_life

    @property
    def half_life(self) -> float:
        """Tokens after which a use counts half; infinite if uses are only counted."""
        return self._half_life

    @half_life.setter
    def half_life(self, tokens: float) -> None:
        """Count on with another half-life; the scores of now stay what they are."""
        assert tokens > 0
        now = self.scores()
        self._half_life = tokens
        self.decay[:] = 2.0 ** (-np.arange(STEPS) / tokens)
        if math.isfinite(tokens):
            self.decay[-1] = 0
        self.restart(now)

    def ages(self) -> NDArray[np.int64]:
        """Return how many tokens ago each expert was used, at most STEPS - 1."""
        ages: NDArray[np.int64] = np.minimum(self.clock[0] - self.last, STEPS - 1)
        return ages

    def scores(self) -> Heat:
        """Return the heat of each expert decayed to now (layers, experts)."""
        scores: Heat = self.heat * self.decay[self.ages()]
        return scores

    def scores_of(self, layer: int) -> Heat:
        """Return the scores of one layer's experts (experts,)."""
        ages = np.minimum(self.clock[0] - self.last[layer], STEPS - 1)
        scores: Heat = self.heat[layer] * self.decay[ages]
        return scores

    def record(
        self, layer: int, numbers: NDArray[np.integer], counts: NDArray[np.float32] | None = None
    ) -> None:
        """Count uses of different experts of a layer now: once each, or `counts` of them.

        This is what the operation `resolve` does for the experts of a token (`kernels.route`).
        """
        age = np.minimum(self.clock[0] - self.last[layer, numbers], STEPS - 1)
        kept = self.heat[layer, numbers] * self.decay[age]
        self.heat[layer, numbers] = kept + (1 if counts is None else counts)
        self.last[layer, numbers] = self.clock[0]

    def record_tokens(self, layer: int, chosen: NDArray[np.integer]) -> None:
        """Count the uses of several tokens, chosen (tokens, k), of which the last has the clock.

        The scores are those of recording token by token. Uses more than STEPS back do not count.
        """
        experts = self.heat.shape[1]
        recent = chosen[-STEPS:].astype(np.int64)
        ages = np.repeat(np.arange(len(recent))[::-1], chosen.shape[1])
        counts = np.bincount(recent.ravel(), self.decay[ages], experts)
        youngest = self.ages()[layer]
        scores = self.heat[layer] * self.decay[youngest] + counts
        np.minimum.at(youngest, recent.ravel(), ages)
        used = counts > 0
        self.last[layer, used] = self.clock[0] - youngest[used]
        # a heat is as of the last use, and these scores are as of now
        self.heat[layer, used] = scores[used] / np.maximum(self.decay[youngest[used]], 1e-6)

    def restart(self, scores: Heat) -> None:
        """Count on from these scores (layers, experts), for instance those of an earlier session.

        Uses before the last tokens count as just old enough for their experts to be given up.
        """
        known = (self.ages() >= GUARD_TOKENS) & (scores > 0)
        self.last[known] = self.clock[0] - GUARD_TOKENS
        self.heat[:] = scores / np.maximum(self.decay[self.ages()], 1e-6)
