"""Twins of the indexer, against the CPU's.

Entries in FP4 give the same bits of scores, so the same choice. Others are multiplied as sums of
two bfloat16: an entry may be chosen in place of another if their scores differ by less than 1e-5 of
the largest.
"""

from dataclasses import replace

import numpy as np
import pytest
from cuda_twins import needs_compiler, run_twin
from indexer_cases import (
    CASES,
    RELEASED,
    Case,
    Run,
    assert_nan_is_chosen_somehow,
    best,
    in_formats,
)
from reference_packed import address

from localv4.kernels import index_scores, row_operations

pytestmark = needs_compiler

TOLERANCE = 1e-5
F32 = np.float32
ENTRIES = [index_scores.index_rank, index_scores.index_select]
for fmt in row_operations.FORMATS.values():
    ENTRIES += [fmt.index_query, fmt.index_scores, fmt.index_choose]
BY_ADDRESS = {entry.address: entry for entry in ENTRIES}

SIZES = {**CASES, "released size": replace(RELEASED, tokens=1)}
SIZES["wide rows"] = Case(heads=3, n=288, tokens=2, position=90, ratio=2, top_k=5, pairs=9)
IN_FORMATS = in_formats(SIZES)
cases = pytest.mark.parametrize("case", IN_FORMATS.values(), ids=IN_FORMATS.keys())


class TwinRun(Run):
    """A run of a case by twins."""

    def __init__(self, case: Case) -> None:
        super().__init__(case, 1)

    def run(self, operations: list[list[int]]) -> None:
        for where, *words in operations:
            run_twin(BY_ADDRESS[where], words)
        assert np.isnan(self.scratch[-1]).all(), "a write behind the scratch memory"


def assert_chosen(case: Case, t: int, run: Run) -> None:
    """Compare what a run has chosen for token t with what is best."""
    count, scores = min(case.visible(t), case.top_k), case.scores(t)
    own = run.chosen[t, :count]
    assert run.counts[t] == count
    assert (run.chosen[t, count:] == -1).all()
    assert (np.diff(own) > 0).all() and set(own) <= set(range(case.visible(t)))
    left_out = np.delete(scores, own)
    if len(left_out):
        assert scores[own].min() > left_out.max() - TOLERANCE * np.abs(scores).max()


@cases
def test_many_tokens(case: Case) -> None:
    run = TwinRun(case).together()
    exact = Run(case, 1).together() if case.rows is row_operations.COMPACT else None
    for t in range(case.tokens):
        assert_chosen(case, t, run)
        assert exact is None or np.array_equal(run.chosen[t], exact.chosen[t])


@cases
def test_a_token_alone(case: Case) -> None:
    run, t = TwinRun(case).alone(case.tokens - 1), case.tokens - 1
    assert_chosen(case, t, run)
    if case.rows is row_operations.COMPACT:
        assert np.array_equal(run.chosen[t], Run(case, 1).alone(t).chosen[t])


def top(scores: np.ndarray, k: int) -> np.ndarray:
    """The k best of scores, by the twin of `index_select`: one head of 32 channels, 16 lanes."""
    count = len(scores)
    scratch = np.full(33 * 16 + count + 64, np.inf, F32)
    scratch[33 * 16 : 33 * 16 + count] = scores
    chosen, counts = np.full(k + 1, -7, np.int32), np.zeros(1, np.int64)
    context = np.array([count - 1])
    words = [address(context), 1, k, 1, 32, address(scratch), address(chosen), address(counts)]
    run_twin(index_scores.index_select, words)
    assert chosen[k] == -7, "a write behind the chosen"
    assert counts[0] == min(k, count)
    return chosen[: counts[0]]


@pytest.mark.parametrize("count", [2, 16, 63, 1000, 5000])
def test_the_top_is_exact(count: int) -> None:
    rng = np.random.default_rng(count)
    values = [rng.standard_normal(count), rng.integers(-2, 3, count), np.zeros(count)]
    values.append(-(rng.random(count) ** 9))
    for scores in (kind.astype(F32) for kind in values):
        for k in {1, count // 2, count - 1, count}:
            assert np.array_equal(top(scores, k), best(scores, k))


def test_more_scores_than_registers_and_more_equals_than_memory() -> None:
    rng = np.random.default_rng(1)
    scores = rng.standard_normal(20_000).astype(F32)
    assert np.array_equal(top(scores, 512), best(scores, 512))
    scores[::2] = 0.25
    assert np.array_equal(top(scores, 9000), best(scores, 9000))


@pytest.mark.parametrize("k", [1, 3, 7])
def test_extreme_scores(k: int) -> None:
    scores = np.array([np.inf, -np.inf, 1e-45, -1e-45, 3e38, -3e38, np.inf, -np.inf, 0, -0.0], F32)
    assert np.array_equal(top(scores, k), best(scores, k))


def test_nan_is_chosen_somehow() -> None:
    assert_nan_is_chosen_somehow(top)
