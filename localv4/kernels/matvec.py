"""One token times packed weights, at the speed at which memory delivers them.

Every function takes a range of groups of sixteen rows, so that threads can share a matrix; a row's
result has the same bits whatever the range. Addresses are in bytes: `w` a packed matrix (layouts:
`kernels.packed`), `q`, `d`, `b` the activations (`kernels.activations`), `out` float32 rows. The
weights should start on a cache line and must have 8 KiB of readable or unmapped addresses behind.
"""

from collections.abc import Callable
from typing import Any

import numpy as np

from localv4.kernels.activations import SUMS_BYTES, swiglu
from localv4.kernels.device import device
from localv4.kernels.packed import MX4, Q4, Q8, PackedFormat
from localv4.kernels.readers import (
    HEAD_BYTES,
    MX4_READER,
    Q4_READER,
    Q8_READER,
    Reader,
    prefetch_pair_lines,
)
from localv4.kernels.simd import (
    Vector,
    broadcast_f32,
    broadcast_i32,
    load_f32,
    multiply,
    multiply_add,
    splat_f32,
    store_f32,
    to_f32,
    zeros_f32,
)

F8_UNIT = np.float32(256)
"""What decoded F8 codes are to be multiplied with."""


def _pair_products(reader: Reader) -> Any:
    """Make the function that multiplies two groups of sixteen rows with one token.

    Two streams of memory keep more requests on their way than one: the two halves of a range, each
    read from its start to its end. Each group is computed in an order of its own, so its result
    does not depend on the other.
    """
    decode, add_dots, load_scale = reader.decode, reader.add_dots, reader.load_scale
    columns, superblock_bytes = reader.fmt.columns, reader.fmt.superblock_bytes
    blocks, block_bytes, scale_bytes = reader.blocks, reader.block_bytes, reader.scale_bytes
    sum_offset, factor = reader.sum_offset, np.float32(reader.factor)

    @device
    def pair(w: int, v: int, cols: int, q: int, d: int, b: int) -> tuple[Vector, Vector]:
        acc_w, acc_v = zeros_f32(), zeros_f32()
        for _ in range(cols // columns):
            prefetch_pair_lines(w, 1)
            prefetch_pair_lines(v, 1)
            for i in range(blocks):
                at = HEAD_BYTES + block_bytes * i
                prefetch_pair_lines(w + at, block_bytes // 64)
                prefetch_pair_lines(v + at, block_bytes // 64)
                start, factors = (
                    broadcast_i32(b + SUMS_BYTES * i + sum_offset),
                    broadcast_f32(d + 4 * i),
                )
                dots = to_f32(add_dots(start, decode(w + at), q + 32 * i))
                acc_w = multiply_add(
                    dots, multiply(load_scale(w + scale_bytes * i), factors), acc_w
                )
                dots = to_f32(add_dots(start, decode(v + at), q + 32 * i))
                acc_v = multiply_add(
                    dots, multiply(load_scale(v + scale_bytes * i), factors), acc_v
                )
            w, v = w + superblock_bytes, v + superblock_bytes
            q, d, b = q + columns, d + 4 * blocks, b + SUMS_BYTES * blocks
        return multiply(acc_w, splat_f32(factor)), multiply(acc_v, splat_f32(factor))

    return pair


@device
def partner(group: int, half: int, end: int) -> int:
    """Return the group that is multiplied beside one of the first half; itself if there is none."""
    return group + half if group + half < end else group


def products(fmt: PackedFormat, pair: Any) -> tuple[Any, Any, Any]:
    """Make the functions of a format: a matrix, gate and up of an expert, down of an expert.

    `pair(w, v, cols, q, d, b)` returns the products of two groups with one token.
    """
    columns, superblock_bytes = fmt.columns, fmt.superblock_bytes

    @device
    def matvec(out: int, w: int, g0: int, g1: int, cols: int, q: int, d: int, b: int) -> None:
        size, half = cols // columns * superblock_bytes, (g1 - g0 + 1) // 2
        for g in range(g0, g0 + half):
            other = partner(g, half, g1)
            first, second = pair(w + g * size, w + other * size, cols, q, d, b)
            store_f32(out + 64 * g, first)
            store_f32(out + 64 * other, second)

    @device
    def gate_up(
        out: int, w: int, g0: int, g1: int, cols: int, q: int, d: int, b: int, limit: np.float32
    ) -> None:
        size, half = cols // columns * superblock_bytes, (g1 - g0 + 1) // 2
        for g in range(g0, g0 + half):
            other = partner(g, half, g1)
            at, at_other = w + 2 * g * size, w + 2 * other * size
            gate, gate_other = pair(at, at_other, cols, q, d, b)
            up, up_other = pair(at + size, at_other + size, cols, q, d, b)
            store_f32(out + 64 * g, swiglu(gate, up, limit))
            store_f32(out + 64 * other, swiglu(gate_other, up_other, limit))

    @device
    def down(
        out: int, w: int, g0: int, g1: int, cols: int, q: int, d: int, b: int, weight: np.float32
    ) -> None:
        size, half = cols // columns * superblock_bytes, (g1 - g0 + 1) // 2
        factor = splat_f32(weight)
        for g in range(g0, g0 + half):
            other = partner(g, half, g1)
            first, second = pair(w + g * size, w + other * size, cols, q, d, b)
            before, before_other = load_f32(out + 64 * g), load_f32(out + 64 * other)
            store_f32(out + 64 * g, multiply_add(first, factor, before))
            store_f32(out + 64 * other, multiply_add(second, factor, before_other))

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

matvec_mx4, expert_gate_up_mx4, expert_down_mx4 = products(MX4, _pair_products(MX4_READER))
matvec_q4, expert_gate_up_q4, expert_down_q4 = products(Q4, _pair_products(Q4_READER))
matvec_q8, expert_gate_up_q8, expert_down_q8 = products(Q8, _pair_products(Q8_READER))
