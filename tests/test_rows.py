"""Norms, rotation angles, window keys and the SwiGLU, against NumPy."""

import numba
import numpy as np
import pytest
from operation_runs import (
    F32,
    Floats,
    Rounded,
    cell,
    padded,
    run_all_ways,
    stride,
)
from reference_packed import address, floats

from localv4.kernels import rows
from localv4.kernels.operation import float_bits

pytestmark = pytest.mark.skipif(
    bool(numba.config.DISABLE_JIT), reason="kernels that take addresses need the compiler"
)

EPS = 1e-6


def normed(x: Floats, weight: Floats) -> Floats:
    wide = x.astype(np.float64)
    result: Floats = (weight * wide / np.sqrt((wide**2).mean(1, keepdims=True) + EPS)).astype(F32)
    return result


@pytest.mark.parametrize(("tokens", "cols"), [(1, 32), (5, 96), (3, 4096)])
@pytest.mark.parametrize("kept", [True, False])
def test_norm(tokens: int, cols: int, kept: bool) -> None:
    rng = np.random.default_rng(cols)
    x = padded(rng.standard_normal((tokens, cols), F32) * 3)
    weight = rng.standard_normal(cols, F32)
    out, rounded = padded(np.zeros((tokens, cols), F32)), Rounded(tokens, cols)

    def words(first: int, count: int) -> list[int]:
        return [
            *(address(x[first:]), stride(x), address(weight), float_bits(EPS)),
            *(address(out[first:]) if kept else 0, stride(out), *rounded.addresses(first)),
            *(count, cols),
        ]

    run_all_ways(rows.norm, tokens, [out, *rounded.buffers], words)
    if kept:
        np.testing.assert_allclose(out, normed(x, weight), rtol=1e-6)
        rounded.assert_holds(out)
    else:
        assert not out.any()
        sizes = np.abs(normed(x, weight).reshape(tokens, -1, 32)).max(2)
        np.testing.assert_allclose(rounded.d.view(F32), sizes / 127, rtol=1e-6)


def test_norm_in_place_without_rounding() -> None:
    rng = np.random.default_rng(1)
    buffer = floats(4, 80)
    x, weight = buffer[:, :64], rng.standard_normal(64, F32)
    x[:] = rng.standard_normal((4, 64), F32)
    expected = normed(x, weight)

    def words(first: int, count: int) -> list[int]:
        own = (address(x[first:]), stride(x))
        return [*own, address(weight), float_bits(EPS), *own, 0, 0, 0, count, 64]

    run_all_ways(rows.norm, 4, [x], words)
    np.testing.assert_allclose(x, expected, rtol=1e-6)
    assert np.isnan(buffer[:, 64:]).all()


def angle_twin(positions: np.ndarray, frequencies: Floats) -> tuple[Floats, Floats]:
    wide = (positions.astype(F32)[:, None] * frequencies).astype(np.float64)
    return np.cos(wide).astype(F32), np.sin(wide).astype(F32)


@pytest.mark.parametrize("start", [0, 7, 1_000_003])
def test_angles(start: int) -> None:
    frequencies = (F32(160000) ** -np.linspace(0, 1, 5)).astype(F32)
    cos, sin = np.zeros((6, 5), F32), np.zeros((6, 5), F32)
    positions = np.arange(start, start + 6)

    def words(first: int, count: int) -> list[int]:
        out = (address(cos[first:]), address(sin[first:]))
        return [address(frequencies), 5, *out, address(positions[first:]), count]

    run_all_ways(rows.angles, 6, [cos, sin], words)
    for actual, expected in zip((cos, sin), angle_twin(positions, frequencies), strict=True):
        np.testing.assert_array_max_ulp(actual, expected, 1)


def rotated(x: Floats, cos: Floats, sin: Floats) -> Floats:
    out = x.copy()
    first = x.shape[1] - 2 * cos.shape[1]
    even, odd = x[:, first::2], x[:, first + 1 :: 2]
    out[:, first::2], out[:, first + 1 :: 2] = even * cos - odd * sin, even * sin + odd * cos
    return out


@pytest.mark.parametrize(("cols", "pairs", "start"), [(64, 5, 0), (96, 48, 9), (512, 32, 130)])
def test_keys_go_into_the_window(cols: int, pairs: int, start: int) -> None:
    rng = np.random.default_rng(cols)
    tokens, capacity = 5, 12
    x = padded(rng.standard_normal((tokens, cols), F32))
    weight = rng.standard_normal(cols, F32)
    cos, sin = rng.standard_normal((2, tokens, pairs), F32)
    ring = np.full((capacity, cols), 7, F32)
    positions, where = np.arange(start, start + tokens), cell(ring)

    def words(first: int, count: int) -> list[int]:
        return [
            *(address(x[first:]), stride(x), address(weight), float_bits(EPS)),
            *(address(cos[first:]), address(sin[first:]), pairs),
            *(address(where), capacity, cols, address(positions[first:]), count),
        ]

    run_all_ways(rows.key, tokens, [ring], words)
    expected = np.full((capacity, cols), 7, F32)
    expected[positions % capacity] = rotated(normed(x, weight), cos, sin)
    np.testing.assert_allclose(ring, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("cols", [16, 1040, 2048])
@pytest.mark.parametrize("in_place", [True, False])
def test_swiglu(cols: int, in_place: bool) -> None:
    rng = np.random.default_rng(cols)
    limit = 7.0
    values = rng.standard_normal((2, 3, cols), F32) * 8
    gate, up = padded(values[0]), padded(values[1])
    out = gate if in_place else floats(3, cols, fill=0)

    def words(first: int, count: int) -> list[int]:
        return [
            *(address(gate[first:]), address(up[first:]), stride(gate)),
            *(address(out[first:]), stride(out), float_bits(limit), count, cols),
        ]

    run_all_ways(rows.swiglu, 3, [out], words)
    g, u = np.minimum(values[0], limit).astype(np.float64), np.clip(values[1], -limit, limit)
    np.testing.assert_allclose(out, g / (1 + np.exp(-g)) * u, rtol=2e-6)
