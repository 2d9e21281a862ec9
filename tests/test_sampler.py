"""Sampler: exact candidate sets against a slow twin, probabilities, edge cases, reproducibility."""

import math
import time
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from localv4.engine.sampler import Sampler, Sampling
from localv4.errors import NumericsError, UsageError

VOCAB = 129_280
INF = math.inf


def array(*values: float) -> NDArray[np.float32]:
    return np.array(values, dtype=np.float32)


def naive(logits: NDArray[np.float32], s: Sampling, recent: list[int]) -> dict[int, float]:
    """The definition, token by token: id -> probability."""
    scores = {}
    for token, logit in enumerate(logits.astype(float).tolist()):
        if token in recent and s.repetition_penalty != 1:
            logit = logit / s.repetition_penalty if logit > 0 else logit * s.repetition_penalty
        scores[token] = logit
    order = sorted(scores, key=lambda token: (-scores[token], token))
    if s.temperature == 0:
        return {order[0]: 1.0}
    if s.top_k:
        order = order[: s.top_k]
    weights = {t: math.exp((scores[t] - scores[order[0]]) / s.temperature) for t in order}
    if s.top_p < 1:
        total, held, kept = sum(weights.values()), 0.0, []
        for token in order:
            kept.append(token)
            held += weights[token]
            if held >= s.top_p * total:
                break
        order = kept
    order = [t for t in order if weights[t] >= s.min_p and weights[t] > 0]
    total = sum(weights[t] for t in order)
    return {t: weights[t] / total for t in order}


def drawn(
    logits: NDArray[np.float32], s: Sampling, recent: list[int], count: int
) -> NDArray[np.int64]:
    sampler = Sampler(s)
    return np.array([sampler.pick(logits, recent) for _ in range(count)])


# ------------------------------------------------------------------ candidates and probabilities

# Thirds of integers: far from any border of top-p and min-p, with many ties
grid_logits = st.lists(
    st.one_of(st.integers(-9, 9).map(lambda n: n / 3), st.just(-INF)), min_size=1, max_size=12
).filter(lambda values: max(values) > -INF)


@given(
    grid_logits,
    st.sampled_from([0.0, 0.3, 1.0, 2.5]),
    st.sampled_from([0, 1, 2, 5, 100]),
    st.sampled_from([0.0, 0.017, 0.513, 0.93, 1.0]),
    st.sampled_from([0.0, 0.037, 0.61, 1.0]),
    st.sampled_from([1.0, 1.3, 0.7]),
    st.lists(st.integers(-2, 14), max_size=4),
)
@settings(max_examples=300, deadline=None)
def test_only_candidates_of_the_definition_are_picked(
    values: list[float],
    temperature: float,
    top_k: int,
    top_p: float,
    min_p: float,
    penalty: float,
    recent: list[int],
) -> None:
    logits = array(*values)
    s = Sampling(temperature, top_p, top_k, min_p, penalty, seed=1)
    expected = naive(logits, s, recent)
    picked = set(drawn(logits, s, recent, 60).tolist())
    assert picked <= set(expected)
    likely = {token for token, p in expected.items() if p > 0.25}  # missed once in 10^7
    assert likely <= picked


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"temperature": 0.5},
        {"temperature": 3.0},
        {"top_k": 3},
        {"top_p": 0.8},
        {"min_p": 0.1},
        {"repetition_penalty": 1.5},
        {"temperature": 1.7, "top_k": 6, "top_p": 0.9, "min_p": 0.05, "repetition_penalty": 1.2},
    ],
)
def test_frequencies_match_the_probabilities(options: dict[str, Any]) -> None:
    logits = array(2.0, 1.0, 1.0, -0.5, 0.25, -3.0, -INF, 1.9)
    s = Sampling(**options, seed=11)
    recent = [0, 3, 3]
    expected = naive(logits, s, recent)
    count = 8_000
    counts = np.bincount(drawn(logits, s, recent, count), minlength=logits.size)
    assert counts.sum() == sum(counts[t] for t in expected)
    chi2 = sum((counts[t] - count * p) ** 2 / (count * p) for t, p in expected.items())
    # 30 is beyond the 99.99 % quantile for up to 7 degrees of freedom; the seed is fixed
    assert chi2 < 30


def test_wrong_probabilities_would_be_noticed() -> None:
    logits = array(2.0, 1.0, 1.0)
    counts = np.bincount(drawn(logits, Sampling(temperature=1.3, seed=3), [], 8_000))
    expected = naive(logits, Sampling(), [])
    assert sum((counts[t] - 8_000 * p) ** 2 / (8_000 * p) for t, p in expected.items()) > 30


