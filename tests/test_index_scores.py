"""The indexer in vector lanes equals float64; the choice of the best is exact."""

from dataclasses import replace

import numba
import numpy as np
import pytest
from indexer_cases import (
    CASES,
    FEW,
    RELEASED,
    Case,
    Ints,
    Run,
    assert_nan_is_chosen_somehow,
    best,
    in_formats,
)
from reference_packed import Floats, address

from localv4.kernels import code_keys, code_scores, code_tiles, row_operations, top_entries
from localv4.kernels.isa import ISA

pytestmark = pytest.mark.skipif(
    bool(numba.config.DISABLE_JIT), reason="kernels that take addresses need the compiler"
)

F32 = np.float32
TOLERANCE = 1e-6
IN_FORMATS = in_formats(CASES)
cases = pytest.mark.parametrize("case", IN_FORMATS.values(), ids=IN_FORMATS.keys())


@cases
@pytest.mark.parametrize("members", [1, 3])
def test_scores_are_those_of_the_indexer(case: Case, members: int) -> None:
    scored = 0
    for t in range(case.tokens):
        if case.visible(t) > case.top_k:
            expected = case.scores(t)
            got = Run(case, members).alone(t, select=False).scores(t)
            assert np.abs(got - expected).max() < TOLERANCE * np.abs(expected).max() + 1e-6
            scored += 1
    assert scored > 0 or case.heads == FEW.heads


@cases
def test_the_best_are_chosen(case: Case) -> None:
    run = Run(case, 1).together()
    for t in range(case.tokens):
        count = min(case.visible(t), case.top_k)
        assert run.counts[t] == count
        assert (run.chosen[t, count:] == -1).all()
        if case.visible(t) <= case.top_k:
            expected = np.arange(count, dtype=np.int32)
        else:
            expected = best(Run(case, 1).alone(t, select=False).scores(t), case.top_k)
        assert np.array_equal(run.chosen[t, :count], expected)


@cases
def test_tokens_alone_and_together_choose_the_same(case: Case) -> None:
    expected, many, alone = Run(case, 1).together(), Run(case, 3).together(), Run(case, 3)
    for t in range(case.tokens):
        alone.alone(t)
    for run in (many, alone):
        assert np.array_equal(run.chosen, expected.chosen)
        assert np.array_equal(run.counts, expected.counts)


@pytest.mark.skipif(not ISA.amx, reason="needs a machine with AMX")
@pytest.mark.parametrize("visible", [1, 48, 500])
def test_tiles_have_the_bits_of_vectors(visible: int) -> None:
    case = replace(RELEASED, rows=row_operations.COMPACT)
    run = Run(case, 1).alone(2, select=False)
    results = []
    for scorer, bias in ((code_scores.scorer, ISA.byte_bias), (code_tiles.tile_scorer, 0)):
        score_blocks = scorer(code_keys.expander(bias))
        where = (address(run.scratch), 0, 1, address(case.stored), visible)
        score_blocks(*where, case.heads, case.n, 0, -(-visible // code_keys.KEYS))
        results.append(run.scores(2)[:visible])
    assert np.array_equal(*results)
    assert np.abs(results[0] - case.scores(2)[:visible]).max() < 1e-4


def test_a_row_that_is_not_finite_has_no_finite_score() -> None:
    case = replace(RELEASED, rows=row_operations.COMPACT, tokens=1)
    before = Run(case, 1).alone(0, select=False).scores(0)
    case.stored[7, case.n // 2 :] = [120, 255, 120, 120]
    after = Run(case, 1).alone(0, select=False).scores(0)
    assert not np.isfinite(after[7])
    assert np.array_equal(np.delete(after, 7), np.delete(before, 7))


def top(scores: Floats, k: int) -> Ints:
    """The k best of scores as the kernel finds them."""
    size = top_entries.ranking_bytes(len(scores)) // 4
    buffer = np.concatenate([scores, np.full(size - len(scores) + 1, np.inf)]).astype(F32)
    chosen = np.full(k + 1, -7, np.int32)
    for group in range(top_entries.groups_of(len(scores))):
        top_entries.rank_group(address(buffer), len(scores), group)
    top_entries.write_top(address(chosen), address(buffer), len(scores), k)
    assert buffer[-1] == np.inf, "a write behind the scratch memory"
    assert chosen[k] == -7, "a write behind the chosen"
    return chosen[:k]


@pytest.mark.parametrize("count", [2, 16, 17, 127, 128, 129, 1000, 5000, 20_000])
@pytest.mark.parametrize("seed", range(3))
def test_the_top_is_exact(count: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    values = (
        rng.standard_normal(count),
        rng.integers(-2, 3, count),
        np.zeros(count),
        -rng.random(count),
    )
    for scores in (kind.astype(F32) for kind in values):
        for k in {1, count // 2, count - 1, count} - {0}:
            assert np.array_equal(top(scores, k), best(scores, k))


def test_zeros_of_both_signs_are_equal() -> None:
    scores = np.array([-0.0, 0.0, -1.0, -0.0, 0.0], F32)
    assert top(scores, 3).tolist() == [0, 1, 3]


@pytest.mark.parametrize("k", [1, 3, 7])
def test_extreme_scores_end(k: int) -> None:
    scores = np.array([np.inf, -np.inf, 1e-45, -1e-45, 3e38, -3e38, np.inf, -np.inf, 0], F32)
    assert np.array_equal(top(scores, k), best(scores, k))


def test_nan_is_chosen_somehow() -> None:
    assert_nan_is_chosen_somehow(top)
