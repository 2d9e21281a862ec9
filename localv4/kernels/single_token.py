"""Operations on one token: rounding of activations, mat-vecs, and the experts of the token.

The bodies here take the kernel of a format as an argument; `kernels.formats` makes operations of
them. `records` is the address of `count` addresses of packed experts, 0 for one that another
operation computes; h (count, width + 16) f32 is their hidden layer, `weights` (count,) f32 their
share in `out`.
"""

from typing import Any

from localv4.kernels import activations, packed
from localv4.kernels.compiler import entry
from localv4.kernels.device import device
from localv4.kernels.operation import (
    float_at,
    float_word,
    piece,
    share,
    take_chunk,
    take_piece,
    word,
)
from localv4.kernels.pairs import PAIRS_ROW
from localv4.kernels.simd import store_f32, zeros_f32

ROW_GAP = 16
"""Floats between two rows of activations; see `activations` for the reason."""

LEAST_BLOCKS, MOST_BLOCKS = 16, 256
"""Blocks that a member rounds at once: asking for the next ones takes as long as rounding ten."""


@entry("fast")
def quantize(operation: int, member: int, members: int) -> None:
    """Round rows of activations to int8 with a scale for each block of 32.

    Words: x, its row stride in floats, rows (i64: the row of x for each row of the result; 0: all
    in order), count, columns, q, d, b, 1 for scales that are powers of two;
    then pairs and their distance (`kernels.pairs`), or 0: these, too.
    """
    x, stride, rows = word(operation, 1), word(operation, 2), word(operation, 3)
    count, cols = word(operation, 4), word(operation, 5)
    q, d, b = word(operation, 6), word(operation, 7), word(operation, 8)
    binary, pairs, distance = word(operation, 9), word(operation, 10), word(operation, 11)
    blocks = cols // packed.BLOCK
    total = count * blocks
    chunk = max(LEAST_BLOCKS, min(MOST_BLOCKS, total // (8 * members)))
    at = take_chunk(operation) * chunk
    while at < total:
        end = min(at + chunk, total)
        while at < end:
            row, first = at // blocks, at % blocks
            last = min(first + end - at, blocks)
            source = x + 4 * stride * (row if rows == 0 else word(rows, row))
            own_q, own_d = q + row * activations.q_row(cols), d + row * activations.d_row(cols)
            own_b = b + row * activations.b_row(cols)
            activations.quantize(own_q, own_d, own_b, source, first, last, binary)
            if pairs != 0:
                activations.widen(pairs + PAIRS_ROW * row, distance, own_q, own_d, first, last)
            at += last - first
        at = take_chunk(operation) * chunk


@device
def share_matvec(operation: int, members: int, multiply: Any) -> None:
    """out = matrix . x for one token.

    Words: matrix, row groups, columns, q (float weights: x), d (F8: scales), b, out.
    """
    w, groups, cols = word(operation, 1), word(operation, 2), word(operation, 3)
    q, d, b, out = word(operation, 4), word(operation, 5), word(operation, 6), word(operation, 7)
    g0, g1 = take_piece(operation, groups, members)
    while g0 < groups:
        multiply(out, w, g0, g1, cols, q, d, b)
        g0, g1 = take_piece(operation, groups, members)


@device
def share_gate_up(operation: int, members: int, multiply: Any) -> None:
    """h[e] = silu(gate_e . x) * (up_e . x), clamped, for each expert e.

    Words: records, count, row groups, columns, q, d, b, h, limit as f32 bits.
    """
    records, count = word(operation, 1), word(operation, 2)
    groups, cols = word(operation, 3), word(operation, 4)
    q, d, b = word(operation, 5), word(operation, 6), word(operation, 7)
    h, limit = word(operation, 8), float_word(operation, 9)
    g0, g1, expert = expert_piece(take_chunk(operation), count, groups, members)
    while g0 < groups:
        out = h + expert * (groups * packed.GROUP_ROWS + ROW_GAP) * 4
        record = word(records, expert)
        if record != 0:
            multiply(out, record, g0, g1, cols, q, d, b, limit)
        g0, g1, expert = expert_piece(take_chunk(operation), count, groups, members)


@device
def expert_piece(number: int, count: int, groups: int, members: int) -> tuple[int, int, int]:
    """Return piece `number` of `count` matrices: (first, end, matrix); small ones in the last."""
    size = share(groups, members)
    pieces = (groups + size - 1) // size
    before = (count - 1) * pieces
    if number < before:
        first = number % pieces * size
        return first, min(first + size, groups), number // pieces
    first, end = piece(number - before, groups, members)
    return first, end, count - 1


@device
def share_down(operation: int, members: int, multiply: Any) -> None:
    """out = sum over the experts e, in their order, of weights[e] * down_e . h[e].

    Words: records, count, row groups, columns, q, d, b, out, weights, offset in a record, 1 to add
    to what `out` holds.
    """
    records, count = word(operation, 1), word(operation, 2)
    groups, cols = word(operation, 3), word(operation, 4)
    q, d, b = word(operation, 5), word(operation, 6), word(operation, 7)
    out, weights, offset = word(operation, 8), word(operation, 9), word(operation, 10)
    adds = word(operation, 11) != 0
    q_row, d_row, b_row = activations.q_row(cols), activations.d_row(cols), activations.b_row(cols)
    g0, g1 = take_piece(operation, groups, members)
    while g0 < groups:
        if not adds:
            for g in range(g0, g1):
                store_f32(out + 64 * g, zeros_f32())
        for e in range(count):
            record, weight = word(records, e), float_at(weights + 4 * e)
            eq, ed, eb = q + e * q_row, d + e * d_row, b + e * b_row
            if record != 0:
                multiply(out, record + offset, g0, g1, cols, eq, ed, eb, weight)
        g0, g1 = take_piece(operation, groups, members)
