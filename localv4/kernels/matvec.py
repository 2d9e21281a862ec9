"""One token times packed weights, at the speed at which memory delivers them.

Every function takes a range of groups of sixteen rows, so that threads can share a matrix; a row's
result has the same bits whatever the range. Addresses are in bytes: `w` a packed matrix (layouts:
`kernels.packed`), `q`, `d`, `b` the activations (`kernels.activations`), `out` float32 rows. The
weights should start on a cache line and must have 8 KiB of readable or unmapped addresses behind.
"""

from collections.abc import Callable
from typing import Any

import numpy as np

from localv4.kernels import packed
from localv4.kernels.activations import swiglu
from localv4.kernels.device import device
from localv4.kernels.packed import MX4, Q4, Q8
from localv4.kernels.simd import (
    Vector,
    add,
    add_byte_dots,
    add_code_dots,
    add_f8_dots,
    broadcast_f32,
    broadcast_i32,
    load_e8m0,
    load_f16,
    load_f32,
    multiply,
    multiply_add,
    mx4_codes,
    prefetch,
    q4_codes,
    q8_bytes,
    splat_f32,
    store_f32,
    to_f32,
    zeros_f32,
)

# How far ahead of its reads a kernel asks for memory. The hardware alone leaves 10 to 15 % of the
# bandwidth unused; 2 to 8 KiB were measured equal.
AHEAD_BYTES = 4352
MX4_BYTES, Q4_BYTES, Q8_BYTES = (fmt.superblock_bytes for fmt in (MX4, Q4, Q8))
MX4_COLUMNS, Q4_COLUMNS, Q8_COLUMNS = (fmt.columns for fmt in (MX4, Q4, Q8))
_HALF = np.float32(0.5)
_F8_UNIT = np.float32(256)


@device
def prefetch_lines(address: int, count: int) -> None:
    """Ask for the `count` cache lines that lie AHEAD_BYTES behind an address."""
    for line in range(count):
        prefetch(address + AHEAD_BYTES + 64 * line)


