"""Programs: lists of operations on memory addresses that a team of threads runs together.

A program is an array (operations, WORDS) of i64. Word 0 says what to do, the last word counts the
chunks of work that have been taken, the others are the operands in the order below. All members run
each operation, and none begins the next before all have finished, except after an operation whose
word ALONGSIDE is 1: that one shares its inputs with the next and both may run at the same time.
Members take chunks of row groups as they come, so a slow core holds nobody up; each output is
computed by one member in one order, so who took it changes nothing.

| operation | operands |
|---|---|
| STORED | see below: any storage format, decoded row by row, any number of tokens |
| QUANTIZE | x, blocks of 32 values, q, d, b |
| MATVEC | format, matrix, row groups, columns, q (F8: x), d (F8: scale), b, out |
| GATE_UP | format, records, count, row groups, columns, q, d, b, h, limit as f32 bits |
| DOWN | format, records, count, row groups, columns, q, d, b, out, weights, offset in a record |

Words of STORED: format, data, rows, bytes of a row, scale, its columns, x, tokens, columns of x,
groups, out, scratch, columns of scratch. Scratch has a row for each member.

A format of the others is an index into `packed.FORMATS`. `records` is the address of `count`
addresses of packed experts; h (count, width) f32 is their hidden layer, `weights` (count,) f32
their share in `out`.
"""

import numpy as np
from numba import carray

from localv4.kernels import activations, packed
from localv4.kernels.blocks import FP4
from localv4.kernels.device import device
from localv4.kernels.matmul import product_rows
from localv4.kernels.matvec import (
    expert_down_mx4,
    expert_down_q4,
    expert_down_q8,
    expert_gate_up_mx4,
    expert_gate_up_q4,
    expert_gate_up_q8,
    matvec_f8,
    matvec_mx4,
    matvec_q4,
    matvec_q8,
)
from localv4.kernels.memory import atomic_add, atomic_load, pointer_to
from localv4.kernels.simd import read_u32, store_f32, zeros_f32

WORDS = 16
ALONGSIDE, COUNTER = 14, 15
QUANTIZE, MATVEC, GATE_UP, DOWN, STORED = range(5)
_MX4, _Q4, _Q8, _F8 = range(4)
assert (packed.MX4, packed.Q4, packed.Q8, packed.F8) == packed.FORMATS

LARGEST_CHUNK = 16
"""Row groups that a member takes at once: enough for the prefetchers to get going."""

QUANTIZE_CHUNK = 8
"""Blocks of 32 activations that a member takes at once."""


@device
def word(operation: int, index: int) -> int:
    """Return a word of an operation."""
    value: int = atomic_load(operation + 8 * index)
    return value


@device
def float_at(address: int) -> np.float32:
    """Return the f32 at an address."""
    value: np.float32 = np.uint32(read_u32(address)).view(np.float32)
    return value


@device
def take_chunk(operation: int) -> int:
    """Return the number of a chunk that nobody else has taken."""
    taken: int = atomic_add(operation + 8 * COUNTER, 1)
    return taken


