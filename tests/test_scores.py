"""Few tokens lead a sampler to the same one as all; what blocks of tokens say of them."""

import math
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from localv4.engine.sampler import Sampler, Sampling
from localv4.engine.scores import Scores
from localv4.kernels.survey import BLOCK, ERROR, survey

VOCAB = 129_280
INF = math.inf


def peaked(seed: int, size: int = VOCAB) -> NDArray[np.float32]:
    """Logits as models have them: most far below some."""
    random = np.random.default_rng(seed)
    logits = random.normal(0, 2, size) + random.exponential(1.5, size)
    return logits.astype(np.float32)


def coarse(seed: int, size: int = VOCAB) -> NDArray[np.float32]:
    """Logits many of which are equal, some forbidden."""
    random = np.random.default_rng(seed)
    logits = np.round(peaked(seed, size))
    logits[random.integers(0, size, size // 9)] = -INF
    return logits


def certain(seed: int, size: int = VOCAB) -> NDArray[np.float32]:
    """Logits one of which stands out."""
    logits = np.random.default_rng(seed).normal(0, 1, size).astype(np.float32)
    logits[seed * 7919 % size] += 25
    return logits


SETTINGS: list[dict[str, Any]] = [
    {"temperature": 0.0},
    {},
    {"temperature": 0.6},
    {"temperature": 3.0},
    {"temperature": 1e-9},
    {"temperature": 1e9},
    {"top_k": 1},
    {"top_k": 2},
    {"top_k": 40},
    {"top_k": 252},
    {"top_k": 5000},
    {"top_p": 0.1},
    {"top_p": 0.9},
    {"top_p": 0.999},
    {"min_p": 0.05},
    {"min_p": 1.0},
    {"min_p": 5e-324},
    {"temperature": 1e300, "min_p": 0.5},
    {"top_k": 50, "top_p": 0.95, "min_p": 0.02, "temperature": 0.8},
    {"top_p": 0.95, "min_p": 0.02, "temperature": 1.3},
]


@pytest.mark.parametrize("penalty", [1.0, 1.3, 0.7])
@pytest.mark.parametrize("options", SETTINGS, ids=str)
@pytest.mark.parametrize("make", [peaked, coarse, certain])
def test_few_tokens_lead_to_the_same_one(
    make: Any, options: dict[str, Any], penalty: float
) -> None:
    sampling = Sampling(**options, repetition_penalty=penalty, seed=1)
    for seed, size in ((1, VOCAB), (2, 5_003)):
        logits = make(seed, size)
        best = np.argsort(-logits)[:4]
        recent = [*best.tolist(), *range(-2, 300, 7), size, 10**9]
        quick, slow = Sampler(sampling), Sampler(sampling)
        for _ in range(8):
            scores = Scores(logits, recent, penalty)
            if sampling.temperature == 0 or sampling.top_k == 1:
                expected = int(scores.all().argmax())
            else:
                expected = slow._pick_from_all(scores, slow._random.random())
            assert quick.pick(logits, recent) == expected


@pytest.mark.parametrize(
    "options",
    [{}, {"top_k": 40}, {"top_p": 0.9}, {"min_p": 0.05}, {"temperature": 0.7, "top_p": 0.95}],
    ids=str,
)
def test_few_tokens_do_for_logits_as_models_have_them(
    monkeypatch: pytest.MonkeyPatch, options: dict[str, Any]
) -> None:
    """Otherwise nothing would be gained."""
    sampler, asked = Sampler(Sampling(**options, seed=3)), 0

    def count_and_pick(scores: Scores, chance: float) -> int:
        nonlocal asked
        asked += 1
        return 0

    monkeypatch.setattr(sampler, "_pick_from_all", count_and_pick)
    for _ in range(50):
        sampler.pick(certain(5))
    assert asked == 0
    for _ in range(50):
        sampler.pick(peaked(5) * 2)
    assert asked <= 5


@pytest.mark.parametrize("temperature", [0.01, 0.3, 1.0, 7.0, 100.0])
@pytest.mark.parametrize("make", [peaked, coarse, certain])
def test_blocks_are_weighed_within_the_bound(make: Any, temperature: float) -> None:
    logits = make(8).reshape(-1, BLOCK)
    logits[3] = -INF
    logits[4, 1:] = -INF
    peaks, sums = survey(logits, temperature)
    assert np.array_equal(peaks, logits.max(axis=1))
    usable = peaks > -INF
    below = logits[usable].astype(np.float64) - peaks[usable, None].astype(np.float64)
    exact = np.exp(below / temperature).sum(axis=1)
    assert np.abs(sums[usable] / exact - 1).max() < ERROR


def test_equal_logits_have_the_largest_sums() -> None:
    peaks, sums = survey(np.full((2, BLOCK), -7, np.float32), 1.0)
    assert peaks.tolist() == [-7, -7]
    assert np.allclose(sums, BLOCK, rtol=ERROR)


@pytest.mark.parametrize("at", [0, 15, 16, BLOCK - 1])
@pytest.mark.parametrize("odd", [math.nan, -math.nan, INF])
def test_no_bad_logit_is_overlooked(at: int, odd: float) -> None:
    logits = np.zeros((3, BLOCK), np.float32)
    logits[1, at] = odd
    peaks, _ = survey(logits)
    assert np.array_equal(peaks, np.array([0, abs(odd), 0], np.float32), equal_nan=True)


def test_read_only_logits_will_do() -> None:
    logits = peaked(1)
    logits.setflags(write=False)
    assert Sampler(Sampling(0.0)).pick(logits) == int(logits.argmax())


def test_a_penalty_makes_equals() -> None:
    logits = np.full(1000, -9, np.float32)
    logits[[400, 700]] = (2, 1)
    for ids, expected in (([400], 400), ([400, 700], 400), ([700], 400)):
        assert Sampler(Sampling(0.0, repetition_penalty=2.0)).pick(logits, ids) == expected
    logits[[300, 700]] = (1, 2)
    logits[400] = -9
    assert Sampler(Sampling(0.0, repetition_penalty=2.0)).pick(logits, [700]) == 300
