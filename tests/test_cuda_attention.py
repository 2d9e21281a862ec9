"""Twins of attention against float64: within 1e-5 of the largest output.

Queries, weights and float32 keys are taken as sums of two bfloat16.
"""

from dataclasses import replace

import numpy as np
import pytest
from attention_cases import (
    CASES,
    RELEASED,
    Case,
    Run,
    assert_the_break_is_seen,
    assert_the_sink_takes_the_weight,
    case_with_a_broken_key,
    case_with_a_high_sink,
    in_formats,
)
from cuda_twins import needs_compiler, run_twin

from localv4.kernels import attend_keys, row_operations

pytestmark = needs_compiler

TOLERANCE = 1e-5
ENTRIES = [attend_keys.attend_query, attend_keys.attend_softmax]
for fmt in row_operations.FORMATS.values():
    ENTRIES += [fmt.attend, fmt.attend_scores, fmt.attend_values]
BY_ADDRESS = {entry.address: entry for entry in ENTRIES}

IN_FORMATS = in_formats({name: case for name, case in CASES.items() if case is not RELEASED})
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
    case = case_with_a_high_sink()
    for result in (TwinRun(case).together().result, TwinRun(case).alone(0).result):
        assert_the_sink_takes_the_weight(result[0])


@pytest.mark.parametrize("spoilt", [np.nan, np.inf])
def test_a_broken_key_is_not_hidden(spoilt: float) -> None:
    case = case_with_a_broken_key(spoilt)
    assert_the_break_is_seen(TwinRun(case).together().result)
    assert not np.isfinite(TwinRun(case).alone(3).result[3, :, 3]).any()
