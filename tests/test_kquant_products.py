"""Products with the packed formats of superblocks equal float64 on the same rounded activations."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numba
import numpy as np
import pytest
import reference
from reference_blocks import HALVES, TWINS, iq2_xxs, random_blocks
from reference_packed import Bytes, Floats, Wide, address, distance, floats

from localv4.kernels import (
    activations,
    gemm,
    iquants,
    kquant_panels,
    kquant_products,
    kquants,
    packed,
    packing_kquants,
)
from localv4.kernels.buffers import aligned_bytes
from localv4.kernels.compiler import Entry, entry
from localv4.kernels.device import device
from localv4.kernels.kquant_operations import DOWN, GATE_UP, MATVEC
from localv4.kernels.operation import WORDS, float_bits, word
from localv4.kernels.packed import PackedFormat
from localv4.kernels.packed_kquants import IQ2, Q2, Q3, Q4K, Q6, SUPERBLOCK
from localv4.kernels.single_token import ROW_GAP, quantize
from localv4.kernels.team import Team

pytestmark = pytest.mark.skipif(
    bool(numba.config.DISABLE_JIT), reason="kernels that take addresses need the compiler"
)

F32 = np.float32
TOLERANCE = 1e-6
ONE, THREE = Team(1), Team(3)


@device
def share_sums(operation: int, sums: Any) -> None:
    """Words: the arguments of `sums`."""
    a, b, c = word(operation, 1), word(operation, 2), word(operation, 3)
    d, e, f = word(operation, 4), word(operation, 5), word(operation, 6)
    g, h, i = word(operation, 7), word(operation, 8), word(operation, 9)
    sums(a, b, c, d, e, f, g, h, i, word(operation, 10))


@entry("test")
def q4k_sums(operation: int, member: int, members: int) -> None:
    """`share_sums`"""
    share_sums(operation, kquant_products.sums_q4k)


@entry("test")
def q4k_many_sums(operation: int, member: int, members: int) -> None:
    """`share_sums`"""
    share_sums(operation, kquant_panels.sums_q4k)


@entry("test")
def q6_sums(operation: int, member: int, members: int) -> None:
    """`share_sums`"""
    share_sums(operation, kquant_products.sums_q6)


@entry("test")
def q6_many_sums(operation: int, member: int, members: int) -> None:
    """`share_sums`"""
    share_sums(operation, kquant_panels.sums_q6)


@entry("test")
def q3_sums(operation: int, member: int, members: int) -> None:
    """`share_sums`"""
    share_sums(operation, kquant_products.sums_q3)


@entry("test")
def q3_many_sums(operation: int, member: int, members: int) -> None:
    """`share_sums`"""
    share_sums(operation, kquant_panels.sums_q3)


@entry("test")
def q2_sums(operation: int, member: int, members: int) -> None:
    """`share_sums`"""
    share_sums(operation, kquant_products.sums_q2)


@entry("test")
def q2_many_sums(operation: int, member: int, members: int) -> None:
    """`share_sums`"""
    share_sums(operation, kquant_panels.sums_q2)


@entry("test")
def iq2_sums(operation: int, member: int, members: int) -> None:
    """`share_sums`"""
    share_sums(operation, kquant_products.sums_iq2)


@entry("test")
def iq2_many_sums(operation: int, member: int, members: int) -> None:
    """`share_sums`"""
    share_sums(operation, kquant_panels.sums_iq2)


@dataclass(frozen=True)
class Case:
    """A packed format, its ggml type, and what is not found by the format."""

    fmt: PackedFormat
    ggml: str
    block_bytes: int
    pack: Callable[..., int]
    few: Entry
    many: Entry


CASES = (
    Case(Q4K, "Q4_K", kquants.Q4_K_BYTES, packing_kquants.pack_q4_k, q4k_sums, q4k_many_sums),
    Case(Q6, "Q6_K", kquants.Q6_K_BYTES, packing_kquants.pack_q6_k, q6_sums, q6_many_sums),
    Case(Q3, "Q3_K", kquants.Q3_K_BYTES, packing_kquants.pack_q3_k, q3_sums, q3_many_sums),
    Case(Q2, "Q2_K", kquants.Q2_K_BYTES, packing_kquants.pack_q2_k, q2_sums, q2_many_sums),
    Case(
        IQ2, "IQ2_XXS", iquants.IQ2_XXS_BYTES, packing_kquants.pack_iq2_xxs, iq2_sums, iq2_many_sums
    ),
)
formats = pytest.mark.parametrize("case", CASES, ids=lambda case: case.fmt.name)


def run(team: Team, function: Entry, *words: int) -> None:
    """Run a program of one operation."""
    program = np.zeros((1, WORDS), np.int64)
    program[0, : len(words) + 1] = (function.address, *words)
    team.run(program)


@dataclass
class Rounded:
    """Activations of some tokens, as the kernels get them."""

    q: Bytes
    d: Bytes
    b: Bytes
    tokens: int
    cols: int

    def operands(self, token: int = 0) -> tuple[int, int, int]:
        """The addresses of the activations from a token on."""
        rows = activations.q_row, activations.d_row, activations.b_row
        starts = (address(part) for part in (self.q, self.d, self.b))
        q, d, b = (at + token * row(self.cols) for at, row in zip(starts, rows, strict=True))
        return q, d, b

    @property
    def values(self) -> Wide:
        """What the integers and scales stand for (tokens, cols)."""
        codes = self.q.view(np.int8).reshape(-1, activations.q_row(self.cols))[: self.tokens]
        scales = self.d.view(F32).reshape(-1, self.cols // 32)[: self.tokens].astype(np.float64)
        codes = codes[:, : self.cols]
        return codes.astype(np.float64) * np.repeat(scales, 32, axis=1)


def rounded(x: Floats, spare: int = 0) -> Rounded:
    """The activations of x, and room for some that may be read and are not used."""
    tokens, cols = x.shape
    rows = activations.q_row, activations.d_row, activations.b_row
    q, d, b = (aligned_bytes((tokens + spare) * row(cols)) for row in rows)
    result = Rounded(q, d, b, tokens, cols)
    words = (address(x), cols, 0, tokens, cols, *result.operands())
    run(ONE, quantize, *words)
    return result


def inputs(kind: str, tokens: int, cols: int) -> Floats:
    x = floats(tokens, cols)
    x[:] = np.random.default_rng(cols + tokens).standard_normal((tokens, cols))
    if kind == "blocks of zeros":
        x.reshape(-1, 32)[::2] = 0
    if kind == "negative":
        x[:] = -np.abs(x)
    if kind == "constant":
        x[:] = 1
    return x


def halves_of(blocks: Bytes, ggml: str) -> Bytes:
    """The bytes of the f16 numbers of blocks (n, 2 * count), a view."""
    first = HALVES[ggml][0]
    return blocks[:, first : first + 2 * len(HALVES[ggml])]


def random_ggml(case: Case, seed: int, rows: int, cols: int) -> Bytes:
    """Random blocks with superblock scales of ordinary size (rows, bytes of a row)."""
    rng = np.random.default_rng(seed)
    count = rows * cols // SUPERBLOCK
    blocks = random_blocks(rng, case.ggml, count, case.block_bytes)
    scales = halves_of(blocks, case.ggml)
    sizes = rng.uniform(1e-4, 4e-4, (count, scales.shape[1] // 2))
    scales[...] = sizes.astype("<f2").view(np.uint8)
    return blocks.reshape(rows, -1)


def values(case: Case, data: Bytes) -> Floats:
    """The values of ggml rows (rows, cols)."""
    blocks = data.reshape(-1, case.block_bytes)
    lattice = case.fmt is IQ2
    decoded = iq2_xxs(blocks, iquants.GRID) if lattice else TWINS[case.ggml](blocks)
    return decoded.reshape(data.shape[0], -1)


def packed_matrix(case: Case, data: Bytes, cols: int) -> Bytes:
    rows = len(data)
    out = aligned_bytes(packed.packed_bytes(case.fmt, rows, cols))
    for first, end in ((0, 1), (1, rows // 16)):
        assert case.pack(out, data.reshape(-1), cols, first, end, 1) == 0
    return out


def multiply(case: Case, weights: Bytes, rows: int, x: Rounded, token: int = 0) -> Floats:
    """The mat-vec of a token."""
    out = floats(rows)
    words = (address(weights), rows // 16, x.cols, *x.operands(token), address(out))
    run(ONE, MATVEC[case.fmt], *words)
    return out


def exact(case: Case, data: Bytes, x: Rounded) -> Wide:
    """Products in float64 (tokens, rows)."""
    return x.values @ values(case, data).astype(np.float64).T


@formats
@pytest.mark.parametrize(("rows", "cols"), [(16, 256), (48, 768), (16, 4096)])
def test_matvec(case: Case, rows: int, cols: int) -> None:
    data, x = random_ggml(case, rows, rows, cols), rounded(inputs("normal", 1, cols))
    out = multiply(case, packed_matrix(case, data, cols), rows, x)
    assert distance(out, exact(case, data, x)[0]) < TOLERANCE


@formats
@pytest.mark.parametrize("fill", [0x00, 0x7F, 0x80, 0xFF])
@pytest.mark.parametrize("sign", [1, -1])
def test_matvec_of_extreme_weights(case: Case, fill: int, sign: int) -> None:
    data = random_ggml(case, 1, 32, 512)
    scales = halves_of(data.reshape(-1, case.block_bytes), case.ggml).copy()
    data[:] = fill
    halves_of(data.reshape(-1, case.block_bytes), case.ggml)[...] = scales
    x = rounded(F32(sign) * inputs("constant", 1, 512))
    out = multiply(case, packed_matrix(case, data, 512), 32, x)
    assert distance(out, exact(case, data, x)[0]) < TOLERANCE


@formats
@pytest.mark.parametrize("kind", ["blocks of zeros", "negative"])
def test_matvec_of_any_activations(case: Case, kind: str) -> None:
    data, x = random_ggml(case, 3, 16, 512), rounded(inputs(kind, 1, 512))
    out = multiply(case, packed_matrix(case, data, 512), 16, x)
    assert distance(out, exact(case, data, x)[0]) < TOLERANCE


@formats
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_no_error_in_the_activations_is_lost(case: Case, bad: float) -> None:
    x = inputs("normal", 1, 512)
    x[0, 300] = bad
    weights = packed_matrix(case, random_ggml(case, 1, 16, 512), 512)
    assert not np.isfinite(multiply(case, weights, 16, rounded(x))).any()


@formats
def test_members_and_neighbours_change_no_bits(case: Case) -> None:
    rows, cols = 208, 512
    weights = packed_matrix(case, random_ggml(case, 5, rows, cols), cols)
    x, out = rounded(inputs("normal", 1, cols)), floats(rows)
    whole, size = multiply(case, weights, rows, x), weights.size // (rows // 16)
    words = (address(weights), rows // 16, cols, *x.operands(), address(out))
    run(THREE, MATVEC[case.fmt], *words)
    assert np.array_equal(out, whole)
    alone = multiply(case, weights[4 * size : 5 * size], 16, x)
    assert np.array_equal(alone, whole[64:80])


@formats
@pytest.mark.parametrize("kind", ["few", "many"])
@pytest.mark.parametrize(("rows", "first", "count"), [(80, 0, 1), (64, 3, 4), (96, 2, 13)])
def test_many_tokens_have_the_bits_of_one(
    case: Case, kind: str, rows: int, first: int, count: int
) -> None:
    cols, function = 512, case.few if kind == "few" else case.many
    weights = packed_matrix(case, random_ggml(case, rows, rows, cols), cols)
    x = rounded(inputs("normal", first + count, cols), gemm.SPARE_TOKENS)
    for panel in range(gemm.panels(rows)):
        scratch = floats(gemm.SCRATCH_BYTES // 4)
        words = (address(weights), panel, rows // 16, cols, *x.operands(), first, count)
        run(ONE, function, address(scratch), *words)
        for t in range(count):
            expected = multiply(case, weights, rows, x, first + t)[64 * panel : 64 * panel + 64]
            assert np.array_equal(scratch[64 * t : 64 * t + expected.size], expected)


def expert(case: Case, hidden: int, inner: int) -> tuple[list[Bytes], Bytes]:
    """The ggml rows of gate, up and down, and the packed record."""
    shapes = ((inner, hidden), (inner, hidden), (hidden, inner))
    parts = [random_ggml(case, seed, *shape) for seed, shape in enumerate(shapes)]
    size = packed.group_bytes(case.fmt, hidden)
    record = aligned_bytes(packed.expert_bytes(case.fmt, hidden, inner))
    places = (record, record[size:], record[packed.down_offset(case.fmt, hidden, inner) :])
    for out, part, (rows, cols), step in zip(places, parts, shapes, (2, 2, 1), strict=True):
        assert case.pack(out, part.reshape(-1), cols, 0, rows // 16, step) == 0
    return parts, record


@formats
@pytest.mark.parametrize("team", [ONE, THREE], ids=["1", "3"])
def test_expert(case: Case, team: Team) -> None:
    hidden, inner, shares = 512, 256, np.array([0.5, -0.25], F32)
    parts, record = expert(case, hidden, inner)
    records = np.array([address(record)] * len(shares))
    x, h = rounded(inputs("normal", 1, hidden)), floats(len(shares), inner + ROW_GAP)
    gate, up = (exact(case, part, x)[0] for part in parts[:2])
    limit = float(np.quantile(np.abs(gate), 0.8))
    words = (address(records), len(shares), inner // 16, hidden, *x.operands())
    run(team, GATE_UP[case.fmt], *words, address(h), float_bits(limit))
    for row in h:
        assert distance(row[:inner], reference.swiglu(gate, up, limit)) < 3e-6

    middles, out = floats(len(shares), inner), floats(hidden)
    middles[:] = [h[0, :inner], -2 * h[1, :inner]]
    middle = rounded(middles)
    words = (address(records), len(shares), hidden // 16, inner, *middle.operands())
    offset = packed.down_offset(case.fmt, hidden, inner)
    run(team, DOWN[case.fmt], *words, address(out), address(shares), offset)
    products = exact(case, parts[2], middle)
    assert distance(out, shares.astype(np.float64) @ products) < TOLERANCE
