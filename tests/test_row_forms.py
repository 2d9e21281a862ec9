"""Compressed rows are stored as the table says, and read as what was stored."""

import numba
import numpy as np
import pytest
import row_forms as twin
from reference_packed import address

from localv4.kernels.row_forms import BF16_ROWS, E2M1_ROWS, E4M3_ROWS, F32_ROWS, RowForm
from localv4.kernels.simd import store_f32, store_i32

pytestmark = pytest.mark.skipif(
    bool(numba.config.DISABLE_JIT), reason="kernels that take addresses need the compiler"
)

F32 = np.float32
FORMS = {form.name: form for form in (F32_ROWS, BF16_ROWS, E4M3_ROWS, E2M1_ROWS)}
forms = pytest.mark.parametrize("name", FORMS)
SHAPES = [(512, 64), (128, 64), (96, 10), (32, 0), (64, 64), (480, 24)]


def _encoder(form: RowForm):  # type: ignore[no-untyped-def]
    encode = form.encode

    @numba.njit  # type: ignore[untyped-decorator]
    def run(row: int, source: int, n: int, rope: int) -> None:
        encode(row, source, n, rope)

    return run


def _reader(form: RowForm):  # type: ignore[no-untyped-def]
    load = form.load

    @numba.njit  # type: ignore[untyped-decorator]
    def run(out: int, row: int, n: int, rope: int) -> None:
        for channel in range(0, n, 16):
            store_f32(out + 4 * channel, load(row, channel, n, rope))

    return run


def _word_reader(form: RowForm):  # type: ignore[no-untyped-def]
    words = form.words

    @numba.njit  # type: ignore[untyped-decorator]
    def run(out: int, row: int, n: int, rope: int) -> None:
        for channel in range(0, n, 32):
            store_i32(out + 2 * channel, words(row, channel, n, rope))

    return run


ENCODERS = {name: _encoder(form) for name, form in FORMS.items()}
READERS = {name: _reader(form) for name, form in FORMS.items()}
WORD_READERS = {name: _word_reader(form) for name, form in FORMS.items()}


def stored(name: str, rows: np.ndarray, rope: int) -> np.ndarray:
    """Rows as the kernels store them."""
    n, size = rows.shape[1], FORMS[name].nbytes(rows.shape[1], rope)
    out = np.full((len(rows) + 1, size), 0xAA, np.uint8)
    for row, source in zip(out, rows.copy(), strict=False):
        ENCODERS[name](address(row), address(source), n, rope)
    assert (out[-1] == 0xAA).all(), "a write behind the row"
    return out[:-1]


def read(name: str, rows: np.ndarray, n: int, rope: int) -> np.ndarray:
    """What the kernels read."""
    out = np.empty((len(rows), n), F32)
    for target, row in zip(out, rows, strict=True):
        READERS[name](address(target), address(row), n, rope)
    return out


def read_words(name: str, rows: np.ndarray, n: int, rope: int) -> np.ndarray:
    """What the kernels read as bfloat16."""
    out = np.empty((len(rows), n), np.uint16)
    for target, row in zip(out, rows, strict=True):
        WORD_READERS[name](address(target), address(row), n, rope)
    return twin.from_bf16(out)


def some_rows(n: int) -> np.ndarray:
    """Rows of ordinary numbers, of far apart ones, of ties between codes, and zeros."""
    rng = np.random.default_rng(n)
    ordinary = rng.standard_normal((40, n))
    spread = rng.standard_normal((20, n)) * 2.0 ** rng.integers(-30, 31, (20, n))
    ties = rng.integers(-64, 65, (20, n)) / 32
    return np.concatenate([ordinary, spread, ties, np.zeros((1, n))]).astype(F32)


@forms
@pytest.mark.parametrize(("n", "rope"), SHAPES)
def test_rows_are_stored_as_the_twin_stores_them(name: str, n: int, rope: int) -> None:
    rows = some_rows(n)
    expected = twin.encode(name, rows, rope)
    actual = stored(name, rows, rope)
    if name in ("E4M3", "E2M1"):  # how a group of zeros is scaled means nothing
        rows, expected, actual = rows[:-1], expected[:-1], actual[:-1]
    np.testing.assert_array_equal(actual, expected)


@forms
@pytest.mark.parametrize(("n", "rope"), SHAPES)
def test_rows_read_as_what_is_stored(name: str, n: int, rope: int) -> None:
    rows = stored(name, some_rows(n), rope)
    np.testing.assert_array_equal(read(name, rows, n, rope), twin.decode(name, rows, n, rope))


@forms
@pytest.mark.parametrize(("n", "rope"), SHAPES)
def test_words_are_the_rows_as_bfloat16(name: str, n: int, rope: int) -> None:
    rows = stored(name, some_rows(n), rope)
    expected = twin.rounded(twin.decode(name, rows, n, rope))
    actual = read_words(name, rows, n, rope)
    if name == "E4M3":  # subnormal codes are zero
        largest = np.abs(expected).max(1, keepdims=True)
        assert not np.where(expected == actual, 0, actual).any()
        assert (np.abs(expected - actual) <= 2.0**-14 * largest).all()
        assert (actual[:40] == expected[:40]).mean() > 0.99
    else:
        np.testing.assert_array_equal(actual, expected)


@pytest.mark.parametrize(("name", "most"), [("BF16", 2**-8), ("E4M3", 2**-4), ("E2M1", 0.26)])
def test_the_error_is_that_of_the_codes(name: str, most: float) -> None:
    rows = np.random.default_rng(1).standard_normal((50, 128)).astype(F32)
    expected = twin.mixed(rows) if name == "E2M1" else rows
    error = np.abs(read(name, stored(name, rows, 64), 128, 64) - expected)
    assert most / 8 < (error / np.abs(rows).max()).max() < most


def test_bytes_of_the_released_models() -> None:
    assert [form.nbytes(512, 64) for form in (F32_ROWS, BF16_ROWS, E4M3_ROWS)] == [2048, 1024, 584]
    assert [form.nbytes(128, 64) for form in (F32_ROWS, BF16_ROWS, E2M1_ROWS)] == [512, 256, 68]


@forms
@pytest.mark.parametrize("spoilt", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("place", [3, 127])
def test_what_is_not_finite_is_not_hidden(name: str, spoilt: float, place: int) -> None:
    rows = np.random.default_rng(2).standard_normal((1, 128)).astype(F32)
    rows[0, place] = spoilt
    row = stored(name, rows, 64)
    assert not np.isfinite(read(name, row, 128, 64)[0, place])
    assert not np.isfinite(read_words(name, row, 128, 64)[0, place])


def test_mixing_keeps_products() -> None:
    rng = np.random.default_rng(3)
    for n in (32, 96, 128):
        x, y = rng.standard_normal((2, 7, n)).astype(F32)
        np.testing.assert_allclose(twin.mixed(x) @ twin.mixed(y).T, x @ y.T, atol=1e-4)
