"""The half-life follows what helps: short for texts that drift, long for those that do not."""

import numpy as np
import pytest

from localv4.paging.half_life import HALF_LIVES
from localv4.paging.policy import DecayedFrequency
from localv4.paging.uses import Uses

LAYERS, EXPERTS, K = 8, 64, 4


def half_life_after(tokens: int, correlation: float, seed: int) -> float:
    """Read a text whose experts' likelihoods drift, with a memory of so many tokens."""
    rng = np.random.default_rng(seed)
    uses, policy = Uses(LAYERS, EXPERTS), DecayedFrequency()
    liking, kept = rng.normal(size=(LAYERS, EXPERTS)) * 2, np.exp(-1 / correlation)
    for _ in range(tokens):
        fresh = rng.normal(size=liking.shape) * 2
        liking = kept * liking + np.sqrt(1 - kept**2) * fresh
        merit = liking - np.log(rng.exponential(size=liking.shape))
        uses.clock += 1
        for layer, numbers in enumerate(np.argsort(-merit, axis=1)[:, :K]):
            uses.record(layer, numbers)
        policy.observe(uses)
    assert policy.memory.changes <= tokens // 100  # drifting is no change of topic
    return uses.half_life


@pytest.mark.parametrize("seed", range(2))
def test_counts_of_a_drifting_text_decay_fast(seed: int) -> None:
    assert half_life_after(300, 20, seed) <= HALF_LIVES[1]


@pytest.mark.parametrize("seed", range(2))
def test_counts_of_a_steady_text_decay_slowly(seed: int) -> None:
    assert half_life_after(300, 1e9, seed) == HALF_LIVES[-1]