def test_full_size_vocabulary_matches_the_definition() -> None:
    logits = np.random.default_rng(2).normal(0, 3, VOCAB).astype(np.float32)
    for s in (
        Sampling(top_p=0.3, seed=5),
        Sampling(top_p=0.999, temperature=2, seed=5),
        Sampling(top_k=40, top_p=0.9, seed=5),
        Sampling(top_k=1000, seed=5),
        Sampling(min_p=0.2, seed=5),
    ):
        allowed = naive(logits, s, [])
        assert set(drawn(logits, s, [], 10).tolist()) <= set(allowed)
        ids, weights = Sampler(s)._candidates(logits)
        # a sum over 129,280 numbers may round to one more or one less at the border
        assert len(set(ids.tolist()) ^ set(allowed)) <= 1
        assert weights.max() == 1


@pytest.mark.parametrize("options", [{"top_p": 0.4}, {"top_k": 333}, {"top_k": 500, "top_p": 0.7}])
def test_among_many_equals_the_lowest_ids_stay(options: dict[str, Any]) -> None:
    logits = (np.random.default_rng(4).integers(-9, 9, 2000) / 3).astype(np.float32)
    s = Sampling(**options)
    assert Sampler(s)._candidates(logits)[0].tolist() == sorted(naive(logits, s, []))


def test_full_size_vocabulary_is_quick() -> None:
    logits = np.random.default_rng(2).normal(0, 1, VOCAB).astype(np.float32)
    started = time.monotonic()
    for s in (Sampling(top_k=40), Sampling(top_p=0.95), Sampling(min_p=0.05), Sampling(0.0)):
        drawn(logits, s, list(range(1000)), 10)
    assert time.monotonic() - started < 5


# ------------------------------------------------------------------ edge cases


def test_greedy_takes_the_lowest_of_equals() -> None:
    assert Sampler(Sampling(0.0)).pick(array(1, 3, 3, 2)) == 1
    assert Sampler(Sampling(0.0)).pick(np.zeros(VOCAB, np.float32)) == 0


@pytest.mark.parametrize("options", [{"top_p": 0.0}, {"top_k": 1}, {"temperature": 0.0}])
def test_settings_that_leave_one_token(options: dict[str, Any]) -> None:
    logits = array(1, 3, 3, 2)
    assert set(drawn(logits, Sampling(**options), [], 50).tolist()) == {1}


def test_tiny_temperature_is_greedy_but_ties_stay_random() -> None:
    logits = array(1, 3, 3, 2.999)
    for temperature in (1e-9, 1e-300, 5e-324):
        picked = drawn(logits, Sampling(temperature, seed=0), [], 50).tolist()
        assert set(picked) == {1, 2}
    assert set(drawn(array(1, 2), Sampling(1e-9), [], 50).tolist()) == {1}


def test_huge_temperature_is_uniform() -> None:
    counts = np.bincount(drawn(array(50, 0, -50, -INF), Sampling(1e9, seed=0), [], 6000))
    assert counts.size == 3
    assert counts.min() > 1800


def test_all_equal_logits() -> None:
    logits = np.full(10, 7, np.float32)
    assert set(drawn(logits, Sampling(seed=0), [], 300).tolist()) == set(range(10))
    assert set(drawn(logits, Sampling(top_k=3, seed=0), [], 100).tolist()) == {0, 1, 2}
    assert set(drawn(logits, Sampling(top_p=0.35, seed=0), [], 100).tolist()) == {0, 1, 2, 3}
    assert set(drawn(logits, Sampling(min_p=1.0, seed=0), [], 300).tolist()) == set(range(10))
    many = np.zeros(1000, np.float32)
    assert max(drawn(many, Sampling(top_p=0.2505, seed=0), [], 2000)) == 250
    assert Sampler(Sampling(top_p=0.5)).pick(np.zeros(VOCAB, np.float32)) < VOCAB // 2 + 1


@pytest.mark.parametrize("top_k", [0, 4, 5, 10**9, 10**400])
def test_top_k_off_or_beyond_the_vocabulary(top_k: int) -> None:
    logits = array(0, 0, 0, 0)
    assert set(drawn(logits, Sampling(top_k=top_k, seed=0), [], 100).tolist()) == {0, 1, 2, 3}


