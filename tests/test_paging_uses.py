"""Counts of uses decay as they should, whichever way they are recorded."""

import math

import numpy as np
import pytest

from localv4.paging.uses import GUARD_TOKENS, STEPS, Uses


def test_a_score_is_the_sum_of_decayed_uses() -> None:
    uses = Uses(2, 4, half_life=8)
    for clock in (1, 5, 20):
        uses.clock[0] = clock
        uses.record(1, np.array([2]))
    uses.clock[0] = 30
    expected = 2 ** (-29 / 8) + 2 ** (-25 / 8) + 2 ** (-10 / 8)
    assert uses.scores()[1, 2] == pytest.approx(expected, rel=1e-5)
    assert uses.scores()[1, 2] == uses.scores_of(1)[2]
    assert uses.scores().sum() == uses.scores()[1, 2]


def test_counts_are_added_as_so_many_uses() -> None:
    uses = Uses(1, 3)
    uses.record(0, np.array([0, 2]), np.array([2.0, 5.0], np.float32))
    assert uses.scores().tolist() == [[2.0, 0.0, 5.0]]


def test_an_old_use_counts_nothing_unless_uses_are_only_counted() -> None:
    for half_life, expected in ((64.0, 0.0), (math.inf, 1.0)):
        uses = Uses(1, 1, half_life)
        uses.record(0, np.array([0]))
        uses.clock += 10 * STEPS
        assert uses.scores()[0, 0] == expected


@pytest.mark.parametrize("tokens", [1, 7, STEPS + 50])
def test_several_tokens_count_like_one_after_another(tokens: int) -> None:
    rng = np.random.default_rng(0)
    chosen = np.stack([rng.permutation(16)[:3] for _ in range(tokens)])
    one, all_at_once = Uses(2, 16, 32), Uses(2, 16, 32)
    for uses in (one, all_at_once):
        uses.clock[0] = 1
        uses.record(0, np.array([0, 15]))
    for token in chosen:
        one.clock += 1
        one.record(0, token)
    all_at_once.clock += tokens
    all_at_once.record_tokens(0, chosen)
    np.testing.assert_allclose(all_at_once.scores(), one.scores(), rtol=1e-4)
    np.testing.assert_array_equal(all_at_once.last, one.last)


def test_a_new_half_life_leaves_scores_and_arrays_where_they_are() -> None:
    uses = Uses(1, 3, 16)
    uses.record(0, np.array([0]))
    uses.clock += 40
    uses.record(0, np.array([1]))
    before, places = uses.scores(), [uses.heat.ctypes.data, uses.decay.ctypes.data]
    uses.half_life = 100
    np.testing.assert_allclose(uses.scores(), before, rtol=1e-5)
    assert places == [uses.heat.ctypes.data, uses.decay.ctypes.data]
    uses.clock += 100
    np.testing.assert_allclose(uses.scores(), before / 2, rtol=1e-5)


def test_a_restart_gives_scores_and_makes_all_but_recent_experts_old_enough() -> None:
    uses = Uses(1, 3)
    uses.clock[0] = 50
    uses.record(0, np.array([1]))
    uses.restart(np.array([[3.0, 2.0, 0.0]], np.float32))
    np.testing.assert_allclose(uses.scores(), [[3.0, 2.0, 0.0]], rtol=1e-6)
    assert uses.ages()[0].tolist() == [GUARD_TOKENS, 0, STEPS - 1]
