"""Twins of the experts of one token, against the CPU's: the same bits."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import pytest
from cuda_products import FORMATS, random_packed, rounded
from cuda_twins import launch, needs_compiler, padded_words, run_twin, twin_name
from operation_runs import F32, Floats, Indices, Rounded, assert_same_bits, run
from reference_packed import Bytes, address, floats

from localv4.cuda.twins.products import COMBINE, DOWN_PARTS
from localv4.kernels.formats import OPERATIONS
from localv4.kernels.operation import float_bits
from localv4.kernels.packed import Q8, PackedFormat, down_offset
from localv4.kernels.single_token import ROW_GAP

pytestmark = needs_compiler

formats = pytest.mark.parametrize("fmt", FORMATS, ids=lambda fmt: fmt.name)
Runner = Callable[..., None]


def on_cpu(entry: object, words: Sequence[int]) -> None:
    run(1, entry, words)  # type: ignore[arg-type]


RUNNERS: tuple[Runner, Runner] = (run_twin, on_cpu)


@dataclass
class Case:
    """Records of some experts, the table of them, and the inputs of both halves."""

    fmt: PackedFormat
    hidden: int
    inner: int
    records: list[Bytes]
    table: Indices
    x: Rounded
    middle: Rounded
    shares: Floats

    @classmethod
    def make(
        cls, fmt: PackedFormat, count: int, hidden: int, inner: int, absent: Sequence[int] = ()
    ):
        """Random experts; those at the places `absent` have no record."""
        size = (2 * inner, hidden)
        parts = [
            np.concatenate(
                [random_packed(e, fmt, *size), random_packed(e + 100, fmt, hidden, inner)]
            )
            for e in range(count)
        ]
        records = [np.ascontiguousarray(part) for part in parts]
        table = np.array([address(record) for record in records])
        table[list(absent)] = 0
        shares = np.random.default_rng(count).standard_normal(count).astype(F32)
        inputs = rounded(1, hidden), rounded(count, inner)
        return cls(fmt, hidden, inner, records, table, *inputs, shares)

    def down_words(self, out: Floats, adds: int) -> list[int]:
        """The words of `down`."""
        offset = down_offset(self.fmt, self.hidden, self.inner)
        return [
            *(address(self.table), len(self.table), self.hidden // 16, self.inner),
            *(*self.middle.addresses(0), address(out), address(self.shares), offset, adds),
        ]


@formats
@pytest.mark.parametrize(
    ("count", "hidden", "inner", "absent"),
    [(3, 256, 256, [1]), (1, 768, 256, []), (2, 256, 4096, []), (2, 4352, 256, [0])],
)
def test_gate_up(fmt: PackedFormat, count: int, hidden: int, inner: int, absent: list[int]) -> None:
    case = Case.make(fmt, count, hidden, inner, absent)
    results = []
    for start in RUNNERS:
        h = floats(count, inner + ROW_GAP)
        start(
            OPERATIONS[fmt.name].gate_up,
            (
                *(address(case.table), count, inner // 16, hidden, *case.x.addresses(0)),
                *(address(h), float_bits(2.5)),
            ),
        )
        results.append(h)
    assert_same_bits(*results)
    for expert, record in enumerate(case.table):
        assert np.isfinite(results[0][expert, :inner]).all() == (record != 0)
    assert np.isnan(results[0][:, inner:]).all()


DOWNS = [(3, 256, 256, [1]), (1, 256, 768, []), (9, 256, 2048, [0, 8]), (2, 256, 16640, [])]


@formats
@pytest.mark.parametrize(("count", "hidden", "inner", "absent"), DOWNS)
@pytest.mark.parametrize("adds", [0, 1])
def test_down(
    fmt: PackedFormat, count: int, hidden: int, inner: int, absent: list[int], adds: int
) -> None:
    case = Case.make(fmt, count, hidden, inner, absent)
    results = []
    for start in RUNNERS:
        out = floats(hidden + 16)
        if adds:
            out[:hidden] = np.linspace(-1, 1, hidden)
        start(OPERATIONS[fmt.name].down, case.down_words(out, adds))
        results.append(out)
    assert_same_bits(*results)
    assert np.isfinite(results[0][:hidden]).all() and np.isnan(results[0][hidden:]).all()


@formats
@pytest.mark.parametrize("adds", [0, 1])
def test_parts_from_both_devices_combine_to_the_same_bits(fmt: PackedFormat, adds: int) -> None:
    hidden, absent = 256, [0, 3]
    entry, case = OPERATIONS[fmt.name].down, Case.make(fmt, 5, hidden, 256, [4])
    before = np.linspace(-1, 1, hidden, dtype=F32)
    expected = floats(hidden)
    expected[:] = before
    run(1, entry, case.down_words(expected, adds))

    parts, one = floats(5, hidden), np.ones(1, F32)
    for expert in absent:  # what the CPU does for those that are not on the GPU
        words = case.down_words(parts[expert], 0)
        words[0], words[1], words[8] = address(case.table[expert:]), 1, address(one)
        words[4:7] = case.middle.addresses(expert)
        run(1, entry, words)
    turns, here = (case.table != 0).astype(np.int64), case.table.copy()
    here[absent] = 0
    case.table = here
    (kernel,) = DOWN_PARTS[twin_name(entry)].kernels
    launch(kernel, padded_words(case.down_words(parts, 0)))

    out = before.copy()
    given = (address(parts), hidden, 5, hidden, address(case.shares), address(out), adds)
    launch(COMBINE.kernels[0], padded_words([*given, address(turns)]))
    assert_same_bits(out, expected)
    assert np.isnan(parts[4]).all()


def test_each_form_of_records_has_its_turn() -> None:
    hidden, forms = 256, np.array([1, 2, 0, 1, 2])
    case = Case.make(Q8, 5, hidden, 256, [])
    records, entry = case.table, OPERATIONS["Q8"].down
    parts, expected = floats(5, hidden), floats(hidden)
    (kernel,) = DOWN_PARTS[twin_name(entry)].kernels
    launch(kernel, padded_words(case.down_words(parts, 0)))
    for form in (1, 2):
        case.table = np.where(forms == form, records, 0)
        run(1, entry, case.down_words(expected, form - 1))
    out = floats(hidden)
    given = (address(parts), hidden, 5, hidden, address(case.shares), address(out), 0)
    launch(COMBINE.kernels[0], padded_words([*given, address(forms)]))
    assert_same_bits(out, expected)
    launch(COMBINE.kernels[0], padded_words([*given, address(forms.clip(0, 1))]))
    assert not np.array_equal(out, expected)
