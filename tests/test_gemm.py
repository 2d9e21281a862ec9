"""Products of several tokens: the bits of the mat-vec, whoever the neighbours are."""

from collections.abc import Sequence
from functools import cache
from typing import Any

import numba
import numpy as np
import pytest
from expert_cases import Experts
from numpy.typing import NDArray
from operation_runs import assert_same_bits
from reference_packed import Bytes, Floats, address, floats, random_weights

from localv4.kernels import activations
from localv4.kernels.amx import SOME_TOKENS, TOKENS
from localv4.kernels.buffers import aligned_bytes
from localv4.kernels.formats import OPERATIONS
from localv4.kernels.gemm import BATCH_TOKENS, SCRATCH_BYTES, SPARE_TOKENS
from localv4.kernels.operation import WORDS, float_bits
from localv4.kernels.packed import MX4, Q4, Q8, PackedFormat
from localv4.kernels.panel_sums import FEW_TOKENS
from localv4.kernels.single_token import ROW_GAP, quantize
from localv4.kernels.team import Team
from localv4.kernels.tiles import TILE_TOKENS

pytestmark = pytest.mark.skipif(
    bool(numba.config.DISABLE_JIT), reason="kernels that take addresses need the compiler"
)

F32 = np.float32
LIMIT = 1.5
FORMATS = (MX4, Q4, Q8)
all_formats = pytest.mark.parametrize("fmt", FORMATS, ids=lambda fmt: fmt.name)
all_teams = pytest.mark.parametrize("members", [1, 3])
COUNTS = (
    *(1, 3, FEW_TOKENS, FEW_TOKENS + 1, 2 * TILE_TOKENS),
    *(TOKENS, TOKENS + 1, TOKENS + SOME_TOKENS - 1, 3 * TOKENS - 1),
)


def normal(seed: int, *shape: int) -> Floats:
    return np.random.default_rng(seed).standard_normal(shape).astype(F32)


@cache
def team(members: int) -> Team:
    """A team for all tests; not made where there is no compiler."""
    return Team(members)


def run(members: int, *operations: tuple[Any, ...]) -> None:
    """Run a program; an operation is its entry and its operands."""
    program = np.zeros((len(operations), WORDS), np.int64)
    for row, (entry, *words) in zip(program, operations, strict=True):
        row[: 1 + len(words)] = (entry.address, *words)
    team(members).run(program)


class Rows:
    """Int8 activations of some tokens; behind them, what may be read is no number."""

    def __init__(self, x: Floats, order: Sequence[int] | None = None) -> None:
        source, chosen = (
            np.ascontiguousarray(x),
            np.array(range(len(x)) if order is None else order),
        )
        self.count, self.cols = len(chosen), x.shape[1]
        self.sizes = activations.row_bytes(self.cols)
        self.buffers = [self.room(size) for size in self.sizes]
        words = (address(source), self.cols, address(chosen), self.count, self.cols)
        run(1, (quantize, *words, *self.at(0)))

    def room(self, size: int) -> Bytes:
        """Memory for the rows of a buffer."""
        room = aligned_bytes((self.count + SPARE_TOKENS) * size)
        room[:] = 0xFF
        return room

    def at(self, token: int) -> tuple[int, ...]:
        """Where the activations of a token are."""
        pairs = zip(self.buffers, self.sizes, strict=True)
        return tuple(address(buffer) + token * size for buffer, size in pairs)


def scratch(members: int) -> Bytes:
    memory = aligned_bytes(members * SCRATCH_BYTES)
    memory[:] = 0xFF
    return memory


