"""Products of several tokens: exact on rounded activations, the same bits in any company."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numba
import numpy as np
import pytest
import reference
from numpy.typing import NDArray
from reference_packed import (
    Bytes,
    Floats,
    Wide,
    address,
    aligned,
    distance,
    floats,
    quantise,
    random_weights,
    weight_values,
)

from localv4.kernels import activations, gemm, gemm_f8, matvec, packed, panels, small_batches, tiles
from localv4.kernels.buffers import aligned_bytes
from localv4.kernels.isa import ISA
from localv4.kernels.packed import MX4, Q4, Q8, PackedFormat
from localv4.kernels.panels import COARSE, FINE
from localv4.kernels.simd_blocks import MOST_SHIFT

pytestmark = pytest.mark.skipif(
    bool(numba.config.DISABLE_JIT), reason="kernels that take addresses need the compiler"
)

F32 = np.float32
TOLERANCE = 1e-6
Kernel = Callable[..., None]


@dataclass(frozen=True)
class Kernels:
    """The products of one format: of one token, of a few, and of many."""

    fmt: PackedFormat
    one: Kernel
    gate_up: Kernel
    down: Kernel
    few: Kernel
    many: Kernel


MX4_KERNELS = Kernels(
    MX4,
    matvec.matvec_mx4,
    matvec.expert_gate_up_mx4,
    matvec.expert_down_mx4,
    small_batches.few_sums_mx4,
    gemm.sums_mx4,
)
Q4_KERNELS = Kernels(
    Q4,
    matvec.matvec_q4,
    matvec.expert_gate_up_q4,
    matvec.expert_down_q4,
    small_batches.few_sums_q4,
    gemm.sums_q4,
)
Q8_KERNELS = Kernels(
    Q8,
    matvec.matvec_q8,
    matvec.expert_gate_up_q8,
    matvec.expert_down_q8,
    small_batches.few_sums_q8,
    gemm.sums_q8,
)
all_formats = pytest.mark.parametrize(
    "kernels", [MX4_KERNELS, Q4_KERNELS, Q8_KERNELS], ids=lambda kernels: kernels.fmt.name
)
LIMIT = F32(1.5)


def normal(seed: int, *shape: int) -> Floats:
    return np.random.default_rng(seed).standard_normal(shape).astype(F32)


class Rows:
    """Activations of tokens, row after row, as the mat-vec takes them, and a choice of them."""

    def __init__(self, x: Floats, rows: Sequence[int] | None = None) -> None:
        self.rows = np.arange(len(x)) if rows is None else np.array(rows)
        self.count, self.cols = len(self.rows), x.shape[1]
        self.q = aligned_bytes(x.size)
        self.d = aligned_bytes(activations.scale_bytes(x.size))
        self.b = aligned_bytes(activations.sum_bytes(x.size))
        source = np.ascontiguousarray(x)
        activations.quantize(*self.at(0), address(source), 0, x.size // 32)

    def at(self, token: int) -> tuple[int, int, int]:
        q, d, b = address(self.q), address(self.d), address(self.b)
        n = token * self.cols
        return q + n, d + activations.scale_bytes(n), b + activations.sum_bytes(n)

    @property
    def operands(self) -> tuple[int, ...]:
        return *self.at(0), address(self.rows)


class Tiles:
    """Activations of the tokens x[rows] as the large products take them."""

    def __init__(self, x: Floats, span: int, rows: Sequence[int] | None = None) -> None:
        self.rows = np.arange(len(x)) if rows is None else np.array(rows)
        self.count, self.cols = len(self.rows), x.shape[1]
        self.q = aligned_bytes(panels.q_bytes(self.count, self.cols))
        self.d = aligned_bytes(panels.d_bytes(self.count, self.cols))
        self.s = aligned_bytes(panels.s_bytes(self.count, self.cols))
        source = np.ascontiguousarray(x)
        total = panels.tiles(self.count)
        for first, end in ((total // 2, total), (0, total // 2)):
            panels.quantize_tiles(
                *(*self.operands, address(source), address(self.rows), self.count, self.cols),
                *(span, first, end),
            )

    @property
    def operands(self) -> tuple[int, ...]:
        return address(self.q), address(self.d), address(self.s)


def each_panel(
    kernel: Kernel, weights: int, groups: int, x: Rows | Tiles, use: Callable[..., None]
) -> None:
    """Multiply and call use(scratch, panel, groups, first, count) for each panel and batch."""
    for panel in reversed(range(gemm.panels(16 * groups))):
        for first in range(0, x.count, gemm.BATCH_TOKENS):
            count = min(gemm.BATCH_TOKENS, x.count - first)
            memory = aligned_bytes(gemm.SCRATCH_BYTES)
            memory[:] = 0xFF  # NaN, which nothing may read
            place = address(memory)
            kernel(place, weights, panel, groups, x.cols, *x.operands, first, count)
            use(place, panel, groups, first, count)


def multiply(kernel: Kernel, weights: Bytes, rows: int, x: Rows | Tiles) -> Floats:
    """The product of a matrix with several tokens."""
    out = floats(x.count, rows)

    def store(*call: int) -> None:
        gemm.store_sums(address(out), 4 * rows, *call)

    each_panel(kernel, address(weights), rows // 16, x, store)
    return out


def hidden_layer(kernel: Kernel, record: Bytes, inner: int, x: Rows | Tiles) -> Floats:
    """silu(gate) * up of an expert for several tokens."""
    h = floats(x.count, inner)

    def store(*call: int) -> None:
        gemm.store_gated_sums(address(h), 4 * inner, *call, LIMIT)

    each_panel(kernel, address(record), 2 * inner // 16, x, store)
    return h


def add_down(
    out: Floats,
    kernel: Kernel,
    weights: int,
    x: Rows | Tiles,
    targets: NDArray[np.int64],
    shares: Floats,
) -> None:
    """Add the weighted results of an expert to the rows `targets` of out."""
    hidden = out.shape[1]

    def add(*call: int) -> None:
        lists = (address(targets), address(shares))
        gemm.add_weighted_sums(address(out), 4 * hidden, *call, *lists)

    each_panel(kernel, weights, hidden // 16, x, add)


def one_by_one(kernels: Kernels, weights: Bytes, rows: int, x: Floats) -> Floats:
    """The mat-vec of each token."""
    out, given = floats(len(x), rows), Rows(x)
    for t in range(len(x)):
        at = address(out) + 4 * rows * t
        kernels.one(at, address(weights), 0, rows // 16, x.shape[1], *given.at(t))
    return out


SHAPES = [(16, 128, 1), (80, 384, 13), (64, 1280, 7), (144, 128, 250)]


@all_formats
@pytest.mark.parametrize(("rows", "cols", "tokens"), SHAPES)
def test_many_tokens_have_the_bits_of_one(
    kernels: Kernels, rows: int, cols: int, tokens: int
) -> None:
    weights, x = random_weights(rows, kernels.fmt, rows, cols), normal(cols, tokens, cols)
    expected = one_by_one(kernels, weights, rows, x)
    assert np.array_equal(multiply(kernels.many, weights, rows, Tiles(x, FINE)), expected)


@all_formats
@pytest.mark.parametrize("tokens", [1, 2, 3, 4, 5, 8])
def test_a_few_tokens_have_the_bits_of_one(kernels: Kernels, tokens: int) -> None:
    rows, cols = 80, 256
    weights, x = random_weights(1, kernels.fmt, rows, cols), normal(2, tokens + 2, cols)
    order = np.random.default_rng(tokens).permutation(tokens + 2)[:tokens].tolist()
    expected = one_by_one(kernels, weights, rows, x[order])
    assert np.array_equal(multiply(kernels.few, weights, rows, Rows(x, order)), expected)


@pytest.mark.parametrize("kernels", [Q4_KERNELS, Q8_KERNELS], ids=["Q4", "Q8"])
def test_columns_may_be_a_multiple_of_64(kernels: Kernels) -> None:
    weights, x = random_weights(1, kernels.fmt, 32, 192), normal(2, 7, 192)
    product = multiply(kernels.many, weights, 32, Tiles(x, FINE))
    assert np.array_equal(product, one_by_one(kernels, weights, 32, x))


@all_formats
@pytest.mark.parametrize("tokens", [1, 3, 8])
def test_expert_of_several_tokens(kernels: Kernels, tokens: int) -> None:
    hidden, inner = 256, 96 + 32 * (kernels.fmt is MX4)
    record = aligned(
        np.concatenate(
            [
                random_weights(1, kernels.fmt, 2 * inner, hidden),
                random_weights(2, kernels.fmt, hidden, 128),
            ]
        )
    )
    offset = packed.down_offset(kernels.fmt, hidden, inner)
    x = 10 * normal(1, 2 * tokens, hidden)
    chosen = np.arange(2 * tokens)[::-2].copy()
    weights = np.abs(normal(3, tokens))
    h, out = expert_one_by_one(kernels, record, offset, inner, x, chosen, weights)
    for kernel, given in (
        (kernels.few, Rows(x, chosen.tolist())),
        (kernels.many, Tiles(x, FINE, chosen.tolist())),
    ):
        middle = hidden_layer(kernel, record, inner, given)
        assert np.array_equal(middle, h)
        middle = np.pad(middle, ((0, 0), (0, 128 - inner)))
        result = floats(*x.shape, fill=1)
        given = Rows(middle) if kernel is kernels.few else Tiles(middle, FINE)
        add_down(result, kernel, address(record) + offset, given, chosen, weights)
        assert np.array_equal(result, out)


def expert_one_by_one(
    kernels: Kernels,
    record: Bytes,
    offset: int,
    inner: int,
    x: Floats,
    chosen: NDArray[np.int64],
    weights: Floats,
) -> tuple[Floats, Floats]:
    """The hidden layer of the chosen tokens, and 1 + their weighted results at their places."""
    hidden = x.shape[1]
    h, out, given = floats(len(chosen), inner), floats(*x.shape, fill=1), Rows(x)
    for i, t in enumerate(chosen.tolist()):
        at = address(h) + 4 * inner * i
        kernels.gate_up(at, address(record), 0, inner // 16, hidden, *given.at(t), LIMIT)
    middle = Rows(np.pad(h, ((0, 0), (0, 128 - inner))))
    for i, t in enumerate(chosen.tolist()):
        at = address(out) + 4 * hidden * t
        place = address(record) + offset
        kernels.down(at, place, 0, hidden // 16, 128, *middle.at(i), weights[i])
    return h, out


def random_f8(seed: int, rows: int, cols: int) -> tuple[Bytes, Floats]:
    """Packed E4M3 codes that are numbers, and their scales."""
    rng = np.random.default_rng(seed)
    codes = rng.integers(0, 256, rows * cols, dtype=np.uint8)
    codes[codes & 0x7F == 0x7F] = 3
    scale = np.exp2(rng.integers(-12, 3, (-(-rows // 128), cols // 128))).astype(F32)
    return aligned(codes), scale


@pytest.mark.parametrize(("rows", "cols", "tokens"), [*SHAPES, (272, 256, 5)])
def test_f8_has_the_bits_of_one_token(rows: int, cols: int, tokens: int) -> None:
    (weights, scale), x = random_f8(rows, rows, cols), normal(cols, tokens + 1, cols)
    order = np.arange(tokens + 1)[:0:-1].copy()
    tiled = aligned_bytes(gemm_f8.x_bytes(tokens, cols))
    source = (address(tiled), address(x), address(order), tokens, cols)
    total = panels.tiles(tokens)
    for first, end in ((total // 2, total), (0, total // 2)):
        gemm_f8.copy_tiles(*source, first, end)
    out, memory = floats(tokens, rows), aligned_bytes(gemm.SCRATCH_BYTES)
    for panel in reversed(range(gemm.panels(rows))):
        for first in range(0, tokens, gemm.BATCH_TOKENS):
            count = min(gemm.BATCH_TOKENS, tokens - first)
            memory[:] = 0xFF
            place = (address(memory), address(weights), panel, rows // 16, cols)
            gemm_f8.sums_f8(*place, address(tiled), address(scale), first, count)
            gemm.store_sums(
                *(address(out), 4 * rows, address(memory), panel, rows // 16, first, count)
            )
    for i, t in enumerate(order.tolist()):
        expected = floats(rows)
        at = address(x) + 4 * cols * t
        matvec.matvec_f8(
            *(address(expected), address(weights), 0, rows // 16, cols, at, address(scale))
        )
        assert np.array_equal(out[i], expected)


# --- coarse activations and merged segments ---


def rounded(x: Floats) -> Wide:
    """What coarse activations stand for: int8 with a scale for each 128."""
    return np.array([quantise_128(row) for row in x])


def quantise_128(row: Floats) -> Wide:
    parts = row.reshape(-1, 128)
    size = np.maximum(np.abs(parts).max(axis=1, keepdims=True), F32(1e-30))
    q = np.rint(parts * (F32(127) / size)).astype(np.float64)
    return (q * (size * F32(1 / 127))).reshape(-1)


def weights_of_spread(seed: int, rows: int, cols: int, spread: int) -> Bytes:
    """MX4 with exponents up to `spread` apart in each row of a superblock, and that far in one."""
    weights = random_weights(seed, MX4, rows, cols)
    heads = weights.reshape(-1, 1088)[:, :64].reshape(-1, 4, 16)
    heads[...] = np.random.default_rng(seed).integers(118 - spread, 119, heads.shape)
    heads[:, 0, 3], heads[:, 2, 3] = 118, 118 - spread
    return weights


def segments_of(weights: Bytes, groups: int, superblocks: int) -> list[int]:
    """The number of segments into which the superblocks of the first tile's groups are expanded."""
    lines = aligned_bytes(superblocks * 32 * tiles.LINE)
    scales, counts = aligned_bytes(superblocks * 4 * tiles.LINE), np.zeros(superblocks, np.int64)
    width = min(groups, tiles.TILE_GROUPS)
    size = superblocks * 1088
    at = (address(lines), address(scales), address(counts))
    panels.expand_mx4(*at, address(weights), size, width, superblocks)
    return counts.tolist()


