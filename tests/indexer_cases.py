"""Cases of the indexer, their float64 twin, runs of the operations on them, and exact choices."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import numpy as np
import row_forms
from numpy.typing import NDArray
from reference_packed import Floats, Wide, address, floats

from localv4.kernels import index_scores, row_operations
from localv4.kernels.head_lanes import lanes
from localv4.kernels.operation import WORDS, float_bits
from localv4.kernels.row_operations import RowFormat
from localv4.kernels.team import Team

F32 = np.float32
Ints = NDArray[np.int32]

GAP = 16
FACTOR = F32(0.125)


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


def in_formats(cases: Mapping[str, Case]) -> dict[str, Case]:
    """Return the cases in each format of compressed rows."""
    return {
        f"{name}, {rows.name}": replace(case, rows=rows)
        for name, case in cases.items()
        for rows in row_operations.FORMATS.values()
    }


def best(scores: Floats, k: int) -> Ints:
    """Indices of the k best, ascending; the lowest indices of those that are equal."""
    order = np.argsort(-scores, kind="stable")[:k]
    return np.sort(order).astype(np.int32)


def assert_nan_is_chosen_somehow(top: Callable[[Floats, int], Ints]) -> None:
    """Judge a choice of the k best where scores of all signs and payloads are no numbers."""
    odd = np.array([0x7FFFFFFF, 0xFFFFFFFF, 0x7FC00000, 0xFFC00000], np.uint32).view(F32)
    scores = np.concatenate([odd, np.arange(5, dtype=F32)])
    for k in range(1, 10):
        chosen = top(scores, k)
        assert (np.diff(chosen) > 0).all()
        assert chosen[0] >= 0
        assert chosen[-1] < 9
