"""Products of one token with packed weights equal float64 on the same rounded activations."""

import itertools
from collections.abc import Callable

import numba
import numpy as np
import pytest
import reference
from numpy.typing import NDArray
from reference_packed import (
    Floats,
    Quantised,
    address,
    aligned,
    distance,
    floats,
    quantise,
    random_weights,
    unpack_f8,
    weight_values,
)

from localv4.kernels import activations, float_rows, matvec, packed, probes
from localv4.kernels.buffers import aligned_bytes
from localv4.kernels.isa import ISA
from localv4.kernels.operation import WORDS
from localv4.kernels.packed import MX4, Q4, Q8, PackedFormat
from localv4.kernels.team import Team

pytestmark = pytest.mark.skipif(
    bool(numba.config.DISABLE_JIT), reason="kernels that take addresses need the compiler"
)

F32 = np.float32
FORMATS = (MX4, Q4, Q8)
MATVEC: dict[PackedFormat, Callable[..., None]] = {
    MX4: matvec.matvec_mx4,
    Q4: matvec.matvec_q4,
    Q8: matvec.matvec_q8,
}
GATE_UP: dict[PackedFormat, Callable[..., None]] = {
    MX4: matvec.expert_gate_up_mx4,
    Q4: matvec.expert_gate_up_q4,
    Q8: matvec.expert_gate_up_q8,
}
DOWN: dict[PackedFormat, Callable[..., None]] = {
    MX4: matvec.expert_down_mx4,
    Q4: matvec.expert_down_q4,
    Q8: matvec.expert_down_q8,
}
SHAPES = [(16, 128), (32, 256), (48, 640), (16, 4096)]
TOLERANCE = 1e-6
formats = pytest.mark.parametrize("fmt", FORMATS, ids=lambda fmt: fmt.name)