@pytest.mark.parametrize("spread", [0, 1, MOST_SHIFT, MOST_SHIFT + 1, 7, 30, 117])
@pytest.mark.parametrize(("rows", "cols", "tokens"), [(64, 256, 13), (48, 1280, 3)])
def test_coarse_products_are_exact_for_any_exponents(
    rows: int, cols: int, tokens: int, spread: int
) -> None:
    weights, x = weights_of_spread(rows, rows, cols, spread), normal(cols, tokens, cols)
    segments = segments_of(weights, rows // 16, cols // 128)
    assert segments == [1 if spread <= MOST_SHIFT else 4] * (cols // 128)
    product = multiply(gemm.sums_mx4_coarse, weights, rows, Tiles(x, COARSE))
    wide = weight_values(MX4, weights, rows, cols)
    for t in range(tokens):
        assert distance(product[t], wide @ quantise_128(x[t])) < TOLERANCE


def test_narrow_and_wide_superblocks_side_by_side() -> None:
    rows, cols = 64, 512
    weights, x = weights_of_spread(1, rows, cols, MOST_SHIFT), normal(2, 7, cols)
    for group in range(4):
        superblock = weights.reshape(4, 4, 1088)[group, 2]
        superblock[16 + 5] = superblock[32 + 5] - MOST_SHIFT - 1
    assert segments_of(weights, 4, 4) == [1, 1, 4, 1]
    product = multiply(gemm.sums_mx4_coarse, weights, rows, Tiles(x, COARSE))
    wide = weight_values(MX4, weights, rows, cols)
    assert max(distance(product[t], wide @ quantise_128(x[t])) for t in range(7)) < TOLERANCE


@pytest.mark.parametrize("spread", [MOST_SHIFT, 7])
def test_coarse_products_do_not_depend_on_company(spread: int) -> None:
    rows, cols, tokens = 144, 256, 251
    weights, x = weights_of_spread(1, rows, cols, spread), normal(2, tokens, cols)
    together = multiply(gemm.sums_mx4_coarse, weights, rows, Tiles(x, COARSE))
    for some in ([0], [250, 3], list(range(100, 107)), list(range(251))[::-1]):
        apart = multiply(gemm.sums_mx4_coarse, weights, rows, Tiles(x, COARSE, some))
        assert np.array_equal(apart, together[some])


def test_coarse_expert() -> None:
    hidden, inner, tokens = 256, 64, 9
    gate_up, x = random_weights(1, MX4, 2 * inner, hidden), 10 * normal(1, tokens, hidden)
    h = hidden_layer(gemm.sums_mx4_coarse, gate_up, inner, Tiles(x, COARSE))
    pairs = weight_values(MX4, gate_up, 2 * inner, hidden).reshape(-1, 2, 16, hidden)
    gate, up = (rounded(x) @ pairs[:, i].reshape(inner, hidden).T for i in range(2))
    assert distance(h, reference.swiglu(gate, up, float(LIMIT))) < 2e-6

    down, out = random_weights(2, MX4, hidden, 128), floats(12, hidden, fill=2)
    middle, shares = normal(3, tokens, 128), normal(4, tokens)
    targets = np.arange(12)[::-1][:tokens].copy()
    given = Tiles(middle, COARSE)
    add_down(out, gemm.sums_mx4_coarse, address(down), given, targets, shares)
    product = rounded(middle) @ weight_values(MX4, down, hidden, 128).T
    expected = np.full((12, hidden), 2.0)
    expected[targets] += shares[:, None].astype(np.float64) * product
    assert distance(out, expected) < TOLERANCE


# --- activations in tiles ---


@pytest.mark.parametrize("span", [FINE, COARSE])
@pytest.mark.parametrize("tokens", [1, 6, 8])
def test_tiles_hold_the_quantised_tokens(span: int, tokens: int) -> None:
    cols, width = 256, tiles.TILE_TOKENS
    x = normal(tokens, 10, cols)
    x[3, :40] = 0
    x[4] *= F32(1e-35)
    order = np.random.default_rng(tokens).permutation(10)[:tokens].tolist()
    given = Tiles(x, span, order)
    total = panels.tiles(tokens)
    q = given.q.view(np.int8).reshape(total, cols // 4, width, 4)
    q = q.transpose(0, 2, 1, 3).reshape(total * width, cols)
    d = given.d.view(F32).reshape(total, cols // 32, width).transpose(0, 2, 1).reshape(-1, 8)
    s = given.s.view(np.int32).reshape(total, cols // 32 + 1, width).transpose(0, 2, 1)
    s = s.reshape(-1, 9)
    assert not q[tokens:].any() and not d[tokens:].any() and not s[tokens:].any()
    if span == FINE:
        twin = quantise(x[order], 0, 0)
        assert np.array_equal(q[:tokens], twin.q) and np.array_equal(d[:tokens], twin.d)
    values = q[:tokens] * np.repeat(d[:tokens].astype(np.float64), 32, axis=1)
    expected = rounded(x[order]) if span == COARSE else quantise(x[order], 0, 0).values
    assert np.array_equal(values, expected)
    sums = q.reshape(len(q), -1, 32).astype(int).sum(axis=2)
    assert np.array_equal(s[:, 1:] - s[:, :-1], sums) and not s[:, 0].any()


@pytest.mark.parametrize("bad", [np.nan, np.inf])
@pytest.mark.parametrize("coarse", [False, True])
def test_no_error_in_the_activations_is_lost(bad: float, coarse: bool) -> None:
    x = normal(1, 3, 256)
    x[1, 77] = bad
    weights = random_weights(1, MX4, 32, 256)
    kernel = gemm.sums_mx4_coarse if coarse else gemm.sums_mx4
    product = multiply(kernel, weights, 32, Tiles(x, COARSE if coarse else FINE))
    assert not np.isfinite(product[1]).any()
    assert np.isfinite(product[[0, 2]]).all()


def test_the_shift_fits_the_instructions() -> None:
    largest = 2 * (12 << MOST_SHIFT)
    if ISA.level == "avx2":
        assert 2 * largest * 127 < 2**15
    else:
        assert largest < 256
