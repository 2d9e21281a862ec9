"""Cases of attention, their float64 twin, and runs of the operations on them."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

import numpy as np
import row_forms
from numpy.typing import NDArray
from reference_packed import Floats, Wide, address, floats

from localv4.kernels import attend, attend_keys, row_operations
from localv4.kernels.head_lanes import spread
from localv4.kernels.operation import WORDS, float_bits
from localv4.kernels.row_operations import RowFormat
from localv4.kernels.team import Team

F32 = np.float32

GAP = 16
EPS = 1e-6


@dataclass
class Case:
    """Tokens at `position` and after, of a layer with a window of `span` in a ring."""

    heads: int
    n: int
    tokens: int
    position: int
    span: int
    ratio: int = 0
    top_k: int = 0
    pairs: int = 8
    capacity: int = 0
    rows: RowFormat = row_operations.F32
    rounded: bool = False
    x: Floats = field(init=False)

    def __post_init__(self) -> None:
        rng = np.random.default_rng(self.heads + self.n)
        self.capacity = self.span + self.tokens + 3
        width = self.heads * self.n
        self.x = floats(self.tokens, width + GAP)
        self.x[:, :width] = 4 * rng.standard_normal((self.tokens, width))
        self.window = rng.standard_normal((self.capacity, self.n)).astype(F32)
        visible = np.arange(self.position + 1, self.position + self.tokens + 1)
        self.counts = visible // self.ratio if self.ratio else 0 * visible
        entries = rng.standard_normal((int(self.counts.max()) + 1, self.n)).astype(F32)
        form, rope = self.rows.keys.name, 2 * self.pairs
        self.stored = row_forms.encode(form, entries, rope)
        self.entries = row_forms.decode(form, self.stored, self.n, rope)
        angles = rng.uniform(0, 7, (self.tokens, self.pairs))
        self.cos, self.sin = np.cos(angles).astype(F32), np.sin(angles).astype(F32)
        self.sinks = rng.standard_normal(self.heads).astype(F32)
        self.chosen = np.full((self.tokens, self.top_k), -1, np.int32)
        if self.top_k:
            self.counts = np.minimum(self.counts, self.top_k)
            for t, count in enumerate(self.counts):
                most = (self.position + t + 1) // self.ratio
                self.chosen[t, :count] = np.sort(rng.permutation(most)[:count])

    def keys(self, t: int) -> Wide:
        """The key rows that token t sees, in order, as the products take them."""
        last = self.position + t
        positions = np.arange(max(0, last - self.span + 1), last + 1)
        picked = self.chosen[t, : self.counts[t]] if self.top_k else np.arange(self.counts[t])
        rows = [self.window[positions % self.capacity], self.entries[picked]]
        return self.taken(np.concatenate(rows))

    def taken(self, operand: Floats | Wide) -> Wide:
        """What tiles make of an operand of products, and vector registers leave as it is."""
        if self.rounded:
            operand = row_forms.rounded(operand.astype(F32))
        return operand.astype(np.float64)

    def expected(self) -> Wide:
        """The output of every token, (tokens, heads, n); `rounded`: with operands of tiles."""
        queries = self.x[:, : self.heads * self.n].astype(np.float64)
        queries = queries.reshape(self.tokens, self.heads, self.n)
        queries /= np.sqrt((queries**2).mean(2, keepdims=True) + EPS)
        out = np.empty_like(queries)
        for t in range(self.tokens):
            keys = self.keys(t)
            scores = self.taken(self.turn(t, queries[t], 1) / np.sqrt(self.n)) @ keys.T
            highest = np.maximum(scores.max(1), self.sinks)[:, None]
            weights = np.exp(scores - highest)
            total = weights.sum(1, keepdims=True) + np.exp(self.sinks[:, None] - highest)
            out[t] = self.turn(t, self.taken(weights / total) @ keys, -1)
        return out

    def turn(self, t: int, x: Wide, sign: int) -> Wide:
        """x with its trailing channels rotated by the angles of token t."""
        first, result = self.n - 2 * self.pairs, x.copy()
        even, odd = x[:, first::2], x[:, first + 1 :: 2]
        cos, sin = self.cos[t].astype(np.float64), sign * self.sin[t].astype(np.float64)
        result[:, first::2], result[:, first + 1 :: 2] = (
            even * cos - odd * sin,
            even * sin + odd * cos,
        )
        return result


class Run:
    """The memory of one run of a case, and the words that name it."""

    def __init__(self, case: Case, members: int) -> None:
        self.case, self.members = case, members
        self.out = case.x.copy()
        self.sinks = spread(case.sinks)
        self.cells = np.array([address(case.window), address(case.stored)], np.int64)
        self.chosen, self.counts = np.ascontiguousarray(case.chosen), case.counts.astype(np.int64)
        size = attend.scratch_bytes(case.heads, case.n, case.span + int(case.counts.max()))
        self.scratch = floats(members + 1, size // 4)

    def words(self, first: int, context: NDArray[np.int64]) -> list[int]:
        """The words that say which keys are seen from token `first` on."""
        case = self.case
        lists = [0, 0, 0]
        if case.top_k:
            start = address(self.chosen) + 4 * case.top_k * first
            lists = [address(self.counts) + 8 * first, start, case.top_k]
        window, entries = address(self.cells), address(self.cells) + 8
        return [address(context), case.span, case.ratio, *lists, window, case.capacity, entries]

    def rows(self, first: int) -> tuple[int, list[int]]:
        """The row of activations of a token, and its angles."""
        case = self.case
        angles = [address(case.cos[first]), address(case.sin[first]), case.pairs]
        return address(self.out[first]), angles

    def together(self, first: int = 0, tokens: int | None = None) -> "Run":
        """Run the operation for many tokens."""
        case, context = self.case, np.array([self.case.position + first], np.int64)
        x, angles = self.rows(first)
        tokens = case.tokens if tokens is None else tokens
        shape = [x, case.x.shape[1], tokens, case.heads, case.n]
        scratch = [
            float_bits(EPS),
            address(self.sinks),
            address(self.scratch),
            self.scratch[0].nbytes,
        ]
        words = self.words(first, context)
        self.run([[case.rows.attend.address, *words, *shape, *angles, *scratch]])
        return self

    def alone(self, t: int) -> "Run":
        """Run the operations for one token."""
        case, context = self.case, np.array([self.case.position + t], np.int64)
        x, angles = self.rows(t)
        sinks, tiled = address(self.sinks), int(case.rows.tiled)
        size, scratch, words = [case.heads, case.n], address(self.scratch), self.words(t, context)
        self.run(
            [
                [
                    attend_keys.attend_query.address,
                    x,
                    *size,
                    *angles,
                    float_bits(EPS),
                    scratch,
                    tiled,
                ],
                [case.rows.attend_scores.address, *words, *size, scratch, case.pairs],
                [attend_keys.attend_softmax.address, *words[:4], *size, sinks, scratch, tiled],
                [case.rows.attend_values.address, *words[:4], *size, *angles, scratch, x],
            ]
        )
        return self

    def run(self, operations: list[list[int]]) -> None:
        program = np.zeros((len(operations), WORDS), np.int64)
        for row, words in zip(program, operations, strict=True):
            row[: len(words)] = words
        team = Team(self.members)
        team.run(program)
        team.close()
        assert np.isnan(self.scratch[self.members]).all(), "a write behind the scratch memory"
        assert np.isnan(self.out[:, -GAP:]).all(), "a write behind a row"

    @property
    def result(self) -> Floats:
        """The output, (tokens, heads, n)."""
        case = self.case
        return self.out[:, :-GAP].reshape(case.tokens, case.heads, case.n)


SLIDING = Case(heads=8, n=96, tokens=5, position=2, span=16)
DENSE = Case(heads=4, n=64, tokens=4, position=301, span=16, ratio=4, pairs=7)
CHOSEN = Case(heads=80, n=64, tokens=3, position=400, span=16, ratio=4, top_k=70)
FEW_CHOSEN = Case(heads=3, n=32, tokens=7, position=0, span=4, ratio=2, top_k=2, pairs=16)
RELEASED = Case(heads=64, n=512, tokens=2, position=2100, span=128, ratio=4, top_k=512, pairs=32)
WHOLE_TURN = Case(heads=16, n=32, tokens=2, position=0, span=8, ratio=128, pairs=0)
CASES = {
    "window only": SLIDING,
    "all entries": DENSE,
    "chosen entries": CHOSEN,
    "few entries": FEW_CHOSEN,
    "released size": RELEASED,
    "no rotation": WHOLE_TURN,
}


def in_formats(cases: Mapping[str, Case]) -> dict[str, Case]:
    """Return the cases in each format of compressed rows, where there are such rows."""
    return {
        f"{name}, {rows.name}": replace(case, rows=rows)
        for name, case in cases.items()
        for rows in row_operations.FORMATS.values()
        if case.ratio or rows is row_operations.F32
    }


def case_with_a_high_sink() -> Case:
    """The sink of head 1 outweighs all keys."""
    case = Case(heads=4, n=32, tokens=2, position=40, span=8)
    case.sinks[1] = 60
    return case


def assert_the_sink_takes_the_weight(result: Floats) -> None:
    """Judge the output (heads, n) of a token of `case_with_a_high_sink`."""
    assert np.abs(result[1]).max() < 1e-20
    assert np.abs(result[[0, 2, 3]]).max(1).min() > 1e-2


def case_with_a_broken_key(spoilt: float, rows: RowFormat = row_operations.F32) -> Case:
    """The key of the third token has a channel that is not finite."""
    case = Case(heads=4, n=32, tokens=4, position=40, span=8, rows=rows)
    case.window[42 % case.capacity, 3] = spoilt
    return case


def assert_the_break_is_seen(result: Floats) -> None:
    """Judge the output (tokens, heads, n) of `case_with_a_broken_key`."""
    assert np.isfinite(result[:2]).all()
    assert not np.isfinite(result[2:, :, 3]).any()
