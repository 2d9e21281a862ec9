"""Activations as bfloat16, and products with them: what int8 and scales give, to the bit."""

import numpy as np
import pytest
from expert_cases import Experts
from numpy.typing import NDArray
from operation_runs import assert_same_bits
from reference_packed import Floats, address, floats
from test_gemm import LIMIT, normal, run, scratch

from localv4.kernels.gemm import BATCH_TOKENS
from localv4.kernels.operation import float_bits
from localv4.kernels.packed import BLOCK, MX4
from localv4.kernels.pairs import ORDER
from localv4.kernels.panel_sums import SOME_TOKENS
from localv4.kernels.single_token import ROW_GAP, quantize
from localv4.model.program import Rounded

all_counts = pytest.mark.parametrize(
    "counts",
    [
        pytest.param((SOME_TOKENS + 1, 0, 32, 1), id="some"),
        pytest.param((49, BATCH_TOKENS + 33), id="many"),
    ],
)


def rounded(x: Floats, room: int | None = None) -> Rounded:
    """Round rows with scales that are powers of two, as pairs, too."""
    out, source = Rounded(room or len(x), x.shape[1], has_pairs=True), np.ascontiguousarray(x)
    cut = (address(source), x.shape[1], 0, len(x), x.shape[1])
    run(2, (quantize, *cut, *out.addresses, 1, *out.pairs))
    return out


def buffers(rows: Rounded, tokens: int) -> tuple[NDArray[np.int8], Floats, NDArray[np.uint16]]:
    """The int8, scales and pairs of some rows, the latter [row][block][32]."""
    q, d, _, pairs = rows._buffers
    blocks, size = rows.cols // BLOCK, rows.cols + 64
    words = pairs.view(np.uint16).reshape(blocks, rows.pairs[1] // 2)[:, : BLOCK * tokens]
    return (
        q[: size * tokens].view(np.int8).reshape(tokens, size)[:, : rows.cols],
        d[: 4 * blocks * tokens].view(np.float32).reshape(tokens, blocks),
        words.reshape(blocks, tokens, BLOCK).transpose(1, 0, 2),
    )


def to_floats(words: NDArray[np.uint16]) -> Floats:
    """What bfloat16 stand for."""
    return (words.astype(np.uint32) << 16).view(np.float32)


def test_scales_are_the_next_powers_of_two() -> None:
    x = normal(1, 5, 256) * np.float32(2.0) ** np.arange(-12, 13, 6, dtype=np.float32)[:, None]
    x[2, :BLOCK] = 0
    x[2, 3] = 127 / 64  # the largest that a scale of 1/64 allows
    q, d, _ = buffers(rounded(x), 5)
    sizes = np.abs(x.reshape(5, -1, BLOCK)).max(2)
    assert (np.frexp(d)[0] == 0.5).all()
    assert (d >= sizes / np.float32(127.00001)).all() and (d < 2 * sizes / 127).all()
    assert d[2, 0] == 1 / 64
    twin = np.rint(x.reshape(5, -1, BLOCK) / d[:, :, None])
    np.testing.assert_array_equal(q.reshape(5, -1, BLOCK), twin)


def test_pairs_are_what_is_rounded() -> None:
    q, d, pairs = buffers(rounded(normal(2, 33, 384), room=40), 33)
    twin = q.reshape(33, -1, BLOCK) * d[:, :, None]
    np.testing.assert_array_equal(to_floats(pairs), twin[:, :, list(ORDER)])


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_what_is_not_finite_stays_so(bad: float) -> None:
    x = normal(3, 2, 64)
    x[1, 40] = bad
    _, d, pairs = buffers(rounded(x), 2)
    assert np.isfinite(d[0]).all() and np.isfinite(d[1, 0]) and not np.isfinite(d[1, 1])
    assert not np.isfinite(to_floats(pairs)[1, 1]).any()


def hidden_layers(members: int, experts: Experts, x: Rounded, *, uses_pairs: bool) -> Rounded:
    """The rounded hidden layers, by one operation."""
    out, memory = Rounded(experts.slots, experts.inner, has_pairs=True), scratch(members)
    pairs = x.pairs if uses_pairs else (0, 0)
    words = (*experts.words, 2 * experts.inner // 16, experts.hidden, *x.addresses, *out.addresses)
    entry = experts.operations.experts_gate_up
    run(members, (entry, *words, address(memory), float_bits(LIMIT), 1, *pairs, *out.pairs))
    return out


def results(members: int, experts: Experts, x: Rounded, *, uses_pairs: bool) -> Floats:
    """The weighted outputs of experts, each slot in a row of its own."""
    places, shares = np.arange(experts.slots), normal(3, experts.slots)
    size, memory = experts.hidden + ROW_GAP, scratch(members)
    out, pairs = floats(experts.slots, size, fill=0), x.pairs if uses_pairs else (0, 0)
    target = (address(out), 4 * size, address(memory), address(places), address(shares))
    words = (*experts.words, experts.hidden // 16, experts.inner, *x.addresses, *target)
    run(members, (experts.operations.experts_down, *words, experts.down, *pairs))
    return out[:, : experts.hidden]


@all_counts
@pytest.mark.parametrize("members", [1, 3])
def test_hidden_layers_from_pairs(members: int, counts: tuple[int, ...]) -> None:
    experts = Experts(MX4, 384, 384, counts)
    x = rounded(10 * normal(1, experts.slots, 384))
    some, twin = (hidden_layers(members, experts, x, uses_pairs=used) for used in (True, False))
    for part, own in zip(*(buffers(rows, experts.slots) for rows in (some, twin)), strict=True):
        np.testing.assert_array_equal(part, own)
    assert buffers(some, experts.slots)[0].any()


@all_counts
@pytest.mark.parametrize("rows", [128, 384])
def test_results_from_pairs(rows: int, counts: tuple[int, ...]) -> None:
    experts = Experts(MX4, rows, 128, counts)
    x = rounded(normal(4, experts.slots, 128))
    some, twin = (results(1, experts, x, uses_pairs=used) for used in (True, False))
    assert np.abs(twin).max() > 0
    assert_same_bits(some, twin)


@pytest.mark.parametrize("scale", [0, 1, 108, 109, 190, 191, 250])
def test_any_scale_of_weights(scale: int) -> None:
    experts = Experts(MX4, 128, 128, (40,))
    superblocks = experts.packed[0].reshape(-1, MX4.superblock_bytes)
    superblocks[1, :64] = scale
    x = rounded(normal(4, 40, 128))
    some, twin = (results(1, experts, x, uses_pairs=used) for used in (True, False))
    assert_same_bits(some, twin)