def quantised(x: Floats) -> Quantised:
    """The activations as the kernel quantises them, which the twin must confirm."""
    n = x.size
    q_bytes, d_bytes, b_bytes = activations.row_bytes(n)
    q = aligned_bytes(q_bytes).view(np.int8)[:n]
    d = aligned_bytes(d_bytes).view(F32)
    b = aligned_bytes(b_bytes).view(np.int32)
    activations.quantize(address(q), address(d), address(b), address(x), 0, n // 32, 0)
    return Quantised(q.reshape(1, -1), d.reshape(1, -1), b.reshape(1, -1, 4))


def operands(x: Quantised) -> tuple[int, int, int]:
    return address(x.q), address(x.d), address(x.b)


def inputs(kind: str, n: int) -> Floats:
    x = np.random.default_rng(n).standard_normal(n).astype(F32)
    if kind == "blocks of zeros":
        x.reshape(-1, 32)[::2] = 0
    if kind == "negative":
        x = -np.abs(x)
    if kind == "subnormal":
        x *= F32(1e-39)
    if kind == "one subnormal block":
        x[:32] *= F32(1e-39)
    if kind == "large":
        x *= F32(1e30)
    if kind == "constant":
        x[:] = 1
    return x


KINDS = (
    *("normal", "blocks of zeros", "negative", "subnormal"),
    *("one subnormal block", "large", "constant"),
)


@pytest.mark.parametrize("kind", KINDS)
def test_quantised_activations_equal_their_twin(kind: str) -> None:
    x = inputs(kind, 1024)
    mine, twin = quantised(x), quantise(x[None], ISA.code_bias, ISA.byte_bias)
    assert np.array_equal(mine.q, twin.q)
    assert np.array_equal(mine.d.view(np.uint32), twin.d.view(np.uint32))
    assert np.array_equal(mine.b, twin.b)
    if kind != "subnormal":
        assert distance(mine.values[0], x.astype(np.float64)) < 1e-2


def test_quantising_in_parts_is_the_same() -> None:
    x = inputs("normal", 512)
    whole, parts = quantised(x), quantised(np.zeros(512, F32))
    for first, end in ((5, 16), (0, 5)):
        activations.quantize(*operands(parts), address(x), first, end, 0)
    for name in ("q", "d", "b"):
        assert np.array_equal(getattr(whole, name), getattr(parts, name))


@formats
@pytest.mark.parametrize(("rows", "cols"), SHAPES)
def test_matvec(fmt: PackedFormat, rows: int, cols: int) -> None:
    weights, x = random_weights(rows, fmt, rows, cols), quantised(inputs("normal", cols))
    out = floats(rows)
    MATVEC[fmt](address(out), address(weights), 0, rows // 16, cols, *operands(x))
    assert distance(out, weight_values(fmt, weights, rows, cols) @ x.values[0]) < TOLERANCE


@formats
@pytest.mark.parametrize("kind", KINDS)
def test_matvec_of_any_activations(fmt: PackedFormat, kind: str) -> None:
    weights, x = random_weights(1, fmt, 32, 256), quantised(inputs(kind, 256))
    out = floats(32)
    MATVEC[fmt](address(out), address(weights), 0, 2, 256, *operands(x))
    expected = weight_values(fmt, weights, 32, 256) @ x.values[0]
    assert distance(out, expected) < (1e-2 if kind == "subnormal" else TOLERANCE)


@formats
def test_matvec_of_extreme_weights(fmt: PackedFormat) -> None:
    weights = random_weights(1, fmt, 32, 256)
    lines = weights.reshape(-1, fmt.superblock_bytes)
    for code in (0x00, 0x77, 0x80, 0xFF, 0x7F, 0x88):
        lines[:, 64:] = code
        for sign in (1, -1):
            x, out = quantised(sign * inputs("constant", 256)), floats(32)
            MATVEC[fmt](address(out), address(weights), 0, 2, 256, *operands(x))
            assert distance(out, weight_values(fmt, weights, 32, 256) @ x.values[0]) < TOLERANCE


@formats
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("at", [0, 17, 31])
def test_no_error_in_the_activations_is_lost(fmt: PackedFormat, bad: float, at: int) -> None:
    x = inputs("normal", 256)
    x[128 + at] = bad
    weights, spoilt, out = random_weights(1, fmt, 16, 256), quantised(x), floats(16, fill=0)
    MATVEC[fmt](address(out), address(weights), 0, 1, 256, *operands(spoilt))
    assert not np.isfinite(out).any()


@formats
def test_any_split_gives_the_same_bits(fmt: PackedFormat) -> None:
    rows, cols = 112, 384
    weights, x = random_weights(5, fmt, rows, cols), quantised(inputs("normal", cols))
    whole = floats(rows)
    MATVEC[fmt](address(whole), address(weights), 0, 7, cols, *operands(x))
    for cuts in ((0, 3, 7), (0, 1, 2, 6, 7), tuple(range(8))):
        split = floats(rows)
        for first, end in itertools.pairwise(cuts):
            MATVEC[fmt](address(split), address(weights), first, end, cols, *operands(x))
        assert np.array_equal(split, whole)
    untouched = floats(rows)
    MATVEC[fmt](address(untouched), address(weights), 2, 4, cols, *operands(x))
    assert np.isnan(untouched[:32]).all() and np.isnan(untouched[64:]).all()
    assert np.array_equal(untouched[32:64], whole[32:64])


@pytest.mark.parametrize(("rows", "cols"), [(16, 128), (48, 384), (160, 256)])
def test_f8_matvec_is_exact_in_the_weights(rows: int, cols: int) -> None:
    rng = np.random.default_rng(rows)
    weights = rng.integers(0, 256, rows * cols, dtype=np.uint8)
    weights[weights & 0x7F == 0x7F] = 3
    weights = aligned(weights)
    scale = np.ldexp(F32(1), rng.integers(-20, 3, (-(-rows // 128), cols // 128))).astype(F32)
    x, out = inputs("normal", cols), floats(rows)
    call = (cols, address(x), address(scale), 0)
    float_rows.matvec_f8(address(out), address(weights), 0, rows // 16, *call)
    wide = unpack_f8(weights, scale, rows, cols).astype(np.float64)
    assert distance(out, wide @ x) < TOLERANCE
    split = floats(rows)
    for g in range(rows // 16):
        float_rows.matvec_f8(address(split), address(weights), g, g + 1, *call)
    assert np.array_equal(split, out)


def test_f8_matvec_knows_every_code() -> None:
    cols = 256
    codes = np.zeros((16, cols), np.uint8)
    codes[:] = np.arange(256)
    codes[codes & 0x7F == 0x7F] = 0
    weights, scale = aligned(codes.T), np.ones((1, 2), F32)
    wide = unpack_f8(weights, scale, 16, cols)
    for column in range(cols):
        x, out = np.zeros(cols, F32), floats(16)
        x[column] = 1
        call = (cols, address(x), address(scale), 0)
        float_rows.matvec_f8(address(out), address(weights), 0, 1, *call)
        assert np.array_equal(out, wide[:, column])


@formats
def test_expert(fmt: PackedFormat) -> None:
    hidden, inner, limit, weight = 256, 128, F32(1.5), F32(0.37)
    gate, up, down = (
        random_weights(seed, fmt, *shape)
        for seed, shape in enumerate([(inner, hidden), (inner, hidden), (hidden, inner)])
    )
    size = packed.group_bytes(fmt, hidden)
    pairs = np.stack([gate.reshape(-1, size), up.reshape(-1, size)], axis=1)
    record = aligned(np.concatenate([pairs.reshape(-1), down]))
    assert record.size == packed.expert_bytes(fmt, hidden, inner)

    x, h = quantised(20 * inputs("normal", hidden)), floats(inner)
    for first, end in ((0, 3), (3, 8)):
        GATE_UP[fmt](address(h), address(record), first, end, hidden, *operands(x), limit)
    products = [weight_values(fmt, part, inner, hidden) @ x.values[0] for part in (gate, up)]
    assert max(np.abs(products[0])) > limit and max(np.abs(products[1])) > limit
    assert distance(h, reference.swiglu(products[0], products[1], float(limit))) < 2e-6

    middle, out = quantised(h), floats(hidden)
    before = inputs("normal", hidden)
    out[:] = before
    at = address(record) + packed.down_offset(fmt, hidden, inner)
    for first, end in ((0, 5), (5, 16)):
        DOWN[fmt](address(out), at, first, end, inner, *operands(middle), weight)
    product = weight_values(fmt, down, hidden, inner) @ middle.values[0]
    assert distance(out, before + float(weight) * product) < TOLERANCE


@formats
def test_expert_passes_nan_on(fmt: PackedFormat) -> None:
    x = inputs("normal", 256)
    x[7] = np.nan
    record, spoilt, h = random_weights(1, fmt, 32, 256), quantised(x), floats(16, fill=0)
    GATE_UP[fmt](address(h), address(record), 0, 1, 256, *operands(spoilt), F32(10))
    assert np.isnan(h).all()


@pytest.mark.parametrize("members", [1, 3])
def test_read_roof_reads_everything(members: int) -> None:
    data = np.random.default_rng(1).integers(0, 1000, 8 * 128, dtype=np.int32)
    raw = aligned(data)
    sums = run_probe(members, probes.read_roof.address, address(raw), 512, raw.size // 512)
    assert sums.sum() == data.sum()


def test_dot_roof_does_what_it_counts() -> None:
    raw = np.random.default_rng(1).integers(0, 4, probes.DOT_ROOF_BYTES, dtype=np.uint8)
    lines, placed = raw.reshape(-1, 64).astype(int), aligned(raw)
    weights, columns = lines[:16], lines[16:]
    for rounds in (1, 16, 37):
        used = weights[np.arange(rounds) % 16]
        sums = run_probe(2, probes.dot_roof.address, address(placed), rounds)
        assert (sums[:, 0] == (used @ columns.T).sum()).all()
        assert probes.dot_roof_operations(rounds) == used.size * len(columns) * 2


def run_probe(members: int, *words: int) -> NDArray[np.int64]:
    """Run an operation whose last word is where the sums go; return them."""
    sums, program = np.zeros((members, 8), np.int64), np.zeros((1, WORDS), np.int64)
    program[0, : len(words) + 1] = (*words, sums.ctypes.data)
    team = Team(members)
    team.run(program)
    team.close()
    return sums
