"""Attention in vector lanes equals float64, with the same bits however a token is computed."""

from dataclasses import replace

import numba
import numpy as np
import pytest
from attention_cases import (
    CASES,
    Case,
    Run,
    assert_the_break_is_seen,
    assert_the_sink_takes_the_weight,
    case_with_a_broken_key,
    case_with_a_high_sink,
    in_formats,
)
from reference_packed import Floats

from localv4.kernels import attend, attend_tiles
from localv4.kernels.head_lanes import lanes, spread
from localv4.kernels.row_operations import FORMATS, RowFormat

pytestmark = pytest.mark.skipif(
    bool(numba.config.DISABLE_JIT), reason="kernels that take addresses need the compiler"
)

F32 = np.float32
TOLERANCE = 2e-6
TILE_TOLERANCE = 8e-3
"""Of tiles, which round queries, weights and the keys of the window to eight bits."""
IN_FORMATS = in_formats(CASES)
cases = pytest.mark.parametrize("case", IN_FORMATS.values(), ids=IN_FORMATS.keys())


def same_bits(x: Floats, y: Floats) -> bool:
    return np.array_equal(x.view(np.uint32), y.view(np.uint32))


@cases
def test_the_output_is_that_of_attention(case: Case) -> None:
    expected = case.expected()
    error = np.abs(Run(case, 1).together().result - expected).max()
    tolerance = TILE_TOLERANCE if case.rows.tiled else TOLERANCE
    assert error < tolerance * np.abs(expected).max()


@cases
def test_tiles_round_nothing_but_their_operands(case: Case) -> None:
    if not case.rows.tiled:
        pytest.skip("no tiles")
    expected = replace(case, rounded=True).expected()
    difference = Run(case, 1).together().result - expected
    # where the last bit of a float32 decides, a rounded operand may be the next one
    assert np.sqrt((difference**2).mean()) < 1e-4 * np.abs(expected).max()
    assert np.median(np.abs(difference)) < TOLERANCE * np.abs(expected).max()


@cases
@pytest.mark.parametrize("members", [1, 3])
def test_a_token_alone_has_the_same_bits(case: Case, members: int) -> None:
    expected = Run(case, 1).together().result
    run = Run(case, members)
    for t in range(case.tokens):
        run.alone(t)
    assert same_bits(run.result, expected)


@cases
def test_bits_depend_on_no_members_and_no_batch(case: Case) -> None:
    expected = Run(case, 1).together().result
    assert same_bits(Run(case, 3).together().result, expected)
    parts = Run(case, 2).together(0, 1).together(1, case.tokens - 1)
    assert same_bits(parts.result, expected)


@pytest.mark.parametrize("rows", FORMATS.values(), ids=FORMATS)
def test_a_long_context_takes_many_blocks_of_keys(rows: RowFormat) -> None:
    most = max(attend.KEY_BLOCK, attend_tiles.AT_ONCE)
    case = Case(heads=5, n=32, tokens=1, position=2 * most + 40, span=9, ratio=1, rows=rows)
    expected = case.expected()
    error = np.abs(Run(case, 2).alone(0).result - expected).max()
    assert error < (TILE_TOLERANCE if rows.tiled else TOLERANCE) * np.abs(expected).max()


def test_a_high_sink_takes_the_weight() -> None:
    case = case_with_a_high_sink()
    for result in (Run(case, 1).together().result, Run(case, 1).alone(0).result):
        assert_the_sink_takes_the_weight(result[0])


@pytest.mark.parametrize("rows", FORMATS.values(), ids=FORMATS)
@pytest.mark.parametrize("spoilt", [np.nan, np.inf])
def test_a_broken_key_is_not_hidden(spoilt: float, rows: RowFormat) -> None:
    assert_the_break_is_seen(Run(case_with_a_broken_key(spoilt, rows), 1).together().result)


@pytest.mark.parametrize("heads", [1, 16, 64, 65, 128])
def test_lanes_are_whole_tiles(heads: int) -> None:
    assert heads <= lanes(heads) == lanes(lanes(heads)) < heads + 64
    values = np.arange(1, heads + 1, dtype=F32)
    assert np.array_equal(spread(values)[:heads], values)
    assert spread(values).shape == (lanes(heads),)
    assert not spread(values)[heads:].any()


@pytest.mark.parametrize("rows", FORMATS.values(), ids=FORMATS)
def test_every_number_of_keys_in_a_tile(rows: RowFormat) -> None:
    for keys in range(1, 2 * attend.MOST_KEYS + 1):
        case = Case(heads=2, n=32, tokens=1, position=keys - 1, span=70, rows=rows)
        expected = case.expected()
        error = np.abs(Run(case, 1).alone(0).result - expected).max()
        tolerance = TILE_TOLERANCE if rows.tiled else TOLERANCE
        assert error < tolerance * np.abs(expected).max()
