"""CUDA twins of products of experts with many tokens: the bits of the CPU's."""

from typing import Any

import numpy as np
import pytest
from cuda_products import FORMATS
from cuda_twins import needs_compiler, run_twin
from expert_cases import Experts
from operation_runs import ROW_GAP, Rounded, assert_same_bits, run
from reference_packed import Floats, address, aligned, floats

from localv4.kernels.gemm import SCRATCH_BYTES, SPARE_TOKENS
from localv4.kernels.operation import float_bits
from localv4.kernels.packed import Q8, PackedFormat
from localv4.kernels.single_token import quantize

pytestmark = needs_compiler

LIMIT = 1.5
FIRST = 3  # slot of the first token
all_formats = pytest.mark.parametrize("fmt", FORMATS, ids=lambda fmt: fmt.name)
COUNTS = (
    pytest.param((5, 0, 8, 1, 2), id="few"),
    pytest.param((9, 33, 0), id="more"),
    pytest.param((70, 20), id="several tiles"),
    pytest.param((0, 0), id="none"),
)
all_counts = pytest.mark.parametrize("counts", COUNTS)


def scratch() -> Any:
    return aligned(np.zeros(SCRATCH_BYTES, np.uint8))


def activations(experts: Experts, seed: int, cols: int, size: float) -> Rounded:
    """Rounded rows for all slots."""
    x = floats(experts.slots, cols)
    x[...] = size * np.random.default_rng(seed).normal(size=x.shape)
    rows = Rounded(experts.slots + SPARE_TOKENS, cols)
    run(1, quantize, (address(x), cols, 0, experts.slots, cols, *rows.addresses(0)))
    return rows


@all_formats
@all_counts
@pytest.mark.parametrize("binary", [0, 1])
def test_hidden_layers_of_experts(fmt: PackedFormat, counts: tuple[int, ...], binary: int) -> None:
    experts = Experts(fmt, 256, 256, counts, FIRST)
    x = activations(experts, 1, 256, 10)
    mine, theirs = (Rounded(experts.slots + SPARE_TOKENS, 256) for _ in range(2))
    words = (*experts.words, 2 * 256 // 16, 256, *x.addresses(0))
    entry, memory = experts.operations.experts_gate_up, scratch()
    rest = (address(memory), float_bits(LIMIT), binary)
    run(1, entry, (*words, *theirs.addresses(0), *rest))
    run_twin(entry, (*words, *mine.addresses(0), 0, float_bits(LIMIT), binary))
    for buffer, twin in zip(mine.buffers, theirs.buffers, strict=True):
        assert_same_bits(buffer, twin)
    used = slice(experts.first, experts.slots)
    assert mine.q[used, :256].any(axis=1).all() and not mine.q[: experts.first].any()


def results(experts: Experts, rows: Any, shares: Floats) -> tuple[Floats, Floats]:
    """What the twin and the CPU leave of rows that held something."""
    hidden = activations(experts, 4, experts.inner, 1)
    before = np.random.default_rng(5).normal(size=(experts.slots, experts.hidden + ROW_GAP))
    outs = tuple(floats(*before.shape) for _ in range(2))
    words = (*experts.words, experts.hidden // 16, experts.inner, *hidden.addresses(0))
    entry, memory = experts.operations.experts_down, scratch()
    tail = (address(rows), address(shares), experts.down)
    for out in outs:
        out[...] = before
    stride = 4 * (experts.hidden + ROW_GAP)
    run_twin(entry, (*words, address(outs[0]), stride, 0, *tail))
    run(1, entry, (*words, address(outs[1]), stride, address(memory), *tail))
    assert (outs[1][:, experts.hidden :] == before[:, experts.hidden :].astype(np.float32)).all()
    return outs[0], outs[1]


@all_formats
@all_counts
def test_results_of_experts(fmt: PackedFormat, counts: tuple[int, ...]) -> None:
    experts = Experts(fmt, 512, 256, counts, FIRST)
    rng = np.random.default_rng(1)
    rows = rng.permutation(np.arange(experts.slots) // 3)
    shares = rng.normal(size=experts.slots).astype(np.float32)
    mine, theirs = results(experts, rows, shares)
    assert_same_bits(mine, theirs)


def test_all_slots_of_one_row_are_added_in_order() -> None:
    experts = Experts(Q8, 1088, 128, (130, 140, 150), FIRST)
    shares = np.random.default_rng(1).normal(size=experts.slots).astype(np.float32)
    assert_same_bits(*results(experts, np.full(experts.slots, 2), shares))
