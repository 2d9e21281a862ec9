"""Twins of the hyper-connections, against the CPU's.

The streams themselves have the same bits; sums over columns are added in another order.
"""

import numpy as np
import pytest
from cuda_twins import needs_compiler, run_twin
from operation_runs import F32, Rounded, assert_same_bits, padded, run, stride
from reference_packed import address
from test_streams import HC_EPS, ITERATIONS, RMS_EPS, Site, mixed, rows_of

from localv4.kernels import mixes, streams
from localv4.kernels.operation import float_bits
from localv4.kernels.streams import pack_mixing, partial_squares

pytestmark = needs_compiler

SHAPES = [(1, 4, 256), (3, 4, 384), (8, 4, 128), (17, 4, 256), (1, 8, 128), (9, 2, 128)]


@pytest.mark.parametrize(("tokens", "n", "hidden"), SHAPES)
@pytest.mark.parametrize("updates", [1, 2])
def test_leaving_a_block(tokens: int, n: int, hidden: int, updates: int) -> None:
    site, rows = Site(tokens, n, hidden), rows_of(n)
    fn = pack_mixing(site.fn, n)
    own, partials = site.streams.copy(), [site.partials(rows) for _ in range(2)]

    def words(values: np.ndarray, sums: np.ndarray) -> list[int]:
        second = address(site.second) if updates == 2 else 0
        inputs = [address(values), address(site.update), second, stride(site.update)]
        matrix = [address(site.mix), address(fn), rows, address(sums)]
        return [*inputs, *matrix, tokens, n, hidden]

    run(1, streams.leave_and_mix, words(site.streams, partials[0]))
    run_twin(streams.leave_and_mix, words(own, partials[1]))
    assert_same_bits(own, site.streams)
    used = [*range(rows), partial_squares(rows)]
    for sums, size in zip(*(part[:, :, used] for part in partials), strict=True):
        np.testing.assert_allclose(size, sums, rtol=1e-5, atol=1e-5 * np.abs(sums).max())


def test_only_mixing_and_only_leaving() -> None:
    site = Site(2, 4, 256)
    before, fn, partials = site.streams.copy(), pack_mixing(site.fn[:4], 4), site.partials(4)
    own, size = (address(site.streams), address(site.update), 0, stride(site.update)), (2, 4, 256)
    run_twin(streams.leave_and_mix, [*own, 0, address(fn), 4, address(partials), *size])
    assert_same_bits(site.streams, before)
    products, squares = site.expected_partials(site.fn[:4], before)
    np.testing.assert_allclose(partials[:, :, :4], products, rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(partials[:, :, 4], squares, rtol=1e-5)
    run_twin(streams.leave_and_mix, [*own, address(site.mix), 0, 0, 0, *size])
    expected = Site(2, 4, 256)
    run(
        1,
        streams.leave_and_mix,
        [address(expected.streams), *own[1:], address(site.mix), 0, 0, 0, *size],
    )
    assert_same_bits(site.streams, expected.streams)


@pytest.mark.parametrize(
    ("tokens", "n", "hidden"), [(1, 4, 4096), (3, 4, 256), (2, 8, 128), (1, 1, 128)]
)
@pytest.mark.parametrize(("is_head", "binary"), [(False, 0), (False, 1), (True, 0)])
def test_entering_a_site(tokens: int, n: int, hidden: int, is_head: bool, binary: int) -> None:
    site = Site(tokens, n, hidden)
    partials, _ = mixed(site, n if is_head else rows_of(n))
    results = []
    for runner in (lambda *given: run(1, *given), run_twin):
        x, mix = padded(np.zeros((tokens, hidden), F32)), np.zeros_like(site.mix)
        rounded = Rounded(tokens, hidden)
        first = [address(partials), address(site.scale), address(site.base)]
        last = [
            address(site.streams),
            address(site.weight),
            float_bits(RMS_EPS),
            address(x),
            stride(x),
        ]
        size = [*rounded.addresses(0), tokens, n, hidden]
        if is_head:
            runner(mixes.enter_head, [*first, float_bits(HC_EPS), *last, *size])
        else:
            words = [*first, ITERATIONS, float_bits(HC_EPS), *last, address(mix), *size, binary]
            runner(mixes.enter, words)
        rounded.assert_holds(x, binary=bool(binary))
        results.append((x, mix))
    (expected, expected_mix), (x, mix) = results
    np.testing.assert_allclose(mix, expected_mix, rtol=1e-5)
    np.testing.assert_allclose(x, expected, rtol=1e-5, atol=1e-5)


def test_entering_without_rounding() -> None:
    site = Site(1, 4, 128)
    partials, _ = mixed(site, 4)
    x = padded(np.zeros((1, 128), F32))
    words = [address(partials), address(site.scale), address(site.base), float_bits(HC_EPS)]
    words += [
        address(site.streams),
        address(site.weight),
        float_bits(RMS_EPS),
        address(x),
        stride(x),
    ]
    run_twin(mixes.enter_head, [*words, 0, 0, 0, 1, 4, 128])
    assert np.abs(x).min() > 0
