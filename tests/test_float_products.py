"""Products with float weights: every value is kept, and a token's bits do not depend on company."""

from collections.abc import Callable, Iterator
from typing import Any

import numba
import numpy as np
import pytest
from float_weights import FloatWeights
from numpy.typing import NDArray
from reference_packed import Bytes, Floats, Wide, address, distance, floats, unpack_f8

from localv4.kernels import gemm, gemm_floats, packing_floats
from localv4.kernels.buffers import aligned_bytes
from localv4.kernels.float_operations import (
    FEW_TOKENS,
    OPERATIONS,
    SMALLEST_BATCH,
    batch_size,
)
from localv4.kernels.operation import WORDS
from localv4.kernels.packed import PackedFormat
from localv4.kernels.packing_floats import B16, F32R, float_bytes
from localv4.kernels.team import Team
from localv4.kernels.tiles import TILE_TOKENS

pytestmark = pytest.mark.skipif(
    bool(numba.config.DISABLE_JIT), reason="kernels that take addresses need the compiler"
)

F32 = np.float32
GAP = 16
TOLERANCE = 1e-6
ALONE = Team(1)


@pytest.fixture(scope="module", params=[1, 3], ids=["one", "three"])
def team(request: pytest.FixtureRequest) -> Iterator[Team]:
    yield Team(request.param)


def frozen(array: NDArray[Any]) -> Bytes:
    """The bytes of an array in a row, read-only as a file's are."""
    flat: Bytes = np.ascontiguousarray(array).view(np.uint8).reshape(-1)
    flat.flags.writeable = False
    return flat


def unpack(fmt: PackedFormat, packed: Bytes, cols: int) -> Floats:
    """The values of all rows of a packed matrix of floats, those of the filling included."""
    if fmt is F32R:
        lanes = packed.view(F32)
    else:
        lanes = (packed.view(np.uint16).astype(np.uint32) << 16).view(F32)
    values: Floats = lanes.reshape(-1, cols, 16).transpose(0, 2, 1).reshape(-1, cols)
    return values


def random_bits(seed: int, rows: int, cols: int, kind: str) -> NDArray[Any]:
    """Every kind of value, NaN and subnormals included."""
    size = rows * cols * np.dtype(kind).itemsize
    raw = np.random.default_rng(seed).integers(0, 256, size, dtype=np.uint8)
    bits: NDArray[Any] = raw.view(kind).reshape(rows, cols)
    return bits


