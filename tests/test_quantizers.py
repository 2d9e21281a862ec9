"""Quantizers: blocks that gguf decodes, errors near the optimum, and results for any values."""

from concurrent.futures import ThreadPoolExecutor

import gguf
import numpy as np
import optimal_rounding
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from reference_packed import unpack

from localv4.kernels import packing
from localv4.kernels.packed import MX4, Q4, Q8, PackedFormat, packed_bytes
from quant.quantizers import PACKED_KIN, Quantized, has_nonfinite, quantize_rows

Floats = NDArray[np.float32]

TYPES = (
    "Q8_0",
    "Q4_0",
    "IQ4_NL",
    "MXFP4",
    "Q6_K",
    "Q3_K",
    "IQ4_XS",
    "Q4_K",
    "Q5_K",
    "Q2_K",
    "IQ2_XXS",
)
BITS = {
    **{"Q8_0": 8.5, "Q4_0": 4.5, "IQ4_NL": 4.5, "MXFP4": 4.25, "Q6_K": 6.5625},
    **{"Q3_K": 3.4375, "IQ4_XS": 4.25, "Q4_K": 4.5, "Q5_K": 5.5, "Q2_K": 2.625, "IQ2_XXS": 2.0625},
}
PACKERS = {
    "MX4": (MX4, packing.pack_mxfp4),
    "Q4": (Q4, packing.pack_q4_0),
    "Q8": (Q8, packing.pack_q8_0),
}


def normal(rows: int, cols: int, seed: int = 0, size: float = 0.03) -> Floats:
    values = np.random.default_rng(seed).standard_t(5, (rows, cols)) * size
    return values.astype(np.float32)


def importance_of(cols: int, seed: int = 1) -> Floats:
    return np.exp(np.random.default_rng(seed).standard_normal(cols)).astype(np.float32)


def decoded(result: Quantized) -> Floats:
    kind = gguf.GGMLQuantizationType[result.ggml]
    with np.errstate(all="ignore"):  # gguf multiplies numbers that it then does not use
        values: Floats = gguf.dequantize(result.blocks, kind)
    return values


def error(values: Floats, result: Quantized, importance: Floats | None = None) -> float:
    rest = values.astype(np.float64) - decoded(result)
    return float((rest * rest * (1 if importance is None else importance)).sum())


@pytest.mark.parametrize("name", TYPES)
@pytest.mark.parametrize("method", ["round", "search"])
def test_blocks_are_those_of_ggml_and_the_error_is_true(name: str, method: str) -> None:
    values, importance = normal(21, 768), importance_of(768)
    result = quantize_rows(values, name, importance, method=method)  # type: ignore[arg-type]
    assert result.blocks.shape == (21, round(768 * BITS[name] / 8))
    rest = values.astype(np.float64) - decoded(result)
    errors = (rest * rest * importance).sum(1)
    np.testing.assert_allclose(result.row_errors, errors, rtol=1e-4)
    assert result.squared_error == pytest.approx(errors.sum(), rel=1e-4)
    # plain rounding to so many bits leaves at most about that share of the energy
    assert errors.sum() < 9 * 4.0 ** -BITS[name] * (values * values * importance).sum()


@pytest.mark.parametrize("name", TYPES)
def test_search_is_better_than_rounding(name: str) -> None:
    values, importance = normal(16, 512), importance_of(512)
    plain = quantize_rows(values, name, importance, method="round").squared_error
    assert quantize_rows(values, name, importance).squared_error < 0.97 * plain


@pytest.mark.parametrize("name", TYPES)
def test_search_is_near_the_optimum(name: str) -> None:
    values, importance = normal(1, 256, seed=3), importance_of(256)
    x, w = values[0].astype(np.float64), importance.astype(np.float64)
    if name in optimal_rounding.SINGLE:
        best = optimal_rounding.single(x.reshape(-1, 32), w.reshape(-1, 32), name)
    elif name in optimal_rounding.SIGNED:
        best = optimal_rounding.signed(x, w, name)
    elif name in optimal_rounding.AFFINE:
        best = optimal_rounding.affine(x, w, name)
    elif name == "IQ2_XXS":
        best = optimal_rounding.lattice(x, w)
    else:
        best = optimal_rounding.powers(x.reshape(-1, 32), w.reshape(-1, 32))
    ours = error(values, quantize_rows(values, name, importance), importance)
    assert ours < 1.08 * best


@pytest.mark.parametrize("name", TYPES)
def test_rows_are_independent_of_company_and_threads(name: str) -> None:
    values, importance = normal(40, 256), importance_of(256)
    together = quantize_rows(values, name, importance)
    spans = [(0, 1), (1, 7), (7, 24), (24, 40)]
    with ThreadPoolExecutor(4) as pool:
        parts = pool.map(lambda span: quantize_rows(values[slice(*span)], name, importance), spans)
        apart = list(parts)
    np.testing.assert_array_equal(np.concatenate([p.blocks for p in apart]), together.blocks)
    np.testing.assert_array_equal(
        np.concatenate([p.row_errors for p in apart]), together.row_errors
    )