@device
def chunk_groups(groups: int, members: int) -> int:
    """Return how many row groups make a chunk: at least four chunks for each member."""
    return max(1, min(LARGEST_CHUNK, groups // (4 * members)))


@device
def run_operation(operation: int, member: int, members: int) -> None:
    """Do a member's share of the operation at an address."""
    kind = word(operation, 0)
    if kind == QUANTIZE:
        quantize(operation)
    elif kind == MATVEC:
        matvec(operation, members)
    elif kind == GATE_UP:
        gate_up(operation, members)
    elif kind == DOWN:
        down(operation, members)
    elif kind == STORED:
        stored(operation, member, members)


@device
def stored(operation: int, member: int, members: int) -> None:
    """out = matrix . x for all tokens, in the arithmetic of `matmul`."""
    fmt, rows, row_bytes = word(operation, 1), word(operation, 3), word(operation, 4)
    tokens, width, groups = word(operation, 8), word(operation, 9), word(operation, 10)
    scale_rows = rows if fmt == FP4 else -(-rows // packed.F8_SPAN)
    data = carray(pointer_to(word(operation, 2)), (rows, row_bytes), np.uint8)
    scale = carray(pointer_to(word(operation, 5)), (scale_rows, word(operation, 6)), np.uint8)
    x = carray(pointer_to(word(operation, 7)), (tokens, width), np.float32)
    out = carray(pointer_to(word(operation, 11)), (tokens, rows), np.float32)
    scratch = carray(pointer_to(word(operation, 12)), (members, word(operation, 13)), np.float32)
    chunk = max(1, min(LARGEST_CHUNK * packed.GROUP_ROWS, rows // (4 * members)))
    first = take_chunk(operation) * chunk
    while first < rows:
        end = min(first + chunk, rows)
        product_rows(out, x, fmt, data, scale, groups, scratch[member], first, end)
        first = take_chunk(operation) * chunk


@device
def quantize(operation: int) -> None:
    """Round activations to int8 with a scale for each block of 32."""
    x, blocks = word(operation, 1), word(operation, 2)
    q, d, b = word(operation, 3), word(operation, 4), word(operation, 5)
    first = take_chunk(operation) * QUANTIZE_CHUNK
    while first < blocks:
        activations.quantize(q, d, b, x, first, min(first + QUANTIZE_CHUNK, blocks))
        first = take_chunk(operation) * QUANTIZE_CHUNK


@device
def matvec(operation: int, members: int) -> None:
    """out = matrix . x for one token."""
    fmt, w, groups = word(operation, 1), word(operation, 2), word(operation, 3)
    cols, q, d = word(operation, 4), word(operation, 5), word(operation, 6)
    b, out = word(operation, 7), word(operation, 8)
    chunk = chunk_groups(groups, members)
    g0 = take_chunk(operation) * chunk
    while g0 < groups:
        g1 = min(g0 + chunk, groups)
        if fmt == _MX4:
            matvec_mx4(out, w, g0, g1, cols, q, d, b)
        elif fmt == _Q4:
            matvec_q4(out, w, g0, g1, cols, q, d, b)
        elif fmt == _Q8:
            matvec_q8(out, w, g0, g1, cols, q, d, b)
        elif fmt == _F8:
            matvec_f8(out, w, g0, g1, cols, q, d)
        g0 = take_chunk(operation) * chunk


@device
def gate_up(operation: int, members: int) -> None:
    """h[e] = silu(gate_e . x) * (up_e . x), clamped, for each expert e."""
    fmt, records, count = word(operation, 1), word(operation, 2), word(operation, 3)
    groups, cols = word(operation, 4), word(operation, 5)
    q, d, b = word(operation, 6), word(operation, 7), word(operation, 8)
    h, limit = word(operation, 9), float_at(operation + 8 * 10)
    chunk = chunk_groups(groups, members)
    chunks = -(-groups // chunk)
    taken = take_chunk(operation)
    while taken < count * chunks:
        expert, g0 = taken // chunks, taken % chunks * chunk
        g1 = min(g0 + chunk, groups)
        w = word(records, expert)
        out = h + expert * groups * packed.GROUP_ROWS * 4
        if fmt == _MX4:
            expert_gate_up_mx4(out, w, g0, g1, cols, q, d, b, limit)
        elif fmt == _Q4:
            expert_gate_up_q4(out, w, g0, g1, cols, q, d, b, limit)
        elif fmt == _Q8:
            expert_gate_up_q8(out, w, g0, g1, cols, q, d, b, limit)
        taken = take_chunk(operation)


@device
def down(operation: int, members: int) -> None:
    """out = sum over the experts e, in their order, of weights[e] * down_e . h[e]."""
    fmt, records, count = word(operation, 1), word(operation, 2), word(operation, 3)
    groups, cols = word(operation, 4), word(operation, 5)
    q, d, b = word(operation, 6), word(operation, 7), word(operation, 8)
    out, weights, offset = word(operation, 9), word(operation, 10), word(operation, 11)
    blocks = cols // packed.BLOCK
    chunk = chunk_groups(groups, members)
    g0 = take_chunk(operation) * chunk
    while g0 < groups:
        g1 = min(g0 + chunk, groups)
        for g in range(g0, g1):
            store_f32(out + 64 * g, zeros_f32())
        for e in range(count):
            w, weight = word(records, e) + offset, float_at(weights + 4 * e)
            eq, ed, eb = q + e * cols, d + 4 * e * blocks, b + 8 * e * blocks
            if fmt == _MX4:
                expert_down_mx4(out, w, g0, g1, cols, eq, ed, eb, weight)
            elif fmt == _Q4:
                expert_down_q4(out, w, g0, g1, cols, eq, ed, eb, weight)
            elif fmt == _Q8:
                expert_down_q8(out, w, g0, g1, cols, eq, ed, eb, weight)
        g0 = take_chunk(operation) * chunk
