"""The indexer in vector lanes equals float64; the choice of the best is exact."""

from dataclasses import dataclass, replace

import numba
import numpy as np
import pytest
import row_forms
from numpy.typing import NDArray
from reference_packed import address, floats

from localv4.kernels import (
    code_keys,
    code_scores,
    code_tiles,
    index_scores,
    row_operations,
    top_entries,
)
from localv4.kernels.head_lanes import lanes
from localv4.kernels.isa import ISA
from localv4.kernels.operation import WORDS, float_bits
from localv4.kernels.row_operations import RowFormat
from localv4.kernels.team import Team

pytestmark = pytest.mark.skipif(
    bool(numba.config.DISABLE_JIT), reason="kernels that take addresses need the compiler"
)

F32 = np.float32
Floats = NDArray[np.float32]
Ints = NDArray[np.int32]
Wide = NDArray[np.float64]

GAP = 16
FACTOR = F32(0.125)
TOLERANCE = 1e-6


@dataclass
class Case:
    """Tokens at `position` and after that choose `top_k` entries of `ratio` tokens."""

    heads: int
    n: int
    tokens: int
    position: int
    ratio: int
    top_k: int
    pairs: int = 8
    rows: RowFormat = row_operations.F32

    def __post_init__(self) -> None:
        rng = np.random.default_rng(self.heads + self.n)
        width = self.heads * self.n
        self.x, self.weights = (
            floats(self.tokens, width + GAP),
            floats(self.tokens, self.heads + GAP),
        )
        self.x[:, :width] = rng.standard_normal((self.tokens, width))
        self.weights[:, : self.heads] = rng.standard_normal((self.tokens, self.heads))
        entries = rng.standard_normal((self.visible(self.tokens - 1) + 1, self.n)).astype(F32)
        form, rope = self.rows.index, 2 * self.pairs
        self.stored = row_forms.encode(form.name, entries, rope)
        self.stored[-1] = 0xFF  # NaN, not visible yet
        self.entries = row_forms.decode(form.name, self.stored, self.n, rope)
        angles = rng.uniform(0, 7, (self.tokens, self.pairs))
        self.cos, self.sin = np.cos(angles).astype(F32), np.sin(angles).astype(F32)

    def visible(self, t: int) -> int:
        """How many entries token t sees."""
        return (self.position + t + 1) // self.ratio

    def scores(self, t: int) -> Wide:
        """The score of each visible entry."""
        queries = self.x[t, : self.heads * self.n].astype(np.float64).reshape(self.heads, self.n)
        first, cos, sin = self.n - 2 * self.pairs, self.cos[t], self.sin[t]
        even, odd = queries[:, first::2].copy(), queries[:, first + 1 :: 2].copy()
        queries[:, first::2], queries[:, first + 1 :: 2] = (
            even * cos - odd * sin,
            even * sin + odd * cos,
        )
        if self.rows is row_operations.COMPACT:
            queries = rounded(row_forms.mixed(queries.astype(F32)))
        dots = np.maximum(queries @ self.entries[: self.visible(t)].T.astype(np.float64), 0)
        weights: Wide = self.weights[t, : self.heads].astype(np.float64) * FACTOR
        return weights @ dots


def rounded(queries: Floats) -> Wide:
    """The queries (heads, n) in int8 with a scale for each head."""
    size = np.abs(queries).max(1, keepdims=True)
    return np.rint(queries * (F32(127) / size)) * (size / 127).astype(np.float64)