@device
def mx4_rows(w: int, cols: int, q: int, d: int, b: int) -> Vector:
    """Return the products of one group of MX4."""
    acc = zeros_f32()
    for _ in range(cols // MX4_COLUMNS):
        prefetch_lines(w, MX4_BYTES // 64)
        for i in range(4):
            dots = add_code_dots(broadcast_i32(b + 8 * i), mx4_codes(w + 64 + 256 * i), q + 32 * i)
            scale = multiply(load_e8m0(w + 16 * i), broadcast_f32(d + 4 * i))
            acc = multiply_add(to_f32(dots), scale, acc)
        w, q, d, b = w + MX4_BYTES, q + 128, d + 16, b + 32
    return multiply(acc, splat_f32(_HALF))  # the codes were decoded to twice their value


@device
def q4_rows(w: int, cols: int, q: int, d: int, b: int) -> Vector:
    """Return the products of one group of Q4."""
    acc = zeros_f32()
    for _ in range(cols // Q4_COLUMNS):
        prefetch_lines(w, Q4_BYTES // 64)
        for i in range(2):
            dots = add_code_dots(broadcast_i32(b + 8 * i), q4_codes(w + 64 + 256 * i), q + 32 * i)
            scale = multiply(load_f16(w + 32 * i), broadcast_f32(d + 4 * i))
            acc = multiply_add(to_f32(dots), scale, acc)
        w, q, d, b = w + Q4_BYTES, q + 64, d + 8, b + 16
    return acc


@device
def q8_rows(w: int, cols: int, q: int, d: int, b: int) -> Vector:
    """Return the products of one group of Q8."""
    acc = zeros_f32()
    for _ in range(cols // Q8_COLUMNS):
        prefetch_lines(w, Q8_BYTES // 64)
        for i in range(2):
            start = broadcast_i32(b + 8 * i + 4)
            dots = add_byte_dots(start, q8_bytes(w + 64 + 512 * i), q + 32 * i)
            scale = multiply(load_f16(w + 32 * i), broadcast_f32(d + 4 * i))
            acc = multiply_add(to_f32(dots), scale, acc)
        w, q, d, b = w + Q8_BYTES, q + 64, d + 8, b + 16
    return acc


@device
def f8_rows(w: int, cols: int, x: int, scale: int) -> Vector:
    """Return the products of one group of F8 with float32 at x; scale: its row of scales."""
    acc = zeros_f32()
    for span in range(cols // packed.F8_SPAN):
        a0, a1, a2, a3 = zeros_f32(), zeros_f32(), zeros_f32(), zeros_f32()
        for _ in range(packed.F8_SPAN // 16):
            prefetch_lines(w, 4)
            a0 = add_f8_dots(a0, w, x)
            a1 = add_f8_dots(a1, w + 64, x + 16)
            a2 = add_f8_dots(a2, w + 128, x + 32)
            a3 = add_f8_dots(a3, w + 192, x + 48)
            w, x = w + 256, x + 64
        acc = multiply_add(add(add(a0, a1), add(a2, a3)), broadcast_f32(scale + 4 * span), acc)
    return multiply(acc, splat_f32(_F8_UNIT))


@device
def matvec_f8(out: int, w: int, g0: int, g1: int, cols: int, x: int, scale: int) -> None:
    """Write the rows of groups g0 ... g1 - 1; x: float32; scale: float32 (rows / 128, cols / 128).

    The weights are exact and the activations not rounded.
    """
    for g in range(g0, g1):
        row = scale + g * packed.GROUP_ROWS // packed.F8_SPAN * (cols // packed.F8_SPAN) * 4
        rows = f8_rows(w + g * packed.GROUP_ROWS * cols, cols, x, row)
        store_f32(out + 64 * g, rows)


def _products(rows: Any, fmt: packed.PackedFormat) -> tuple[Any, Any, Any]:
    """Make the functions of a format from the one that multiplies a group."""
    columns, superblock_bytes = fmt.columns, fmt.superblock_bytes

    @device
    def matvec(out: int, w: int, g0: int, g1: int, cols: int, q: int, d: int, b: int) -> None:
        size = cols // columns * superblock_bytes
        for g in range(g0, g1):
            store_f32(out + 64 * g, rows(w + g * size, cols, q, d, b))

    @device
    def gate_up(
        out: int, w: int, g0: int, g1: int, cols: int, q: int, d: int, b: int, limit: np.float32
    ) -> None:
        size = cols // columns * superblock_bytes
        for g in range(g0, g1):
            gate = rows(w + 2 * g * size, cols, q, d, b)
            up = rows(w + (2 * g + 1) * size, cols, q, d, b)
            store_f32(out + 64 * g, swiglu(gate, up, limit))

    @device
    def down(
        out: int, w: int, g0: int, g1: int, cols: int, q: int, d: int, b: int, weight: np.float32
    ) -> None:
        size = cols // columns * superblock_bytes
        for g in range(g0, g1):
            before = load_f32(out + 64 * g)
            product = rows(w + g * size, cols, q, d, b)
            store_f32(out + 64 * g, multiply_add(product, splat_f32(weight), before))

    return matvec, gate_up, down


Matvec = Callable[[int, int, int, int, int, int, int, int], None]
Expert = Callable[[int, int, int, int, int, int, int, int, np.float32], None]

matvec_mx4: Matvec
matvec_q4: Matvec
matvec_q8: Matvec
expert_gate_up_mx4: Expert
expert_gate_up_q4: Expert
expert_gate_up_q8: Expert
expert_down_mx4: Expert
expert_down_q4: Expert
expert_down_q8: Expert

matvec_mx4, expert_gate_up_mx4, expert_down_mx4 = _products(mx4_rows, MX4)
matvec_q4, expert_gate_up_q4, expert_down_q4 = _products(q4_rows, Q4)
matvec_q8, expert_gate_up_q8, expert_down_q8 = _products(q8_rows, Q8)