def pack_all(
    pack: Callable[..., int], fmt: PackedFormat, data: NDArray[Any], rows: int, cols: int
) -> Bytes:
    """Pack with two calls, into memory that held something."""
    out = aligned_bytes(float_bytes(fmt, rows, cols))
    out[:] = 0xFF
    groups = packing_floats.groups_of(rows)
    for first, end in ((groups // 2, groups), (0, groups // 2)):
        assert pack(out, frozen(data), cols, first, end, 1) == 0
    return out


def assert_same_bits(actual: Floats, expected: Floats) -> None:
    """Equal down to the bits of NaN, the rows behind the expected ones zero."""
    bits, rows = actual.view(np.uint32), len(expected)
    np.testing.assert_array_equal(bits[:rows], expected.view(np.uint32))
    assert len(bits) == -(-rows // 16) * 16 and not bits[rows:].any()


SHAPES = [(16, 16), (8, 48), (4, 128), (33, 32), (80, 272)]
shapes = pytest.mark.parametrize(("rows", "cols"), SHAPES)


@shapes
def test_packed_bf16_keeps_its_values(rows: int, cols: int) -> None:
    halves = random_bits(rows, rows, cols, "u2")
    packed = pack_all(packing_floats.pack_bf16, B16, halves, rows, cols)
    expected = (halves.astype(np.uint32) << 16).view(F32)
    assert_same_bits(unpack(B16, packed, cols), expected)


@shapes
def test_packed_f32_keeps_its_values(rows: int, cols: int) -> None:
    words = random_bits(rows, rows, cols, "u4")
    packed = pack_all(packing_floats.pack_f32, F32R, words, rows, cols)
    assert_same_bits(unpack(F32R, packed, cols), words.view(F32))


@shapes
def test_packed_f16_keeps_its_values(rows: int, cols: int) -> None:
    halves = random_bits(rows, rows, cols, "u2")
    halves[(halves & 0x7C00) == 0x7C00] &= 0xFC00  # of the special ones only the infinities
    packed = pack_all(packing_floats.pack_f16, F32R, halves, rows, cols)
    assert_same_bits(unpack(F32R, packed, cols), halves.view(np.float16).astype(F32))


@shapes
def test_f32_that_was_bf16_packs_in_half_the_memory(rows: int, cols: int) -> None:
    words = random_bits(rows, rows, cols, "u4") & np.uint32(0xFFFF0000)
    assert packing_floats.fits_bf16(frozen(words))
    packed = pack_all(packing_floats.pack_f32_as_b16, B16, words, rows, cols)
    assert_same_bits(unpack(B16, packed, cols), words.view(F32))


@pytest.mark.parametrize("at", [0, 1, -1])
def test_one_value_more_than_bf16_is_noticed(at: int) -> None:
    words = np.zeros((16, 2 * (1 << 18) // 16), np.uint32)
    assert packing_floats.fits_bf16(frozen(words))
    words.reshape(-1)[at] = 1
    assert not packing_floats.fits_bf16(frozen(words))


def test_groups_can_go_to_every_second_place() -> None:
    cols = 32
    words = random_bits(1, 32, cols, "u2")
    out = aligned_bytes(2 * float_bytes(B16, 32, cols))
    packing_floats.pack_bf16(out, frozen(words), cols, 0, 2, 2)
    size = float_bytes(B16, 16, cols)
    whole = pack_all(packing_floats.pack_bf16, B16, words, 32, cols)
    places = out.reshape(4, size)
    assert np.array_equal(places[::2].reshape(-1), whole) and not places[1::2].any()


@pytest.mark.parametrize(("rows", "cols"), [(0, 16), (16, 0), (16, 24), (-1, 16)])
def test_what_has_no_packed_form(rows: int, cols: int) -> None:
    with pytest.raises(ValueError, match="no packed form B16"):
        float_bytes(B16, rows, cols)
    assert float_bytes(B16, 17, 16) == 2 * 16 * 32 and float_bytes(F32R, 1, 16) == 16 * 64


# --- products ---


class Weights(FloatWeights):
    """A matrix that the CPU multiplies with."""

    def matvec(self, team: Team, x: Floats) -> Floats:
        """The product with each of some tokens, one at a time."""
        out = floats(len(x), self.rows + GAP)
        entry, scale = OPERATIONS[self.name].matvec.address, address(self.scale)
        matrix = (entry, *self.words)
        run(team, *((*matrix, address(x[t]), scale, 0, address(out[t])) for t in range(len(x))))
        return self.trimmed(out)

    def gemm(self, team: Team, x: Floats, tokens: int) -> Floats:
        """The products with the first tokens, all together."""
        out = floats(tokens, self.rows + GAP)
        scratch = aligned_bytes(team.members * gemm_floats.SCRATCH_BYTES)
        scratch[:] = 0xFF
        entry, scale = OPERATIONS[self.name].gemm.address, address(self.scale)
        matrix = (entry, *self.words)
        given = (address(x), scale, self.cols + GAP, tokens)
        run(team, (*matrix, *given, address(out), 4 * (self.rows + GAP), address(scratch)))
        return self.trimmed(out)

    def trimmed(self, out: Floats) -> Floats:
        """The results, behind which nothing may have been written."""
        assert np.isnan(out[:, self.rows :]).all()
        return out[:, : self.rows]


def run(team: Team, *operations: tuple[int, ...]) -> None:
    """Run a program."""
    program = np.zeros((len(operations), WORDS), np.int64)
    for row, words in zip(program, operations, strict=True):
        row[: len(words)] = words
    assert team.run(program) == len(operations)


def activations(tokens: int, cols: int) -> Floats:
    """Padded rows, with NaN behind each and behind the last."""
    x = floats(tokens + gemm.SPARE_TOKENS, cols + GAP)
    x[:tokens, :cols] = np.random.default_rng(tokens).standard_normal((tokens, cols))
    return x


FLOAT_SHAPES = [("B16", 8, 16), ("B16", 80, 272), ("F32R", 4, 48), ("F32R", 144, 256)]
F8_SHAPES = [("F8", 16, 128), ("F8", 144, 384), ("F8", 272, 256)]
matrices = pytest.mark.parametrize(("name", "rows", "cols"), FLOAT_SHAPES + F8_SHAPES)


@matrices
def test_matvec(team: Team, name: str, rows: int, cols: int) -> None:
    weights, x = Weights(name, rows, cols), activations(2, cols)
    expected: Wide = x[:2, :cols].astype(np.float64) @ weights.values.T
    product = weights.matvec(team, x[:2])
    assert distance(product, expected) < TOLERANCE
    assert not product[:, rows:].any()
    assert np.array_equal(product, weights.matvec(ALONE, x[:2]))


@matrices
@pytest.mark.parametrize("tokens", [1, FEW_TOKENS, FEW_TOKENS + 1, 13, gemm.BATCH_TOKENS + 1])
def test_many_tokens_have_the_bits_of_one(
    team: Team, name: str, rows: int, cols: int, tokens: int
) -> None:
    weights, x = Weights(name, rows, cols), activations(tokens, cols)
    expected = weights.matvec(ALONE, x[:tokens])
    assert np.array_equal(weights.gemm(team, x, tokens), expected)


@pytest.mark.parametrize("name", ["B16", "F32R"])
def test_each_weight_meets_its_activation(team: Team, name: str) -> None:
    cols = 160
    weights, x = Weights(name, 16, cols), activations(cols, cols)
    x[:cols, :cols] = np.eye(cols)
    assert np.array_equal(weights.gemm(team, x, cols), weights.values.T)
    assert np.array_equal(weights.matvec(ALONE, x[:cols]), weights.values.T)


def test_f8_knows_every_code(team: Team) -> None:
    weights, x = Weights("F8", 16, 256), activations(256, 256)
    codes = weights.packed.reshape(256, 16)
    codes[:] = np.arange(256)[:, None]
    codes[codes & 0x7F == 0x7F] = 0
    weights.scale[:] = 1
    x[:256, :256] = np.eye(256)
    expected = unpack_f8(weights.packed, weights.scale, 16, 256).T
    assert np.array_equal(weights.matvec(ALONE, x[:256]), expected)
    assert np.array_equal(weights.gemm(team, x, 256), expected)


def test_a_block_of_a_diagonal_is_a_matrix_of_its_own(team: Team) -> None:
    weights, x = Weights("F8", 384, 256), activations(7, 256)
    whole = weights.gemm(team, x, 7)
    block = Weights("F8", 128, 256)
    block.packed, block.scale = weights.packed[128 * 256 :], weights.scale[1:]
    assert np.array_equal(block.gemm(team, x, 7), whole[:, 128:256])
    assert np.array_equal(block.matvec(team, x[:7]), whole[:, 128:256])


@pytest.mark.parametrize("name", ["B16", "F32R", "F8"])
@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_no_error_in_the_activations_is_lost(team: Team, name: str, bad: float) -> None:
    weights, x = Weights(name, 16, 128), activations(5, 128)
    x[1, 77] = bad
    product = weights.gemm(team, x, 5)
    assert not np.isfinite(product[1]).any() and np.isfinite(product[[0, 2, 3, 4]]).all()
    assert not np.isfinite(weights.matvec(team, x[1:2])).any()


def test_batches_are_large_if_there_is_work_for_all() -> None:
    assert batch_size(10_000, 64, 2) == gemm.BATCH_TOKENS
    assert batch_size(3, 1, 2) == SMALLEST_BATCH
    assert batch_size(512, 4, 32) == SMALLEST_BATCH
    middle = batch_size(1024, 4, 8)
    assert SMALLEST_BATCH < middle < gemm.BATCH_TOKENS and middle % TILE_TOKENS == 0


def test_scratch_memory_of_all_large_products_is_enough() -> None:
    assert gemm.SCRATCH_BYTES >= gemm_floats.SCRATCH_BYTES
    assert gemm_floats.SCRATCH_BYTES % 64 == 0
