"""Operations on one token: rounding of activations, mat-vecs, and the experts of the token."""

from localv4.kernels import activations, packed
from localv4.kernels.device import device
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
from localv4.kernels.operation import F8, MX4, Q4, Q8, chunk_groups, float_at, take_chunk, word
from localv4.kernels.simd import store_f32, zeros_f32

QUANTIZE_CHUNK = 8
"""Blocks of 32 activations that a member takes at once."""


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
        if fmt == MX4:
            matvec_mx4(out, w, g0, g1, cols, q, d, b)
        elif fmt == Q4:
            matvec_q4(out, w, g0, g1, cols, q, d, b)
        elif fmt == Q8:
            matvec_q8(out, w, g0, g1, cols, q, d, b)
        elif fmt == F8:
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
        if fmt == MX4:
            expert_gate_up_mx4(out, w, g0, g1, cols, q, d, b, limit)
        elif fmt == Q4:
            expert_gate_up_q4(out, w, g0, g1, cols, q, d, b, limit)
        elif fmt == Q8:
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
            if fmt == MX4:
                expert_down_mx4(out, w, g0, g1, cols, eq, ed, eb, weight)
            elif fmt == Q4:
                expert_down_q4(out, w, g0, g1, cols, eq, ed, eb, weight)
            elif fmt == Q8:
                expert_down_q8(out, w, g0, g1, cols, eq, ed, eb, weight)
        g0 = take_chunk(operation) * chunk
