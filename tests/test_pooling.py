"""The compressor's rings and entries, against the exact kernels."""

import numba
import numpy as np
import pytest
import row_forms
from compressor_cases import Compressor, Sizes, all_compressors, part_of
from operation_runs import F32, cell, padded, run, run_all_ways, stride
from reference_packed import address

from localv4.kernels import pooling, row_operations
from localv4.kernels.row_operations import RowFormat

pytestmark = pytest.mark.skipif(
    bool(numba.config.DISABLE_JIT), reason="kernels that take addresses need the compiler"
)


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


@all_compressors
def test_entries(sizes: Sizes) -> None:
    work = Compressor(*sizes)
    entries, where = work.room(4 * work.n)
    positions = np.arange(work.start, work.start + work.tokens)

    def words(done: int, count: int) -> list[int]:
        return work.words(where, positions[done:], count)

    run_all_ways(row_operations.F32.pool, work.tokens, [entries], words)
    np.testing.assert_allclose(entries[:-1].view(F32), work.expected(), rtol=2e-5, atol=2e-6)
    assert (entries[-1] == 7).all()


@all_compressors
@pytest.mark.parametrize(
    "rows", [row_operations.BF16, row_operations.COMPACT], ids=lambda x: x.name
)
@pytest.mark.parametrize("part", ["keys", "index"])
def test_entries_are_rounded_when_they_are_written(
    rows: RowFormat, part: str, sizes: Sizes
) -> None:
    work = Compressor(*sizes)
    form, pool = part_of(rows, part)
    (exact, before), position = work.room(4 * work.n), np.array([work.start])
    run(1, row_operations.F32.pool, work.words(before, position, work.tokens))
    entries, where = work.room(form.nbytes(work.n, 2 * work.pairs))
    positions = np.arange(work.start, work.start + work.tokens)

    def words(done: int, count: int) -> list[int]:
        return work.words(where, positions[done:], count)

    run_all_ways(pool, work.tokens, [entries], words)
    expected = row_forms.encode(form.name, exact[:-1].view(F32), 2 * work.pairs)
    np.testing.assert_array_equal(entries[:-1], expected)
    assert (entries[-1] == 7).all()


def test_no_entry_before_its_last_token() -> None:
    work = Compressor(4, True, 32, 24, 3, 4, 3)
    entries = np.full((4, 32), 7, F32)
    where, position = cell(entries), np.array([4])
    run(2, row_operations.F32.pool, work.words(where, position, 3))
    assert (entries == 7).all()
    position[0] = 7
    run(2, row_operations.F32.pool, work.words(where, position, 1))
    assert (entries[1] != 7).any() and (entries[[0, 2, 3]] == 7).all()