def multiply(members: int, fmt: PackedFormat, weights: Bytes, rows: int, x: Rows) -> Floats:
    """The products of all tokens, by one operation."""
    out, memory = floats(x.count, rows + ROW_GAP), scratch(members)
    words = (address(weights), rows // 16, x.cols, *x.at(0), x.count, address(out))
    run(members, (OPERATIONS[fmt.name].gemm, *words, 4 * (rows + ROW_GAP), address(memory)))
    assert np.isnan(out[:, rows:]).all()
    return out[:, :rows]


def one_by_one(fmt: PackedFormat, weights: Bytes, rows: int, x: Rows) -> Floats:
    """The products of the tokens, each by a mat-vec."""
    out = floats(x.count, rows)
    words = (address(weights), rows // 16, x.cols)
    matvec = OPERATIONS[fmt.name].matvec
    run(1, *((matvec, *words, *x.at(t), address(out[t:])) for t in range(x.count)))
    return out


@all_formats
@pytest.mark.parametrize("tokens", COUNTS)
@pytest.mark.parametrize(("rows", "cols"), [(80, 384), (64, 128)])
def test_some_tokens_have_the_bits_of_one(
    fmt: PackedFormat, rows: int, cols: int, tokens: int
) -> None:
    weights = random_weights(rows, fmt, rows, cols)
    order = np.random.default_rng(tokens).permutation(tokens + 2)[:tokens].tolist()
    x = Rows(normal(cols, tokens + 2, cols), order)
    expected = one_by_one(fmt, weights, rows, x)
    assert np.isfinite(expected).all() and np.abs(expected).max() > 0
    assert_same_bits(multiply(1, fmt, weights, rows, x), expected)


@all_formats
@pytest.mark.parametrize("tokens", [BATCH_TOKENS + 11, 2 * BATCH_TOKENS + FEW_TOKENS])
def test_members_and_batches_change_no_bits(fmt: PackedFormat, tokens: int) -> None:
    rows, cols = 144, 512
    weights, x = random_weights(1, fmt, rows, cols), Rows(normal(2, tokens, cols))
    product = multiply(3, fmt, weights, rows, x)
    assert_same_bits(product, one_by_one(fmt, weights, rows, x))


@pytest.mark.parametrize("fmt", [Q4, Q8], ids=["Q4", "Q8"])
@pytest.mark.parametrize("cols", [64, 192, 832])
@pytest.mark.parametrize("tokens", [7, 21])
def test_columns_may_be_a_multiple_of_64(fmt: PackedFormat, cols: int, tokens: int) -> None:
    weights, x = random_weights(1, fmt, 32, cols), Rows(normal(2, tokens, cols))
    product = multiply(1, fmt, weights, 32, x)
    assert_same_bits(product, one_by_one(fmt, weights, 32, x))


@all_formats
@pytest.mark.parametrize("fill", [0x00, 0x77, 0x7F, 0x80, 0x88, 0xFF])
def test_extreme_weights(fmt: PackedFormat, fill: int) -> None:
    weights = random_weights(1, fmt, 64, 256)
    weights.reshape(-1, fmt.superblock_bytes)[:, 64:] = fill
    x = Rows(np.repeat(np.array([[3], [-3]], F32), 256, axis=1), [0, 1] * 9)
    product = multiply(1, fmt, weights, 64, x)
    assert_same_bits(product, one_by_one(fmt, weights, 64, x))


@all_formats
@pytest.mark.parametrize("tokens", [3, 14])
@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_errors_stay_with_their_token(fmt: PackedFormat, tokens: int, bad: float) -> None:
    x = normal(1, tokens, 256)
    x[1, 77] = bad
    product = multiply(1, fmt, random_weights(1, fmt, 32, 256), 32, Rows(x))
    assert not np.isfinite(product[1]).any()
    assert np.isfinite(np.delete(product, 1, axis=0)).all()


# --- experts ---


def gate_up(members: int, experts: Experts, x: Rows) -> Rows:
    """The rounded hidden layers, by one operation."""
    middle = Rows(np.zeros((experts.slots, experts.inner), F32))
    for buffer in middle.buffers:
        buffer[:] = 0xFF
    memory = scratch(members)
    words = (*experts.words, 2 * experts.inner // 16, experts.hidden, *x.at(0), *middle.at(0))
    entry = experts.operations.experts_gate_up
    run(members, (entry, *words, address(memory), float_bits(LIMIT)))
    return middle


def gate_up_one_by_one(experts: Experts, x: Rows) -> Rows:
    """The same by operations on one token."""
    h, cols = floats(experts.slots, experts.inner + ROW_GAP), experts.hidden
    records = experts.of_each_token()
    for t in range(experts.slots):
        words = (address(records[t:]), 1, experts.inner // 16, cols, *x.at(t), address(h[t:]))
        run(1, (experts.operations.gate_up, *words, float_bits(LIMIT)))
    return Rows(h[:, : experts.inner])


EXPERTS = (
    pytest.param((5, 0, FEW_TOKENS, 1), id="few"),
    pytest.param((FEW_TOKENS + 1, TOKENS + 3, 0), id="many"),
    pytest.param((2, BATCH_TOKENS + 5), id="batches"),
)


@all_formats
@all_teams
@pytest.mark.parametrize("counts", EXPERTS)
def test_hidden_layers_of_experts(fmt: PackedFormat, members: int, counts: tuple[int, ...]) -> None:
    experts = Experts(fmt, 256, 128, counts)
    x = Rows(10 * normal(1, experts.slots, 256))
    middle, expected = gate_up(members, experts, x), gate_up_one_by_one(experts, x)
    q, q_twin = (rows.buffers[0].reshape(-1, rows.sizes[0]) for rows in (middle, expected))
    assert_same_bits(q[: x.count, : experts.inner], q_twin[: x.count, : experts.inner])
    for buffer, twin, size in zip(middle.buffers, expected.buffers, middle.sizes, strict=True):
        if buffer is not middle.buffers[0]:
            assert_same_bits(buffer[: size * x.count], twin[: size * x.count])


@all_formats
@all_teams
@pytest.mark.parametrize("counts", EXPERTS)
def test_results_of_experts(fmt: PackedFormat, members: int, counts: tuple[int, ...]) -> None:
    experts = Experts(fmt, 384, 128, counts)
    places = np.random.default_rng(1).permutation(np.arange(experts.slots) // 2)
    shares, hidden = normal(3, experts.slots), normal(4, experts.slots, 128)
    middle, size = Rows(hidden), 384 + ROW_GAP
    out, expected = (floats(experts.slots, size, fill=0) for _ in range(2))
    memory = scratch(members)
    words = (*experts.words, 384 // 16, 128)
    target = (address(out), 4 * size, address(memory), address(places), address(shares))
    entry = experts.operations.experts_down
    run(members, (entry, *words, *middle.at(0), *target, experts.down))
    add_one_by_one(expected, experts, hidden, places, shares)
    assert_same_bits(out, expected)


def add_one_by_one(
    out: Floats, experts: Experts, middle: Floats, places: NDArray[np.int64], shares: Floats
) -> None:
    """The same by operations on one token, for each row of out."""
    records, (hidden, inner) = experts.of_each_token(), (experts.hidden, experts.inner)
    for place in np.unique(places):
        tokens = np.flatnonzero(places == place)
        own, rows = records[tokens].copy(), Rows(middle, tokens.tolist())
        words = (address(own), len(tokens), hidden // 16, inner, *rows.at(0), address(out[place:]))
        weights = shares[tokens].copy()
        run(1, (experts.operations.down, *words, address(weights), experts.down))


def test_experts_of_one_token_by_several_operations() -> None:
    experts = Experts(MX4, 384, 128, (1, 1, 1))
    middle, shares = Rows(normal(4, 3, 128)), normal(3, 3)
    out, expected = (floats(384) for _ in range(2))
    whole, first, last = (experts.records.copy() for _ in range(3))
    first[1], last[[0, 2]] = 0, 0
    for target, records, adds in ((expected, whole, 0), (out, first, 0), (out, last, 1)):
        words = (address(records), 3, 384 // 16, 128, *middle.at(0), address(target))
        run(2, (experts.operations.down, *words, address(shares), experts.down, adds))
    np.testing.assert_allclose(out, expected, rtol=1e-5, atol=1e-5 * np.abs(expected).max())
    hidden, twin = (floats(3, 128 + ROW_GAP, fill=7) for _ in range(2))
    x = Rows(10 * normal(1, 3, 384))
    for rows, records in ((twin, whole), (hidden, first)):
        words = (address(records), 3, 128 // 16, 384, *x.at(0), address(rows))
        run(2, (experts.operations.gate_up, *words, float_bits(LIMIT)))
    assert_same_bits(hidden[[0, 2]], twin[[0, 2]])
    assert (hidden[1] == 7).all()
