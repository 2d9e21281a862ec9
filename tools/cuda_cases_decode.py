"""Products of one token at the dimensions of DeepSeek-V4-Flash, to be timed on a GPU.

A case is its name, the operation, what gives its operands, the bytes that it has to read, and its
floating-point operations. Each call for operands takes memory of its own, so that a GPU whose cache
would hold a whole matrix can be given several in turn.
"""

from collections.abc import Callable, Sequence
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from localv4.kernels import float_operations, rows
from localv4.kernels.activations import row_bytes
from localv4.kernels.compiler import Entry
from localv4.kernels.formats import OPERATIONS
from localv4.kernels.operation import float_bits
from localv4.kernels.packed import (
    F8,
    F8_SPAN,
    FORMATS,
    GROUP_ROWS,
    PackedFormat,
    down_offset,
    expert_bytes,
    packed_bytes,
)
from localv4.kernels.packed_kquants import KQUANTS
from localv4.kernels.packing_floats import B16, F32R, float_bytes
from localv4.kernels.single_token import ROW_GAP, quantize

HIDDEN, INNER, EXPERTS = 4096, 2048, 6
LIMIT, EPS = float_bits(10.0), float_bits(1e-6)

DENSE = {
    "wq_a": (1024, HIDDEN),
    "wkv": (512, HIDDEN),
    "wq_b": (32768, 1024),
    "wo_a block": (1024, HIDDEN),
    "wo_b": (HIDDEN, 8192),
    "head": (129280, HIDDEN),
}
ROUTER = (256, HIDDEN)

INTEGERS = {fmt.name: fmt for fmt in (*FORMATS, *KQUANTS) if fmt is not F8}
FLOATS = {"F8": F8, "B16": B16, "F32R": F32R}


class Memory(Protocol):
    """Memory of the device that the cases run on."""

    def random(self, nbytes: int) -> int:
        """Return the address of so many random bytes."""

    def array(self, values: NDArray[np.generic]) -> int:
        """Return the address of a copy."""


Operands = Callable[[Memory], Sequence[int]]
Case = tuple[str, Entry, Operands, int, int]


def cases() -> list[Case]:
    """Return all cases: experts, dense matrices, and the small operations between them."""
    found = []
    for name in INTEGERS:
        found += [_gate_up(name, 1), _gate_up(name, EXPERTS), _down(name)]
    for name in ("Q8", "Q4", "MX4"):
        found += [_matvec(name, part, *shape) for part, shape in DENSE.items()]
    found += [_float_matvec("F8", part, *shape) for part, shape in DENSE.items()]
    found += [_float_matvec(name, "router", *ROUTER) for name in ("B16", "F32R")]
    found += [_quantize(1, HIDDEN), _quantize(EXPERTS, INNER), _norm(HIDDEN), _swiglu(INNER)]
    return found


def _rounded(memory: Memory, count: int, cols: int) -> list[int]:
    """Return buffers of rounded rows."""
    return [memory.random(count * size) for size in row_bytes(cols)]


def _rounded_bytes(count: int, cols: int) -> int:
    return count * sum(row_bytes(cols))


def _floats(memory: Memory, count: int) -> int:
    return memory.array(np.linspace(-1, 1, count, dtype=np.float32))


def _matvec(name: str, part: str, rows: int, cols: int) -> Case:
    nbytes = packed_bytes(INTEGERS[name], rows, cols)

    def operands(memory: Memory) -> list[int]:
        matrix = (memory.random(nbytes), rows // GROUP_ROWS, cols)
        return [*matrix, *_rounded(memory, 1, cols), memory.random(4 * rows)]

    title = f"{name} matvec {part} {rows} x {cols}"
    total = nbytes + _rounded_bytes(1, cols) + 4 * rows
    return title, OPERATIONS[name].matvec, operands, total, 2 * rows * cols


def _float_matvec(name: str, part: str, rows: int, cols: int) -> Case:
    is_f8 = name == "F8"
    nbytes = packed_bytes(F8, rows, cols) if is_f8 else float_bytes(FLOATS[name], rows, cols)
    scales = -(-rows // F8_SPAN) * (cols // F8_SPAN)

    def operands(memory: Memory) -> list[int]:
        matrix = (memory.random(nbytes), rows // GROUP_ROWS, cols, _floats(memory, cols))
        return [*matrix, _floats(memory, scales) if is_f8 else 0, 0, memory.random(4 * rows)]

    title = f"{name} matvec {part} {rows} x {cols}"
    total = nbytes + 4 * (cols + rows + (scales if is_f8 else 0))
    return title, float_operations.OPERATIONS[name].matvec, operands, total, 2 * rows * cols


def _records(memory: Memory, fmt: PackedFormat, count: int) -> int:
    """Return the table of the addresses of some experts."""
    size = expert_bytes(fmt, HIDDEN, INNER)
    return memory.array(np.array([memory.random(size) for _ in range(count)], np.int64))


def _gate_up(name: str, count: int) -> Case:
    fmt = INTEGERS[name]

    def operands(memory: Memory) -> list[int]:
        experts = (_records(memory, fmt, count), count, INNER // GROUP_ROWS, HIDDEN)
        hidden = memory.random(4 * count * (INNER + ROW_GAP))
        return [*experts, *_rounded(memory, 1, HIDDEN), hidden, LIMIT]

    total = count * (down_offset(fmt, HIDDEN, INNER) + 4 * INNER) + _rounded_bytes(1, HIDDEN)
    title = f"{name} gate_up of {count}: 2 x {INNER} x {HIDDEN}"
    return title, OPERATIONS[name].gate_up, operands, total, 4 * count * INNER * HIDDEN


def _down(name: str) -> Case:
    fmt = INTEGERS[name]

    def operands(memory: Memory) -> list[int]:
        experts = (_records(memory, fmt, EXPERTS), EXPERTS, HIDDEN // GROUP_ROWS, INNER)
        out, shares = memory.random(4 * HIDDEN), _floats(memory, EXPERTS)
        offset = down_offset(fmt, HIDDEN, INNER)
        return [*experts, *_rounded(memory, EXPERTS, INNER), out, shares, offset, 0]

    total = EXPERTS * packed_bytes(fmt, HIDDEN, INNER) + _rounded_bytes(EXPERTS, INNER) + 4 * HIDDEN
    title = f"{name} down of {EXPERTS}: {HIDDEN} x {INNER}"
    return title, OPERATIONS[name].down, operands, total, 2 * EXPERTS * INNER * HIDDEN


def _quantize(count: int, cols: int) -> Case:
    def operands(memory: Memory) -> list[int]:
        x = _floats(memory, count * cols)
        return [x, cols, 0, count, cols, *_rounded(memory, count, cols)]

    total = 4 * count * cols + _rounded_bytes(count, cols)
    return f"quantize {count} x {cols}", quantize, operands, total, 2 * count * cols


def _norm(cols: int) -> Case:
    def operands(memory: Memory) -> list[int]:
        x, weight, out = (_floats(memory, cols) for _ in range(3))
        return [x, cols, weight, EPS, out, cols, *_rounded(memory, 1, cols), 1, cols]

    return f"norm {cols}", rows.norm, operands, 12 * cols + _rounded_bytes(1, cols), 4 * cols


def _swiglu(cols: int) -> Case:
    def operands(memory: Memory) -> list[int]:
        gate, up = _floats(memory, cols), _floats(memory, cols)
        return [gate, up, cols, gate, cols, LIMIT, 1, cols]

    return f"swiglu {cols}", rows.swiglu, operands, 12 * cols, 20 * cols
