"""Twins of attention against float64: within 1e-5 of the largest output.

Queries, weights and float32 keys are taken as sums of two bfloat16.
"""

from dataclasses import replace

import numpy as np
import pytest
from cuda_twins import needs_compiler, run_twin
from test_attend import CASES, RELEASED, Case, Run

from localv4.kernels import attend, row_operations

pytestmark = needs_compiler

TOLERANCE = 1e-5
ENTRIES = [attend.attend_query, attend.attend_softmax]
for fmt in row_operations.FORMATS.values():
    ENTRIES += [fmt.attend, fmt.attend_scores, fmt.attend_values]
BY_ADDRESS = {entry.address: entry for entry in ENTRIES}

SMALL = {name: case for name, case in CASES.items() if case is not RELEASED}
IN_FORMATS = {
    f"{name}, {rows.name}": replace(case, rows=rows)
    for name, case in SMALL.items()
    for rows in row_operations.FORMATS.values()
    if case.ratio or rows is row_operations.F32
}
cases = pytest.mark.parametrize("case", IN_FORMATS.values(), ids=IN_FORMATS.keys())


class TwinRun(Run):
    """A run of a case by twins."""

    def __init__(self, case: Case) -> None:
        super().__init__(case, 1)

    def run(self, operations: list[list[int]]) -> None:
        for address, *words in operations:
            run_twin(BY_ADDRESS[address], words)
        assert np.isnan(self.out[:, -16:]).all(), "a write behind a row"


def assert_close(run: Run, tokens: int) -> None:
    expected = run.case.expected()[:tokens]
    error = np.abs(run.result[:tokens] - expected).max()
    assert error < TOLERANCE * np.abs(expected).max()


@cases
def test_many_tokens(case: Case) -> None:
    assert_close(TwinRun(case).together(), case.tokens)


@cases
def test_a_token_alone(case: Case) -> None:
    run = TwinRun(case)
    for t in range(case.tokens):
        run.alone(t)
    assert_close(run, case.tokens)


@pytest.mark.parametrize("rows", row_operations.FORMATS.values(), ids=lambda rows: rows.name)
def test_the_released_size(rows: row_operations.RowFormat) -> None:
    case = replace(RELEASED, tokens=1, rows=rows)
    assert_close(TwinRun(case).alone(0), 1)
    assert_close(TwinRun(case).together(), 1)


def test_more_parts_than_one_tile_each() -> None:
    case = Case(heads=5, n=32, tokens=1, position=2500, span=90, ratio=2)
    assert len(case.keys(0)) > 32 * 32
    assert_close(TwinRun(case).alone(0), 1)


def test_a_high_sink_takes_the_weight() -> None:
    case = Case(heads=4, n=32, tokens=2, position=40, span=8)
    case.sinks[1] = 60
    for result in (TwinRun(case).together().result[0], TwinRun(case).alone(0).result[0]):
        assert np.abs(result[1]).max() < 1e-20
        assert np.abs(result[[0, 2, 3]]).max(1).min() > 1e-2


@pytest.mark.parametrize("spoilt", [np.nan, np.inf])
def test_a_broken_key_is_not_hidden(spoilt: float) -> None:
    case = Case(heads=4, n=32, tokens=4, position=40, span=8)
    case.window[42 % case.capacity, 3] = spoilt
    together, alone = TwinRun(case).together().result, TwinRun(case).alone(3).result
    assert np.isfinite(together[:2]).all()
    assert not np.isfinite(together[2:, :, 3]).any()
    assert not np.isfinite(alone[3, :, 3]).any()
