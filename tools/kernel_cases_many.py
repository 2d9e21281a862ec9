"""Products of many tokens at the dimensions of DeepSeek-V4-Flash, to be timed on their own.

Experts are those of a wave: what their slots allow of 256 experts, of which each token has chosen
six.
"""

from dataclasses import dataclass

import numpy as np
from kernel_cases import (
    CHOSEN,
    EXPERTS,
    FLOATS,
    HIDDEN,
    INNER,
    INTEGERS,
    LIMIT,
    ROUTER,
    Case,
    Memory,
    floats,
    rounded,
    rounded_bytes,
)
from numpy.typing import NDArray

from localv4.kernels import float_operations
from localv4.kernels.formats import OPERATIONS
from localv4.kernels.packed import (
    F8,
    F8_SPAN,
    GROUP_ROWS,
    PackedFormat,
    down_offset,
    expert_bytes,
    packed_bytes,
)
from localv4.kernels.packing_floats import float_bytes
from localv4.kernels.single_token import ROW_GAP
from localv4.model.fast_moe import WAVE_SLOTS

TOKENS = (16, 512, 2048)
DENSE = {"wq_b": (32768, 1024), "wo_b": (HIDDEN, 8192), "wq_a": (1024, HIDDEN)}
HEAD = (129280, HIDDEN)


def cases() -> list[Case]:
    """Return all cases, those of the formats that models use most first."""
    found: list[Case] = []
    for tokens in TOKENS:
        wave = Wave.of(tokens)
        for name in ("MX4", "Q4", "Q8", "Q2", "IQ2"):
            found += [_gate_up(name, wave), _down(name, wave)]
        for part, shape in DENSE.items():
            found += [_gemm(name, part, *shape, tokens) for name in ("Q8", "Q4")]
            found += [_float_gemm(name, part, *shape, tokens) for name in ("F8", "B16")]
        found.append(_gemm("MX4", "wo_b", *DENSE["wo_b"], tokens))
        found.append(_float_gemm("F32R", "router", *ROUTER, tokens))
    for name in ("Q4K", "Q6", "Q3"):
        found.append(_gemm(name, "wo_b", *DENSE["wo_b"], TOKENS[1]))
    found += [_gemm("Q8", "head", *HEAD, TOKENS[0]), _float_gemm("B16", "head", *HEAD, TOKENS[0])]
    return found


# --- dense matrices ---


def _gemm(name: str, part: str, rows: int, cols: int, tokens: int) -> Case:
    nbytes, stride = packed_bytes(INTEGERS[name], rows, cols), 4 * (rows + ROW_GAP)

    def operands(memory: Memory) -> list[int]:
        matrix = (memory.random(nbytes), rows // GROUP_ROWS, cols)
        return [*matrix, *rounded(memory, tokens, cols), *_out(memory, tokens, stride)]

    total = nbytes + rounded_bytes(tokens, cols) + tokens * stride
    title = f"{name} gemm {part} {rows} x {cols}, {tokens} tokens"
    return title, OPERATIONS[name].gemm, operands, total, 2 * rows * cols * tokens


def _out(memory: Memory, tokens: int, stride: int) -> tuple[int, int, int, int]:
    """Return the words from the number of tokens on."""
    return tokens, memory.random(tokens * stride), stride, 0


def _float_gemm(name: str, part: str, rows: int, cols: int, tokens: int) -> Case:
    is_f8, stride = name == "F8", 4 * (rows + ROW_GAP)
    nbytes = packed_bytes(F8, rows, cols) if is_f8 else float_bytes(FLOATS[name], rows, cols)
    scales = -(-rows // F8_SPAN) * (cols // F8_SPAN)

    def operands(memory: Memory) -> list[int]:
        matrix = (memory.random(nbytes), rows // GROUP_ROWS, cols)
        x = (floats(memory, tokens * (cols + ROW_GAP)), floats(memory, scales) if is_f8 else 0)
        return [*matrix, *x, cols + ROW_GAP, *_out(memory, tokens, stride)]

    total = nbytes + 4 * tokens * cols + tokens * stride
    title = f"{name} gemm {part} {rows} x {cols}, {tokens} tokens"
    return title, float_operations.OPERATIONS[name].gemm, operands, total, 2 * rows * cols * tokens


# --- experts ---


@dataclass(frozen=True)
class Wave:
    """The experts of the first wave of some tokens, with the tokens and shares of their slots."""

    tokens: int
    starts: NDArray[np.int64]
    rows: NDArray[np.int64]

    @classmethod
    def of(cls, tokens: int) -> "Wave":
        """Choose experts at random."""
        rng = np.random.default_rng(tokens)
        chosen = np.array([rng.permutation(EXPERTS)[:CHOSEN] for _ in range(tokens)])
        sizes = np.bincount(chosen.ravel(), minlength=EXPERTS)
        rows = np.argsort(chosen, axis=None, kind="stable") // CHOSEN
        used = np.flatnonzero(sizes)
        ends = np.cumsum(sizes[used])
        fitting = int(np.searchsorted(ends, WAVE_SLOTS, side="right"))
        starts = np.concatenate([[0], ends[:fitting]]).astype(np.int64)
        return cls(tokens, starts, rows[: starts[-1]].astype(np.int64))

    @property
    def experts(self) -> int:
        """Number of experts."""
        return len(self.starts) - 1

    @property
    def slots(self) -> int:
        """Pairs of a token and an expert."""
        return len(self.rows)

    def words(self, memory: Memory, fmt: PackedFormat) -> tuple[int, int, int]:
        """Return records, experts and starts."""
        size = expert_bytes(fmt, HIDDEN, INNER)
        records = np.array([memory.random(size) for _ in range(self.experts)], np.int64)
        return memory.array(records), self.experts, memory.array(self.starts)

    def title(self) -> str:
        """Say how large it is."""
        return f"{self.tokens} tokens: {self.slots} slots of {self.experts} experts"


def _gate_up(name: str, wave: Wave) -> Case:
    fmt = INTEGERS[name]

    def operands(memory: Memory) -> list[int]:
        x = (2 * INNER // GROUP_ROWS, HIDDEN, *rounded(memory, wave.slots, HIDDEN))
        return [*wave.words(memory, fmt), *x, *rounded(memory, wave.slots, INNER), 0, LIMIT]

    activations = rounded_bytes(wave.slots, HIDDEN) + rounded_bytes(wave.slots, INNER)
    total = wave.experts * down_offset(fmt, HIDDEN, INNER) + activations
    flops = 4 * wave.slots * INNER * HIDDEN
    entry = OPERATIONS[name].experts_gate_up
    return f"{name} experts_gate_up, {wave.title()}", entry, operands, total, flops


def _down(name: str, wave: Wave) -> Case:
    fmt, stride = INTEGERS[name], 4 * (HIDDEN + ROW_GAP)

    def operands(memory: Memory) -> list[int]:
        x = (HIDDEN // GROUP_ROWS, INNER, *rounded(memory, wave.slots, INNER))
        out = memory.array(np.zeros(wave.tokens * stride, np.uint8))
        slots = (memory.array(wave.rows), floats(memory, wave.slots))
        offset = down_offset(fmt, HIDDEN, INNER)
        return [*wave.words(memory, fmt), *x, out, stride, 0, *slots, offset]

    weights = wave.experts * packed_bytes(fmt, HIDDEN, INNER)
    total = weights + rounded_bytes(wave.slots, INNER) + 2 * wave.tokens * stride
    flops = 2 * wave.slots * INNER * HIDDEN
    entry = OPERATIONS[name].experts_down
    return f"{name} experts_down, {wave.title()}", entry, operands, total, flops
