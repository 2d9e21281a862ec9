"""Twins of the products of one token with a matrix, against the CPU's."""

import numpy as np
import pytest
from cuda_twins import needs_compiler, run_twin
from operation_runs import F32, Rounded, assert_same_bits, run
from reference_packed import address, floats, random_weights

from localv4.kernels.formats import OPERATIONS
from localv4.kernels.packed import MX4, Q4, Q8, PackedFormat
from localv4.kernels.single_token import quantize

pytestmark = needs_compiler


def rounded(cols: int, kind: str = "normal", count: int = 1) -> Rounded:
    """Rounded activations of some tokens."""
    x = floats(count, cols)
    x[:] = np.random.default_rng(cols).standard_normal((count, cols))
    if kind == "largest":
        x[:] = np.where(x > 0, 1, -1)
    result = Rounded(count, cols)
    run(1, quantize, (address(x), cols, 0, count, cols, *result.addresses(0)))
    return result


def assert_equal_products(
    fmt: PackedFormat, rows: int, cols: int, weights: np.ndarray, x: Rounded
) -> None:
    """Compare all rows, and that nothing is written behind them."""
    entry = OPERATIONS[fmt.name].matvec
    mine, theirs = floats(rows + 16), floats(rows + 16)
    for out, start in ((mine, run_twin), (theirs, lambda *a: run(1, *a))):
        start(entry, (address(weights), rows // 16, cols, *x.addresses(0), address(out)))
    assert_same_bits(mine, theirs)
    assert np.isfinite(mine[:rows]).all() and mine[:rows].any() and np.isnan(mine[rows:]).all()


@pytest.mark.parametrize("fmt", [MX4, Q4, Q8], ids=lambda fmt: fmt.name)
@pytest.mark.parametrize(
    ("rows", "cols"), [(16, 128), (48, 640), (32, 4096), (16, 16768), (16384 + 16, 128)]
)
def test_matvec(fmt: PackedFormat, rows: int, cols: int) -> None:
    weights = random_weights(rows, fmt, rows, cols)
    assert_equal_products(fmt, rows, cols, weights, rounded(cols))


@pytest.mark.parametrize("fmt", [MX4, Q4, Q8], ids=lambda fmt: fmt.name)
@pytest.mark.parametrize("code", [0x00, 0x77, 0x80, 0xFF, 0x7F, 0x88])
def test_extreme_weights(fmt: PackedFormat, code: int) -> None:
    weights = random_weights(1, fmt, 32, 256)
    weights.reshape(-1, fmt.superblock_bytes)[:, 64:] = code
    x, out = rounded(256, "largest"), [floats(32) for _ in range(2)]
    for each, start in zip(out, (run_twin, lambda *a: run(1, *a)), strict=True):
        words = (address(weights), 2, 256, *x.addresses(0), address(each))
        start(OPERATIONS[fmt.name].matvec, words)
    assert_same_bits(*out)
    assert np.isfinite(out[0]).all()


def test_smallest_scales_of_mx4() -> None:
    weights = random_weights(1, MX4, 16, 256)
    heads = weights.reshape(-1, MX4.superblock_bytes)[:, :64]
    heads[:] = np.arange(64) % 3
    weights.reshape(-1, MX4.superblock_bytes)[1, 5] = 120
    assert_equal_products(MX4, 16, 256, weights, rounded(256))


def test_errors_are_passed_on() -> None:
    weights, x = random_weights(1, Q8, 16, 128), rounded(128)
    x.d.view(F32)[0, 2] = np.nan
    out = floats(16, fill=0)
    words = (address(weights), 1, 128, *x.addresses(0), address(out))
    run_twin(OPERATIONS["Q8"].matvec, words)
    assert np.isnan(out).all()
