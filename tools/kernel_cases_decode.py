"""Products of one token at the dimensions of DeepSeek-V4-Flash, to be timed on their own."""

import numpy as np
from kernel_cases import (
    CHOSEN,
    EPS,
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

from localv4.kernels import float_operations, rows
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
from localv4.kernels.single_token import ROW_GAP, quantize

DENSE = {
    "wq_a": (1024, HIDDEN),
    "wkv": (512, HIDDEN),
    "wq_b": (32768, 1024),
    "wo_a block": (1024, HIDDEN),
    "wo_b": (HIDDEN, 8192),
    "head": (129280, HIDDEN),
}


def cases() -> list[Case]:
    """Return all cases: products, and the small operations between them."""
    small = [_quantize(1, HIDDEN), _quantize(CHOSEN, INNER), _norm(HIDDEN), _swiglu(INNER)]
    return [*products(), *small]


def products() -> list[Case]:
    """Return those of experts and of dense matrices."""
    found = []
    for name in INTEGERS:
        found += [_gate_up(name, 1), _gate_up(name, CHOSEN), _down(name)]
    for name in ("Q8", "Q4", "MX4"):
        found += [_matvec(name, part, *shape) for part, shape in DENSE.items()]
    found += [_float_matvec("F8", part, *shape) for part, shape in DENSE.items()]
    found += [_float_matvec(name, "router", *ROUTER) for name in ("B16", "F32R")]
    return found


def _matvec(name: str, part: str, rows: int, cols: int) -> Case:
    nbytes = packed_bytes(INTEGERS[name], rows, cols)

    def operands(memory: Memory) -> list[int]:
        matrix = (memory.random(nbytes), rows // GROUP_ROWS, cols)
        return [*matrix, *rounded(memory, 1, cols), memory.random(4 * rows)]

    title = f"{name} matvec {part} {rows} x {cols}"
    total = nbytes + rounded_bytes(1, cols) + 4 * rows
    return title, OPERATIONS[name].matvec, operands, total, 2 * rows * cols


def _float_matvec(name: str, part: str, rows: int, cols: int) -> Case:
    is_f8 = name == "F8"
    nbytes = packed_bytes(F8, rows, cols) if is_f8 else float_bytes(FLOATS[name], rows, cols)
    scales = -(-rows // F8_SPAN) * (cols // F8_SPAN)

    def operands(memory: Memory) -> list[int]:
        matrix = (memory.random(nbytes), rows // GROUP_ROWS, cols, floats(memory, cols))
        return [*matrix, floats(memory, scales) if is_f8 else 0, 0, memory.random(4 * rows)]

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
        return [*experts, *rounded(memory, 1, HIDDEN), hidden, LIMIT]

    total = count * (down_offset(fmt, HIDDEN, INNER) + 4 * INNER) + rounded_bytes(1, HIDDEN)
    title = f"{name} gate_up of {count}: 2 x {INNER} x {HIDDEN}"
    return title, OPERATIONS[name].gate_up, operands, total, 4 * count * INNER * HIDDEN


def _down(name: str) -> Case:
    fmt = INTEGERS[name]

    def operands(memory: Memory) -> list[int]:
        experts = (_records(memory, fmt, CHOSEN), CHOSEN, HIDDEN // GROUP_ROWS, INNER)
        out, shares = memory.random(4 * HIDDEN), floats(memory, CHOSEN)
        offset = down_offset(fmt, HIDDEN, INNER)
        return [*experts, *rounded(memory, CHOSEN, INNER), out, shares, offset, 0]

    total = CHOSEN * packed_bytes(fmt, HIDDEN, INNER) + rounded_bytes(CHOSEN, INNER) + 4 * HIDDEN
    title = f"{name} down of {CHOSEN}: {HIDDEN} x {INNER}"
    return title, OPERATIONS[name].down, operands, total, 2 * CHOSEN * INNER * HIDDEN


def _quantize(count: int, cols: int) -> Case:
    def operands(memory: Memory) -> list[int]:
        x = floats(memory, count * cols)
        return [x, cols, 0, count, cols, *rounded(memory, count, cols)]

    total = 4 * count * cols + rounded_bytes(count, cols)
    return f"quantize {count} x {cols}", quantize, operands, total, 2 * count * cols


def _norm(cols: int) -> Case:
    def operands(memory: Memory) -> list[int]:
        x, weight, out = (floats(memory, cols) for _ in range(3))
        return [x, cols, weight, EPS, out, cols, *rounded(memory, 1, cols), 1, cols]

    return f"norm {cols}", rows.norm, operands, 12 * cols + rounded_bytes(1, cols), 4 * cols


def _swiglu(cols: int) -> Case:
    def operands(memory: Memory) -> list[int]:
        gate, up = floats(memory, cols), floats(memory, cols)
        return [gate, up, cols, gate, cols, LIMIT, 1, cols]

    return f"swiglu {cols}", rows.swiglu, operands, 12 * cols, 20 * cols
