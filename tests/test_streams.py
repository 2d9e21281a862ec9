"""Hyper-connections in pieces of columns, against the exact kernels."""

import numba
import numpy as np
import pytest
from operation_runs import F32, Floats, Rounded, padded, run, run_all_ways, stride
from reference_packed import address

from localv4.kernels import elementwise, hyper, mixes, streams
from localv4.kernels.operation import float_bits
from localv4.kernels.streams import COLUMNS, pack_mixing, partial_row, partial_squares

pytestmark = pytest.mark.skipif(
    bool(numba.config.DISABLE_JIT), reason="kernels that take addresses need the compiler"
)

HC_EPS, RMS_EPS, ITERATIONS = 1e-6, 1e-5, 20
SHAPES = [(1, 4, 256), (11, 4, 384), (3, 1, 128), (2, 3, 256), (9, 2, 128), (2, 8, 128)]


def rows_of(n: int) -> int:
    return 2 * n + n * n


class Site:
    """Streams, an update of them, and the weights of the next site."""

    def __init__(self, tokens: int, n: int, hidden: int) -> None:
        rng = np.random.default_rng(tokens + n)
        self.tokens, self.n, self.hidden = tokens, n, hidden
        self.streams = rng.standard_normal((tokens, n, hidden), F32)
        self.update = padded(rng.standard_normal((tokens, hidden), F32))
        self.second = padded(rng.standard_normal((tokens, hidden), F32))
        self.mix = rng.random((tokens, n + n * n), F32)
        self.fn = rng.standard_normal((rows_of(n), n * hidden), F32) * F32(0.05)
        self.scale, self.base = rng.random(3, F32), rng.standard_normal(rows_of(n), F32)
        self.weight = rng.standard_normal(hidden, F32)

    def left(self, update: Floats) -> Floats:
        """The streams after an update."""
        out = np.empty_like(self.streams)
        post, comb = self.mix[:, : self.n], np.ascontiguousarray(self.mix[:, self.n :])
        hyper.expand(
            *(out, np.ascontiguousarray(post), comb.reshape(-1, self.n, self.n)),
            *(np.ascontiguousarray(update), self.streams),
        )
        return out

    def partials(self, rows: int) -> Floats:
        """Room for partial products."""
        row = partial_row(rows)
        return np.full((self.tokens, self.hidden // COLUMNS, row), 7, F32)

    def expected_partials(self, fn: Floats, x: Floats) -> tuple[Floats, Floats]:
        """Products with the rows of fn, and sums of squares, for each block of columns."""
        blocks = x.reshape(self.tokens, self.n, -1, COLUMNS).astype(np.float64)
        matrix = fn.reshape(len(fn), self.n, -1, COLUMNS).astype(np.float64)
        products = np.einsum("tnbc,rnbc->tbr", blocks, matrix)
        return products.astype(F32), (blocks**2).sum((1, 3)).astype(F32)


@pytest.mark.parametrize(("tokens", "n", "hidden"), SHAPES)
@pytest.mark.parametrize("updates", [1, 2])
def test_leaving_a_block_and_mixing_for_the_next(
    tokens: int, n: int, hidden: int, updates: int
) -> None:
    site, rows = Site(tokens, n, hidden), rows_of(n)
    fn, partials = pack_mixing(site.fn, n), site.partials(rows)
    expected = site.left(site.update + site.second if updates == 2 else site.update)

    def words(first: int, count: int) -> list[int]:
        return [
            *(address(site.streams[first:]), address(site.update[first:])),
            *(address(site.second[first:]) if updates == 2 else 0, stride(site.update)),
            *(address(site.mix[first:]), address(fn), rows, address(partials[first:])),
            *(count, n, hidden),
        ]

    run_all_ways(streams.leave_and_mix, tokens, [site.streams, partials], words)
    np.testing.assert_allclose(site.streams, expected, rtol=1e-5, atol=1e-5)
    products, squares = site.expected_partials(site.fn, site.streams)
    np.testing.assert_allclose(partials[:, :, :rows], products, rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(partials[:, :, partial_squares(rows)], squares, rtol=1e-5)


def test_only_mixing_and_only_leaving() -> None:
    site = Site(3, 4, 256)
    before, expected = site.streams.copy(), site.left(site.update)
    fn, partials = pack_mixing(site.fn[:4], 4), site.partials(4)
    own, size = (address(site.streams), address(site.update), 0, stride(site.update)), (3, 4, 256)
    run(2, streams.leave_and_mix, [*own, 0, address(fn), 4, address(partials), *size])
    np.testing.assert_array_equal(site.streams, before)
    products, squares = site.expected_partials(site.fn[:4], before)
    np.testing.assert_allclose(partials[:, :, :4], products, rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(partials[:, :, 4], squares, rtol=1e-5)
    run(2, streams.leave_and_mix, [*own, address(site.mix), 0, 0, 0, *size])
    np.testing.assert_allclose(site.streams, expected, rtol=1e-5, atol=1e-5)


def test_packing_fills_up_rows_with_zeros() -> None:
    fn = np.arange(1, 1 + 3 * 2 * 256, dtype=F32).reshape(3, 512)
    packed = pack_mixing(fn, 2).reshape(2, 1, 2, 8, 4, 16)
    np.testing.assert_array_equal(packed[1, 0, 1, 3, 2], fn[2, 256 + 128 + 48 :][:16])
    assert not packed[:, :, :, :, 3].any()


def mixed(site: Site, rows: int) -> tuple[Floats, Floats]:
    """The partials of a site's streams, and what the exact kernels make of their sum."""
    partials = site.partials(rows)
    products, squares = site.expected_partials(site.fn[:rows], site.streams)
    partials[:, :, :rows], partials[:, :, partial_squares(rows)] = products, squares
    flat = site.streams.reshape(site.tokens, -1)
    size = np.sqrt((flat.astype(np.float64) ** 2).mean(1, keepdims=True) + RMS_EPS)
    return partials, ((flat / size) @ site.fn[:rows].T).astype(F32)


@pytest.mark.parametrize("binary", [0, 1])
@pytest.mark.parametrize(("tokens", "n", "hidden"), SHAPES)
def test_entering_a_site(tokens: int, n: int, hidden: int, binary: int) -> None:
    site = Site(tokens, n, hidden)
    partials, raw = mixed(site, rows_of(n))
    pre, post = np.empty((tokens, n), F32), np.empty((tokens, n), F32)
    comb, expected = np.empty((tokens, n, n), F32), np.empty((tokens, hidden), F32)
    hyper.split_mixes(pre, post, comb, raw, site.scale, site.base, ITERATIONS, F32(HC_EPS))
    hyper.collapse(expected, pre, site.streams)
    elementwise.rms_norm(expected, expected, site.weight, F32(RMS_EPS))
    x, mix = padded(np.zeros((tokens, hidden), F32)), np.zeros_like(site.mix)
    rounded = Rounded(tokens, hidden)

    def words(first: int, count: int) -> list[int]:
        return [
            *(address(partials[first:]), address(site.scale), address(site.base), ITERATIONS),
            *(float_bits(HC_EPS), address(site.streams[first:]), address(site.weight)),
            *(float_bits(RMS_EPS), address(x[first:]), stride(x), address(mix[first:])),
            *(*rounded.addresses(first), count, n, hidden, binary),
        ]

    run_all_ways(mixes.enter, tokens, [x, mix, *rounded.buffers], words)
    np.testing.assert_allclose(mix[:, :n], post, rtol=2e-5)
    np.testing.assert_allclose(mix[:, n:].reshape(comb.shape), comb, rtol=2e-5)
    np.testing.assert_allclose(x, expected, rtol=2e-4, atol=2e-5)
    rounded.assert_holds(x, binary=bool(binary))


@pytest.mark.parametrize("n", [4, 1, 8])
def test_entering_the_head(n: int) -> None:
    site = Site(3, n, 256)
    partials, raw = mixed(site, n)
    pre, expected = np.empty((3, n), F32), np.empty((3, 256), F32)
    hyper.head_mixes(pre, raw, site.scale[:1], site.base[:n], F32(HC_EPS))
    hyper.collapse(expected, pre, site.streams)
    elementwise.rms_norm(expected, expected, site.weight, F32(RMS_EPS))
    x = padded(np.zeros((3, 256), F32))

    def words(first: int, count: int) -> list[int]:
        return [
            *(address(partials[first:]), address(site.scale), address(site.base)),
            *(float_bits(HC_EPS), address(site.streams[first:]), address(site.weight)),
            *(float_bits(RMS_EPS), address(x[first:]), stride(x), 0, 0, 0, count, n, 256),
        ]

    run_all_ways(mixes.enter_head, 3, [x], words)
    np.testing.assert_allclose(x, expected, rtol=2e-4, atol=2e-5)
