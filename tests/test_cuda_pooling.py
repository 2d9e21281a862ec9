"""Twins of what puts keys into the state, against the CPU's.

Sums over channels and slots are added in another order: rows agree within 1e-5 of their largest
value, and codes of a narrow form are those of neighbouring numbers at most.
"""

import numpy as np
import pytest
import row_forms
from compressor_cases import EPS, Compressor, Sizes, all_compressors, part_of
from cuda_twins import needs_compiler, run_twin
from operation_runs import F32, assert_same_bits, cell, padded, run, stride
from reference_packed import address

from localv4.kernels import pooling, row_operations, rows
from localv4.kernels.operation import float_bits
from localv4.kernels.row_operations import RowFormat

pytestmark = needs_compiler


def test_angles() -> None:
    frequencies, position = F32(1e4) ** (-np.arange(32, dtype=F32) / 32), np.array([1_000_003])
    expected, own = np.zeros((2, 5, 32), F32), np.zeros((2, 5, 32), F32)
    for runner, out in ((lambda *x: run(1, *x), expected), (run_twin, own)):
        words = [address(frequencies), 32, address(out[0]), address(out[1]), address(position), 5]
        runner(rows.angles, words)
    np.testing.assert_array_max_ulp(own, expected, 1)


@pytest.mark.parametrize(("cols", "pairs"), [(512, 32), (64, 7), (1056, 0)])
def test_keys_go_into_the_ring(cols: int, pairs: int) -> None:
    rng = np.random.default_rng(cols)
    x, weight = padded(rng.standard_normal((3, cols), F32)), rng.standard_normal(cols, F32)
    angle = rng.random((3, pairs), F32)
    cos, sin, position = np.cos(angle), np.sin(angle), np.array([20])
    rings = [np.full((7, cols), 5, F32) for _ in range(2)]
    for runner, ring in zip((lambda *given: run(1, *given), run_twin), rings, strict=True):
        where = cell(ring)
        words = [
            address(x),
            stride(x),
            address(weight),
            float_bits(EPS),
            address(cos),
            address(sin),
        ]
        words += [pairs, address(where), 7, cols, address(position), 3]
        runner(rows.key, words)
    np.testing.assert_allclose(rings[1], rings[0], rtol=1e-5, atol=1e-5)
    assert (rings[1][2:6] == 5).all()


@pytest.mark.parametrize(("ratio", "start"), [(4, 9), (3, 1_000_001)])
def test_projections_go_into_the_rings(ratio: int, start: int) -> None:
    rng = np.random.default_rng(start)
    keys, gates = (padded(rng.standard_normal((6, 48), F32)) for _ in range(2))
    ape, position = rng.standard_normal((ratio, 48), F32), np.array([start])
    results = []
    for runner in (lambda *given: run(1, *given), run_twin):
        rings = [np.full((11, 48), 7, F32) for _ in range(2)]
        cells = [cell(ring) for ring in rings]
        words = [address(keys), address(gates), stride(keys), address(ape), ratio]
        words += [address(cells[0]), address(cells[1]), 11, 48, address(position), 6]
        runner(pooling.append, words)
        results.append(rings)
    for own, expected in zip(results[1], results[0], strict=True):
        assert_same_bits(own, expected)


@all_compressors
@pytest.mark.parametrize("fmt", row_operations.FORMATS.values(), ids=lambda x: x.name)
@pytest.mark.parametrize("part", ["keys", "index"])
def test_entries(fmt: RowFormat, part: str, sizes: Sizes) -> None:
    work = Compressor(*sizes)
    form, pool = part_of(fmt, part)
    rope, position, stored = 2 * work.pairs, np.array([work.start]), []
    for runner in (lambda *given: run(1, *given), run_twin):
        entries, where = work.room(form.nbytes(work.n, rope))
        runner(pool, work.words(where, position, work.tokens))
        assert (entries[-1] == 7).all()
        stored.append(entries[:-1])
    # nearly all numbers are the same, but one at the edge between two codes may go either way
    step = {"F32": 0, "BF16": 2**-7, "E4M3": 2**-3, "E2M1": 0.5}[form.name]
    expected, own = (row_forms.decode(form.name, each, work.n, rope) for each in stored)
    close = np.abs(own - expected) <= 1e-5 * np.abs(expected).max()
    assert close.mean() > (0.999 if step else 0.9999999)
    np.testing.assert_allclose(
        own, expected, rtol=step, atol=np.abs(expected).max() * (0.2 if step > 0.1 else 1e-5)
    )