def test_forbidden_tokens_are_never_picked() -> None:
    logits = np.full(VOCAB, -INF, np.float32)
    logits[[5, 77_777]] = (0.0, -1.0)
    for s in (Sampling(seed=0), Sampling(top_k=50, seed=0), Sampling(top_p=0.99, seed=0)):
        assert set(drawn(logits, s, [5], 30).tolist()) == {5, 77_777}
    assert Sampler(Sampling(1e9, repetition_penalty=100.0)).pick(array(-INF, -5), [0, 1]) == 1


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize(
    ("values", "message"),
    [
        ((0, math.nan, 1), "NaN"),
        ((math.nan,) * 3, "NaN"),
        ((-INF, math.nan, INF), "NaN"),
        ((0, INF), "infinite"),
        ((-INF, -INF), "no token is allowed"),
    ],
)
def test_logits_that_are_no_numbers(
    values: tuple[float, ...], message: str, temperature: float
) -> None:
    with pytest.raises(NumericsError, match=message):
        Sampler(Sampling(temperature)).pick(array(*values))


def test_nan_at_the_end_of_a_large_vocabulary() -> None:
    logits = np.zeros(VOCAB, np.float32)
    logits[-1] = math.nan
    with pytest.raises(NumericsError):
        Sampler(Sampling(top_k=5)).pick(logits)


def test_repetition_penalty_works_on_both_signs() -> None:
    greedy = Sampling(0.0, repetition_penalty=2.0)
    assert Sampler(greedy).pick(array(3, 2, 1), [0]) == 1
    assert Sampler(greedy).pick(array(-1, -1.5, -9), [0]) == 1
    assert Sampler(greedy).pick(array(3, 2, 1), [0, 0, 0]) == 1  # once, however often it occurs
    assert Sampler(greedy).pick(array(3, 2, 1), [-1, 3, 99]) == 0
    extreme = np.array([3e38, 1], np.float32)
    assert Sampler(Sampling(0.0, repetition_penalty=0.01)).pick(extreme, [0, 1]) == 0


def test_logits_are_not_changed() -> None:
    logits = array(3, 2, 1)
    Sampler(Sampling(repetition_penalty=2.0, top_k=2, top_p=0.9)).pick(logits, [0])
    assert logits.tolist() == [3, 2, 1]


@pytest.mark.parametrize("chance", [0.0, float(np.nextafter(1, 0))])
def test_the_extreme_chances_pick_possible_tokens(
    monkeypatch: pytest.MonkeyPatch, chance: float
) -> None:
    class Fixed:
        def random(self) -> float:
            return chance

    for spread in (0.1, 1.0, 3.0):
        for size in range(1, 200, 7):
            logits = np.random.default_rng(size).normal(0, spread, size + 2).astype(np.float32)
            logits[[0, -1]] = -INF
            sampler = Sampler(Sampling())
            monkeypatch.setattr(sampler, "_random", Fixed())
            assert sampler.pick(logits) == (size if chance else 1)


# ------------------------------------------------------------------ seeds and settings


def test_a_seed_repeats_the_answer() -> None:
    logits = np.zeros(1000, np.float32)
    first = drawn(logits, Sampling(seed=7), [], 20).tolist()
    assert drawn(logits, Sampling(seed=7), [], 20).tolist() == first
    assert drawn(logits, Sampling(seed=8), [], 20).tolist() != first
    assert drawn(logits, Sampling(), [], 20).tolist() != drawn(logits, Sampling(), [], 20).tolist()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"temperature": -0.1}, "--temp must be 0 or more, not -0.1"),
        ({"temperature": math.nan}, "--temp"),
        ({"temperature": INF}, "--temp"),
        ({"top_p": 1.01}, "--top-p must be from 0 to 1, not 1.01"),
        ({"top_p": -1}, "--top-p"),
        ({"top_p": math.nan}, "--top-p"),
        ({"top_k": -1}, "--top-k must be 0 or more"),
        ({"min_p": 2}, "--min-p"),
        ({"min_p": math.nan}, "--min-p"),
        ({"repetition_penalty": 0}, "--repeat-penalty must be from 0.01 to 100"),
        ({"repetition_penalty": -1}, "--repeat-penalty"),
        ({"repetition_penalty": INF}, "--repeat-penalty"),
        ({"seed": -1}, "--seed must be 0 or more"),
    ],
)
def test_impossible_settings(options: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError) as caught:
        Sampling(**options)
    assert caught.value.message.startswith(message)
