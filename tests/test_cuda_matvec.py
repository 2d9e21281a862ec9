"""Twins of the products of one token with a matrix, against the CPU's."""

import numpy as np
import pytest
from cuda_products import FORMATS, random_packed, rounded
from cuda_twins import needs_compiler, run_twin
from float_weights import FloatWeights
from operation_runs import F32, Floats, Rounded, assert_same_bits, run
from reference_packed import address, distance, floats, unpack_f8

from localv4.kernels.float_operations import OPERATIONS as FLOAT_OPERATIONS
from localv4.kernels.formats import OPERATIONS
from localv4.kernels.packed import MX4, Q4, Q8, PackedFormat

pytestmark = needs_compiler


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


@pytest.mark.parametrize("fmt", FORMATS, ids=lambda fmt: fmt.name)
@pytest.mark.parametrize(
    ("rows", "cols"), [(16, 256), (48, 768), (32, 4096), (16, 16640), (16384 + 16, 256)]
)
def test_matvec(fmt: PackedFormat, rows: int, cols: int) -> None:
    weights = random_packed(rows, fmt, rows, cols)
    assert_equal_products(fmt, rows, cols, weights, rounded(1, cols))


@pytest.mark.parametrize("fmt", [MX4, Q4, Q8], ids=lambda fmt: fmt.name)
def test_odd_numbers_of_superblocks(fmt: PackedFormat) -> None:
    for cols in (3 * fmt.columns, 261 * fmt.columns):
        weights = random_packed(cols, fmt, 48, cols)
        assert_equal_products(fmt, 48, cols, weights, rounded(1, cols))


@pytest.mark.parametrize("fmt", FORMATS, ids=lambda fmt: fmt.name)
@pytest.mark.parametrize("code", [0x00, 0x77, 0x80, 0xFF, 0x7F, 0x88])
def test_extreme_weights(fmt: PackedFormat, code: int) -> None:
    weights = random_packed(1, fmt, 32, 256)
    codes_at = {"Q4K": 256, "Q6": 320, "Q3": 256, "Q2": 320}.get(fmt.name, 64)
    weights.reshape(-1, fmt.superblock_bytes)[:, codes_at:] = code
    x, out = rounded(1, 256, "largest"), [floats(32) for _ in range(2)]
    for each, start in zip(out, (run_twin, lambda *a: run(1, *a)), strict=True):
        words = (address(weights), 2, 256, *x.addresses(0), address(each))
        start(OPERATIONS[fmt.name].matvec, words)
    assert_same_bits(*out)
    assert np.isfinite(out[0]).all()


def test_smallest_scales_of_mx4() -> None:
    weights = random_packed(1, MX4, 16, 256)
    heads = weights.reshape(-1, MX4.superblock_bytes)[:, :64]
    heads[:] = np.arange(64) % 3
    weights.reshape(-1, MX4.superblock_bytes)[1, 5] = 120
    assert_equal_products(MX4, 16, 256, weights, rounded(1, 256))


def test_errors_are_passed_on() -> None:
    weights, x = random_packed(1, Q8, 16, 128), rounded(1, 128)
    x.d.view(F32)[0, 2] = np.nan
    out = floats(16, fill=0)
    words = (address(weights), 1, 128, *x.addresses(0), address(out))
    run_twin(OPERATIONS["Q8"].matvec, words)
    assert np.isnan(out).all()


class FloatMatrix(FloatWeights):
    """A matrix that the twin multiplies with."""

    def times(self, x: Floats) -> Floats:
        """The product by the twin."""
        out = floats(self.rows + 16)
        words = (*self.words, address(x), address(self.scale), 0, address(out))
        run_twin(FLOAT_OPERATIONS[self.name].matvec, words)
        assert np.isnan(out[self.rows :]).all()
        return out[: self.rows]


@pytest.mark.parametrize(
    ("name", "rows", "cols"),
    [
        *(("F8", 16, 128), ("F8", 144, 384), ("F8", 272, 4224), ("F8", 264 * 16, 128)),
        *((name, 265 * 16, 128 * blocks) for name in ("F8", "B16", "F32R") for blocks in (1, 9)),
        *(("B16", 16, 16), ("B16", 80, 272), ("B16", 48, 4112), ("B16", 264 * 16, 48)),
        *(("F32R", 16, 48), ("F32R", 144, 256), ("F32R", 48, 4112), ("F32R", 264 * 16, 48)),
    ],
)
def test_float_matvec(name: str, rows: int, cols: int) -> None:
    matrix, x = FloatMatrix(name, rows, cols), floats(cols)
    x[:] = np.random.default_rng(1).standard_normal(cols)
    assert distance(matrix.times(x), matrix.values @ x) < 1e-6


@pytest.mark.parametrize("name", ["F8", "B16", "F32R"])
def test_each_float_meets_its_activation(name: str) -> None:
    matrix = FloatMatrix(name, 32, 256)
    if name == "F8":
        codes = matrix.packed.reshape(-1, 16)
        codes[:] = np.arange(len(codes))[:, None] % 256
        codes[codes & 0x7F == 0x7F] = 0
        matrix.values = unpack_f8(matrix.packed, matrix.scale, 32, 256).astype(np.float64)
    for column in range(0, 256, 1 if name == "F8" else 37):
        x = floats(256, fill=0)
        x[column] = 1
        assert np.array_equal(matrix.times(x), matrix.values[:, column].astype(F32))


@pytest.mark.parametrize("name", ["F8", "B16", "F32R"])
@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_no_error_in_the_activations_is_lost(name: str, bad: float) -> None:
    x = floats(128, fill=1)
    x[77] = bad
    assert not np.isfinite(FloatMatrix(name, 16, 128).times(x)).any()