@pytest.mark.parametrize("target", PACKERS)
def test_packed_formats_hold_the_same_values(target: str) -> None:
    fmt, pack = PACKERS[target]
    values = normal(32, 512)
    result = quantize_rows(values, target)
    assert result.ggml == PACKED_KIN[target]
    assert _packed_values(fmt, pack, result, values.shape) == decoded(result).tolist()


def _packed_values(
    fmt: PackedFormat, pack: object, result: Quantized, shape: tuple[int, int]
) -> list[list[float]]:
    out = np.zeros(packed_bytes(fmt, *shape), np.uint8)
    assert pack(out, result.blocks.reshape(-1), shape[1], 0, shape[0] // 16, 1) == 0  # type: ignore[operator]
    rows: list[list[float]] = unpack(fmt, out, *shape).tolist()
    return rows


def test_values_of_fp4_stay_exact_in_mxfp4() -> None:
    rng = np.random.default_rng(0)
    levels = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6], np.float32)
    signs = rng.choice([-1, 1], (8, 256))
    scales = np.repeat(2.0 ** rng.integers(-20, 5, (8, 8)), 32, axis=1)
    values = (rng.choice(levels, (8, 256)) * signs * scales).astype(np.float32)
    result = quantize_rows(values, "MXFP4")
    np.testing.assert_array_equal(decoded(result), values)
    assert result.squared_error == 0


@settings(deadline=None, max_examples=60)
@given(
    name=st.sampled_from(TYPES),
    power=st.integers(-149, 126),
    seed=st.integers(0, 1000),
    spread=st.sampled_from([0, 1, 20]),
)
def test_values_of_any_size_have_a_result(name: str, power: int, seed: int, spread: int) -> None:
    rng = np.random.default_rng(seed)
    powers = np.minimum(power + rng.uniform(0, spread, (3, 256)), 127)
    values = np.ldexp(rng.standard_normal((3, 256)), powers.astype(int)) / 8
    values = values.astype(np.float32)
    result = quantize_rows(values, name)
    assert np.isfinite(decoded(result)).all()
    assert np.isfinite(result.row_errors).all()
    energy = float((values.astype(np.float64) ** 2).sum())
    assert error(values, result) <= energy * (1 + 1e-6)
    assert quantize_rows(values, name).blocks.tobytes() == result.blocks.tobytes()


@pytest.mark.parametrize("name", TYPES)
def test_small_weights_keep_what_halves_allow(name: str) -> None:
    values = normal(4, 256, size=1e-4)
    relative = error(values, quantize_rows(values, name)) / float((values**2).sum())
    assert relative < 9 * 4.0 ** -min(BITS[name], 5)


@pytest.mark.parametrize("name", TYPES)
def test_rows_of_zeros_and_constants(name: str) -> None:
    values = np.zeros((5, 256), np.float32)
    values[1], values[2], values[3, :40] = 0.37, -1.5, 2.0
    result = quantize_rows(values, name)
    np.testing.assert_array_equal(decoded(result)[[0, 4]], 0)
    allowed = 0.18 if name == "MXFP4" else 0.002
    np.testing.assert_allclose(decoded(result)[1:3], values[1:3], rtol=allowed)


def test_importance_says_where_errors_may_be() -> None:
    values, importance = normal(16, 256), np.ones(256, np.float32)
    importance[::2] = 100
    for name in TYPES:
        even, all_same = (
            (decoded(quantize_rows(values, name, w)) - values)[:, ::2] for w in (importance, None)
        )
        assert (even**2).sum() < (all_same**2).sum()


def test_columns_that_were_never_active_are_rounded_all_the_same() -> None:
    values, importance = normal(16, 256), importance_of(256)
    importance[32:64] = 0
    for name in TYPES:
        rest = (decoded(quantize_rows(values, name, importance)) - values)[:, 32:64]
        assert (rest**2).sum() < 12 * 4.0 ** -BITS[name] * (values[:, 32:64] ** 2).sum()
    nothing = quantize_rows(values, "Q4_K", np.zeros(256, np.float32))
    np.testing.assert_array_equal(nothing.blocks, quantize_rows(values, "Q4_K").blocks)
    assert nothing.squared_error == 0


@pytest.mark.parametrize("bad", [-1.0, np.nan, np.inf])
def test_importance_must_be_numbers(bad: float) -> None:
    importance = np.ones(256, np.float32)
    importance[3] = bad
    with pytest.raises(ValueError, match="importance"):
        quantize_rows(normal(1, 256), "Q4_K", importance)
    with pytest.raises(ValueError, match="importance"):
        quantize_rows(normal(1, 256), "Q4_K", np.ones(255, np.float32))


def test_targets_and_columns_are_checked() -> None:
    with pytest.raises(ValueError, match="no quantizer for Q9"):
        quantize_rows(normal(1, 256), "Q9")
    with pytest.raises(ValueError, match="multiple of 256"):
        quantize_rows(normal(1, 288), "Q3")


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_values_that_are_not_finite_are_noticed(bad: float) -> None:
    values = normal(3, 64)
    values[0, 0] = np.finfo(np.float32).max
    values[0, 1:] = np.finfo(np.float32).max
    assert not has_nonfinite(values)
    values[2, 5] = bad
    assert has_nonfinite(values)