class Run:
    """The memory of one run of a case."""

    def __init__(self, case: Case, members: int) -> None:
        self.case, self.members = case, members
        size = index_scores.scratch_bytes(case.heads, case.n, case.visible(case.tokens - 1))
        self.size = size
        self.scratch = floats(members * index_scores.TOKENS + 1, size // 4)
        self.chosen = np.full((case.tokens + 1, case.top_k), -1, np.int32)
        self.counts = np.full(case.tokens + 1, -1, np.int64)
        self.cell = np.array([address(case.stored)], np.int64)

    def words(self, context: NDArray[np.int64]) -> list[int]:
        case = self.case
        return [address(context), case.ratio, case.top_k, case.heads, case.n]

    def together(self) -> "Run":
        """Run the operation for many tokens."""
        case, context = self.case, np.array([self.case.position], np.int64)
        x = [address(case.x), case.x.shape[1], case.tokens]
        weights = [address(case.weights), case.weights.shape[1], float_bits(float(FACTOR))]
        results = [address(self.chosen), address(self.counts)]
        scratch = [address(self.scratch), self.size]
        angles = [address(case.cos), address(case.sin), case.pairs]
        words = [
            *self.words(context),
            address(self.cell),
            *x,
            *angles,
            *weights,
            *results,
            *scratch,
        ]
        self.run([[case.rows.index_choose.address, *words]])
        assert (self.chosen[-1] == -1).all()
        assert self.counts[-1] == -1
        return self

    def alone(self, t: int, select: bool = True) -> "Run":
        """Run the operations for one token."""
        case, context = self.case, np.array([self.case.position + t], np.int64)
        angles = [address(case.cos[t]), address(case.sin[t]), case.pairs]
        weights = [address(case.weights[t]), float_bits(float(FACTOR))]
        scratch, results = (
            address(self.scratch),
            [address(self.chosen[t]), address(self.counts[t:])],
        )
        size, shared = [case.heads, case.n], self.words(context)
        operations = [
            [
                case.rows.index_query.address,
                address(case.x[t]),
                *size,
                *angles,
                *weights,
                scratch,
            ],
            [case.rows.index_scores.address, *shared, address(self.cell), scratch, case.pairs],
            [index_scores.index_rank.address, *shared, scratch],
            [index_scores.index_select.address, *shared, scratch, *results],
        ]
        self.run(operations if select else operations[:2])
        return self

    def run(self, operations: list[list[int]]) -> None:
        program = np.zeros((len(operations), WORDS), np.int64)
        for row, words in zip(program, operations, strict=True):
            row[: len(words)] = words
        team = Team(self.members)
        team.run(program)
        team.close()
        assert np.isnan(self.scratch[-1]).all(), "a write behind the scratch memory"

    def scores(self, t: int) -> Floats:
        """The scores of the token that ran alone, before the choice."""
        start = (self.case.n + 1) * lanes(self.case.heads)
        return self.scratch[0, start : start + self.case.visible(t)].copy()


SMALL = Case(heads=4, n=32, tokens=9, position=3, ratio=2, top_k=3)
FEW = Case(heads=8, n=64, tokens=6, position=0, ratio=4, top_k=16, pairs=0)
MANY = Case(heads=20, n=128, tokens=5, position=1200, ratio=4, top_k=64, pairs=32)
RELEASED = Case(heads=64, n=128, tokens=3, position=2100, ratio=4, top_k=512, pairs=32)
WIDE = Case(heads=80, n=32, tokens=2, position=399, ratio=4, top_k=8, pairs=3)
CASES = {"small": SMALL, "few": FEW, "many": MANY, "released size": RELEASED, "many heads": WIDE}
IN_FORMATS = {
    f"{name}, {rows.name}": replace(case, rows=rows)
    for name, case in CASES.items()
    for rows in row_operations.FORMATS.values()
}
cases = pytest.mark.parametrize("case", IN_FORMATS.values(), ids=IN_FORMATS.keys())


def best(scores: Floats, k: int) -> Ints:
    """Indices of the k best, ascending; the lowest indices of those that are equal."""
    order = np.argsort(-scores, kind="stable")[:k]
    return np.sort(order).astype(np.int32)


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
    odd = np.array([0x7FFFFFFF, 0xFFFFFFFF, 0x7FC00000, 0xFFC00000], np.uint32).view(F32)
    scores = np.concatenate([odd, np.arange(5, dtype=F32)])
    for k in range(1, 10):
        chosen = top(scores, k)
        assert (np.diff(chosen) > 0).all()
        assert chosen[0] >= 0
        assert chosen[-1] < 9
