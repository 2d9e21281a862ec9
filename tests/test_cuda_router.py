"""Twins of the router: the same experts, and the same bits of their weights."""

import numpy as np
import pytest
from cuda_twins import needs_compiler, run_twin
from operation_runs import F32, assert_same_bits, padded, run, stride
from reference_packed import address

from localv4.kernels import route
from localv4.kernels.operation import float_bits

pytestmark = needs_compiler


def routed(
    runner: object, logits: np.ndarray, k: int, bias: int, table: int, ids: int
) -> list[np.ndarray]:
    """Experts and weights."""
    tokens, n_experts = logits.shape
    experts, weights = np.full((tokens, k), -1), np.full((tokens, k), 7, F32)
    words = [address(logits), stride(logits), n_experts, bias, table, ids, k, float_bits(2.5)]
    runner([*words, address(experts), address(weights), tokens])
    return [experts, weights]


def assert_same(
    logits: np.ndarray,
    k: int,
    bias: np.ndarray | None,
    table: np.ndarray | None = None,
    ids: np.ndarray | None = None,
) -> None:
    given = [0 if array is None else address(array) for array in (bias, table, ids)]
    mine = routed(lambda words: run_twin(route.route, words), padded(logits), k, *given)
    theirs = routed(lambda words: run(1, route.route, words), padded(logits), k, *given)
    for own, other in zip(mine, theirs, strict=True):
        np.testing.assert_array_equal(own, other)  # NaN of any kind equals NaN


@pytest.mark.parametrize(
    ("n_experts", "k"), [(256, 6), (384, 8), (1024, 7), (16, 4), (5, 5), (39, 1)]
)
def test_the_best_experts_are_chosen(n_experts: int, k: int) -> None:
    rng = np.random.default_rng(n_experts)
    logits = rng.standard_normal((4, n_experts), F32) * 10
    logits[1] = np.round(logits[1] / 8)
    logits[2, rng.permutation(n_experts)[: n_experts // 3]] = np.nan
    logits[3, :3] = [np.inf, -np.inf, -0.0]
    assert_same(logits, k, rng.standard_normal(n_experts, F32))
    assert_same(logits, k, np.zeros(n_experts, F32))


def test_experts_of_a_table_row() -> None:
    rng = np.random.default_rng(2)
    table = np.stack([rng.permutation(24)[:6] for _ in range(11)])
    assert_same(rng.standard_normal((5, 24), F32) * 4, 6, None, table, np.array([3, 10, 0, 3, 7]))


def test_resolving_leaves_out_what_is_elsewhere() -> None:
    table, forms = np.arange(1000, 1012), np.array([0, 1] * 6)
    table[[2, 5]] = [0, -1]
    experts, records = np.array([2, 5, 7, 10, 11]), np.full((2, 5), 5)
    words = [address(experts), 5, address(table), address(forms), 2, address(records)]
    run_twin(route.resolve, [*words, 0, 0, 0, 0, 0, 0])
    np.testing.assert_array_equal(records, [[0, 0, 0, 1010, 0], [0, 0, 1007, 0, 1011]])


@pytest.mark.parametrize(
    ("tokens", "k", "n_experts", "form_count"), [(7, 4, 12, 1), (9, 3, 40, 3), (1400, 6, 256, 2)]
)
def test_grouping(tokens: int, k: int, n_experts: int, form_count: int) -> None:
    rng = np.random.default_rng(tokens)
    experts = np.stack([np.sort(rng.permutation(n_experts)[:k]) for _ in range(tokens)])
    forms, table = rng.integers(0, form_count, n_experts), np.arange(1000, 1000 + n_experts)
    weights, total = rng.random((tokens, k), F32), tokens * k
    heat, last, clock = np.zeros(n_experts, F32), np.zeros(n_experts, np.int64), np.array([9])
    results = []
    for runner in (
        lambda words: run(1, route.group, words),
        lambda words: run_twin(route.group, words),
    ):
        records, starts = np.full((form_count, total), 77), np.full((form_count, total + 1), -7)
        places, shares = np.full(total, -1), np.zeros(total, F32)
        halted = np.zeros(1, np.int64)
        words = [address(experts), k, address(table), address(forms), form_count]
        words += [address(records), address(heat), address(last), address(clock), address(heat)]
        words += [1, address(halted), tokens, address(starts), address(places)]
        runner([*words, address(weights), address(shares), n_experts])
        assert halted[0] == 0
        results.append((records, starts, places, shares))
    for mine, theirs in zip(results[1], results[0], strict=True):
        assert_same_bits(mine, theirs)


def test_grouping_leaves_out_what_is_elsewhere() -> None:
    experts, forms, table = np.array([[0, 2], [1, 2]]), np.zeros(3, np.int64), np.array([5, -1, 0])
    records, starts, places = np.full(4, 9), np.full(5, 9), np.full(4, 9)
    weights, shares = np.arange(4, dtype=F32), np.zeros(4, F32)
    words = [
        address(experts),
        2,
        address(table),
        address(forms),
        1,
        address(records),
        0,
        0,
        0,
        0,
        0,
        0,
    ]
    run_twin(
        route.group,
        [*words, 2, address(starts), address(places), address(weights), address(shares), 3],
    )
    assert records[:3].tolist() == [5, 0, 0]
    assert starts.tolist() == [0, 1, 2, 4, 4]
    assert places.tolist() == [0, 1, 0, 1]
    assert shares.tolist() == [0, 2, 1, 3]
