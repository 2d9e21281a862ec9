"""Twins of the operations on rows, against the CPU's: the same bits."""

import numpy as np
import pytest
from cuda_twins import needs_compiler, run_twin
from operation_runs import F32, Floats, Rounded, assert_same_bits, padded, run, stride
from reference_packed import address

from localv4.kernels import rows
from localv4.kernels.operation import float_bits
from localv4.kernels.single_token import quantize

pytestmark = needs_compiler

EPS = 1e-6


def activations(kind: str, tokens: int, cols: int) -> Floats:
    x = np.random.default_rng(cols).standard_normal((tokens, cols)).astype(F32)
    if kind == "subnormal":
        x *= F32(1e-39)
    if kind == "large":
        x *= F32(1e37)
    if kind == "ties":
        x = np.round(x * 8) / 8
        x[:, ::32] = 127
    if kind == "zeros":
        x[:, :32] = 0
        x[:, -1] = 1
    return padded(x)


def test_clear() -> None:
    values = np.random.default_rng(1).normal(size=(5, 64)).astype(np.float32)
    mine, theirs = padded(values), padded(values)
    run(1, rows.clear, (address(theirs), stride(theirs), 5, 48))
    run_twin(rows.clear, (address(mine), stride(mine), 5, 48))
    assert_same_bits(mine, theirs)
    assert not mine[:, :48].any()
    assert mine[:, 48:].any()


@pytest.mark.parametrize("kind", ["normal", "subnormal", "large", "ties", "zeros"])
@pytest.mark.parametrize("chosen", [False, True])
@pytest.mark.parametrize("binary", [0, 1])
@pytest.mark.parametrize("cols", [32, 352, 1024, 2080])
def test_quantize(kind: str, chosen: bool, cols: int, binary: int) -> None:
    x = activations(kind, 5, cols)
    order = np.array([4, 0, 2])
    count = len(order) if chosen else len(x)
    mine, theirs = Rounded(count, cols), Rounded(count, cols)
    given = (address(x), stride(x), address(order) if chosen else 0, count, cols)
    run(1, quantize, (*given, *theirs.addresses(0), binary))
    run_twin(quantize, (*given, *mine.addresses(0), binary))
    for actual, expected in zip(mine.buffers, theirs.buffers, strict=True):
        assert_same_bits(actual, expected)
    assert mine.d.any() and mine.q.any() == (kind != "subnormal")


@pytest.mark.parametrize("binary", [0, 1])
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_quantize_loses_no_error(bad: float, binary: int) -> None:
    x = activations("normal", 1, 96)
    x[0, 50] = bad
    mine, theirs = Rounded(1, 96), Rounded(1, 96)
    run(1, quantize, (address(x), stride(x), 0, 1, 96, *theirs.addresses(0), binary))
    run_twin(quantize, (address(x), stride(x), 0, 1, 96, *mine.addresses(0), binary))
    np.testing.assert_array_equal(mine.q, theirs.q)
    np.testing.assert_array_equal(mine.b, theirs.b)
    np.testing.assert_array_equal(mine.d.view(F32), theirs.d.view(F32))
    assert not np.isfinite(mine.d.view(F32)[0, 1])


@pytest.mark.parametrize(("tokens", "cols"), [(1, 32), (5, 96), (2, 4096)])
@pytest.mark.parametrize("kept", [True, False])
@pytest.mark.parametrize("rounds", [True, False])
def test_norm(tokens: int, cols: int, kept: bool, rounds: bool) -> None:
    x = activations("normal", tokens, cols)
    weight = np.random.default_rng(2).standard_normal(cols).astype(F32)
    outs = [padded(np.zeros((tokens, cols), F32)) for _ in range(2)]
    buffers = [Rounded(tokens, cols) for _ in range(2)]
    for out, rounded, start in zip(outs, buffers, (run_twin, lambda *a: run(1, *a)), strict=True):
        start(
            rows.norm,
            (
                *(address(x), stride(x), address(weight), float_bits(EPS)),
                *(address(out) if kept else 0, stride(out)),
                *(rounded.addresses(0) if rounds else (0, 0, 0)),
                *(tokens, cols),
            ),
        )
    assert_same_bits(outs[0], outs[1])
    for actual, expected in zip(buffers[0].buffers, buffers[1].buffers, strict=True):
        assert_same_bits(actual, expected)
    assert outs[0].any() == kept and buffers[0].q.any() == rounds


def test_norm_in_place() -> None:
    values = activations("normal", 3, 64)
    weight = np.linspace(1, 2, 64, dtype=F32)
    mine, theirs = padded(values), padded(values)
    for x, start in ((mine, run_twin), (theirs, lambda *a: run(1, *a))):
        own = (address(x), stride(x))
        start(rows.norm, (*own, address(weight), float_bits(EPS), *own, 0, 0, 0, 3, 64))
    assert_same_bits(mine, theirs)
    assert not np.array_equal(mine, values)


def test_swiglu() -> None:
    gate, up = (30 * activations("normal", 3, cols)[:, :1552] for cols in (1552, 1568))
    gate[0, :8] = [np.nan, np.inf, -np.inf, 88.5, -88.5, 0, -0.0, 1e-40]
    up[1, :3] = [np.nan, np.inf, -np.inf]
    gate, up = padded(gate), padded(up)
    mine, theirs = padded(np.zeros((3, 1552), F32)), padded(np.zeros((3, 1552), F32))
    for out, start in ((mine, run_twin), (theirs, lambda *a: run(1, *a))):
        pair = (address(gate), address(up), stride(gate))
        start(rows.swiglu, (*pair, address(out), stride(out), float_bits(10.0), 3, 1536))
    np.testing.assert_array_equal(mine, theirs)
    finite = np.isfinite(theirs)
    assert_same_bits(mine[finite], theirs[finite])
    assert mine[:, :1536].any() and not mine[:, 1536:].any()
