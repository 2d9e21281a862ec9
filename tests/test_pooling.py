"""The compressor's rings and entries, against the exact kernels."""

import numba
import numpy as np
import pytest
import row_forms
from operation_runs import F32, Floats, cell, padded, run, run_all_ways, stride
from reference_packed import address

from localv4.kernels import compression, elementwise, pooling, row_operations
from localv4.kernels.operation import float_bits
from localv4.kernels.row_operations import RowFormat

pytestmark = pytest.mark.skipif(
    bool(numba.config.DISABLE_JIT), reason="kernels that take addresses need the compiler"
)

EPS = 1e-6


@pytest.mark.parametrize(("ratio", "start"), [(4, 0), (4, 9), (3, 1_000_001)])
def test_projections_go_into_the_rings(ratio: int, start: int) -> None:
    rng = np.random.default_rng(start)
    tokens, width, capacity = 6, 48, 11
    keys, gates = (padded(rng.standard_normal((tokens, width), F32)) for _ in range(2))
    ape = rng.standard_normal((ratio, width), F32)
    rings = [np.full((capacity, width), 7, F32) for _ in range(2)]
    positions, cells = np.arange(start, start + tokens), [cell(ring) for ring in rings]

    def words(first: int, count: int) -> list[int]:
        return [
            *(address(keys[first:]), address(gates[first:]), stride(keys), address(ape), ratio),
            *(address(cells[0]), address(cells[1]), capacity, width),
            *(address(positions[first:]), count),
        ]

    run_all_ways(pooling.append, tokens, rings, words)
    expected = np.full((2, capacity, width), 7, F32)
    expected[0, positions % capacity] = keys
    expected[1, positions % capacity] = gates + ape[positions % ratio]
    np.testing.assert_array_equal(rings, expected)


class Compressor:
    """Full rings, a norm and a rotation."""

    def __init__(self, ratio: int, overlap: bool, n: int, capacity: int, pairs: int) -> None:
        rng = np.random.default_rng(ratio)
        self.ratio, self.n, self.pairs = ratio, n, pairs
        width = 2 * n if overlap else n
        self.keys = rng.standard_normal((capacity, width), F32)
        self.gates = rng.standard_normal((capacity, width), F32) * 4
        self.weight = rng.standard_normal(n, F32)
        self.frequencies = rng.random(pairs, F32)
        self.cells = [cell(self.keys), cell(self.gates)]

    def words(self, entries: np.ndarray, position: np.ndarray, tokens: int) -> list[int]:
        """Operands of `pool`; entries: their cell."""
        return [
            *(address(self.cells[0]), address(self.cells[1]), *self.keys.shape, self.ratio),
            *(address(self.weight), float_bits(EPS), address(self.frequencies), self.pairs),
            *(address(entries), self.n, address(position), tokens),
        ]

    def expected(self, first: int, end: int) -> Floats:
        """Entries first ... end - 1."""
        out = np.empty((end - first, self.n), F32)
        compression.pool(out, self.keys, self.gates, first, self.ratio)
        elementwise.rms_norm(out, out, self.weight, F32(EPS))
        starts = (np.arange(first, end) * self.ratio).astype(F32)[:, None]
        wide = (starts * self.frequencies).astype(np.float64)
        cos, sin = np.cos(wide).astype(F32), np.sin(wide).astype(F32)
        elementwise.rotate(out[:, None, :], cos, sin, F32(1))
        return out


CASES = [
    (4, True, 128, 40, 32, 0, 19),
    (4, True, 512, 24, 32, 6, 11),
    (4, True, 32, 24, 3, 1_000_002, 10),
    (128, False, 96, 300, 8, 100, 170),
    (128, False, 512, 140, 32, 255, 1),
    (5, False, 32, 12, 16, 3, 7),
]


@pytest.mark.parametrize(("ratio", "overlap", "n", "capacity", "pairs", "start", "tokens"), CASES)
def test_entries(
    ratio: int, overlap: bool, n: int, capacity: int, pairs: int, start: int, tokens: int
) -> None:
    work = Compressor(ratio, overlap, n, capacity, pairs)
    first, end = start // ratio, (start + tokens) // ratio
    # the cell points to where entry 0 would be: only the new ones are in memory
    entries = np.full((end - first + 1, n), 7, F32)
    where = cell(entries) - 4 * n * first
    positions = np.arange(start, start + tokens)

    def words(done: int, count: int) -> list[int]:
        return work.words(where, positions[done:], count)

    run_all_ways(row_operations.F32.pool, tokens, [entries], words)
    np.testing.assert_allclose(entries[:-1], work.expected(first, end), rtol=2e-5, atol=2e-6)
    assert (entries[-1] == 7).all()


@pytest.mark.parametrize(("ratio", "overlap", "n", "capacity", "pairs", "start", "tokens"), CASES)
@pytest.mark.parametrize(
    "rows", [row_operations.BF16, row_operations.COMPACT], ids=lambda x: x.name
)
@pytest.mark.parametrize("part", ["keys", "index"])
def test_entries_are_rounded_when_they_are_written(
    rows: RowFormat,
    part: str,
    ratio: int,
    overlap: bool,
    n: int,
    capacity: int,
    pairs: int,
    start: int,
    tokens: int,
) -> None:
    work = Compressor(ratio, overlap, n, capacity, pairs)
    form, pool = (rows.keys, rows.pool) if part == "keys" else (rows.index, rows.index_pool)
    first, end = start // ratio, (start + tokens) // ratio
    exact, position = np.zeros((end - first, n), F32), np.array([start])
    before = cell(exact) - 4 * n * first
    run(1, row_operations.F32.pool, work.words(before, position, tokens))
    size = form.nbytes(n, 2 * pairs)
    entries = np.full((end - first + 1, size), 7, np.uint8)
    where = cell(entries) - size * first
    positions = np.arange(start, start + tokens)

    def words(done: int, count: int) -> list[int]:
        return work.words(where, positions[done:], count)

    run_all_ways(pool, tokens, [entries], words)
    np.testing.assert_array_equal(entries[:-1], row_forms.encode(form.name, exact, 2 * pairs))
    assert (entries[-1] == 7).all()


def test_no_entry_before_its_last_token() -> None:
    work = Compressor(4, True, 32, 24, 3)
    entries = np.full((4, 32), 7, F32)
    where, position = cell(entries), np.array([4])
    run(2, row_operations.F32.pool, work.words(where, position, 3))
    assert (entries == 7).all()
    position[0] = 7
    run(2, row_operations.F32.pool, work.words(where, position, 1))
    assert (entries[1] != 7).any() and (entries[[0, 2, 3]] == 7).all()
