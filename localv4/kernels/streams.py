"""Hyper-connections: what a block leaves in the streams, and what the next one reads first.

A site turns the n streams of a token into the weights of its mix (`kernels.mixes`), for which it
multiplies all of them with a matrix `fn` of `rows` rows. That happens while the streams are in the
cache: right after the block before has written into them, for blocks of COLUMNS columns of hidden,
so that even a single token occupies many threads.

The results wait in partials (tokens, hidden / COLUMNS, partial_row(rows)) f32: for each block of
columns the dot products of the streams with the rows of fn, in the place of the last row (rows
rounded up to a multiple of four) + 1 the sum of their squares, then whatever it was.
"""

import numpy as np
from llvmlite import ir
from numba import types

from localv4.kernels import simd_ir
from localv4.kernels.arrays import Floats
from localv4.kernels.buffers import aligned_bytes
from localv4.kernels.compiler import entry
from localv4.kernels.device import device
from localv4.kernels.isa import ISA
from localv4.kernels.operation import take_chunk, word
from localv4.kernels.rows import sum_of_squares
from localv4.kernels.simd import (
    add,
    broadcast_f32,
    load_f32,
    multiply,
    multiply_add,
    operation,
    store_f32,
    write_f32,
    zeros_f32,
)
from localv4.kernels.simd_ir import Builder, Value
from localv4.kernels.stack import stack_floats
from localv4.kernels.vectors import f32x16

MOST_STREAMS = 8
"""Streams that a token can have here."""

COLUMNS = 128
"""Columns of a stream that are one piece of work."""

TOGETHER = 8
"""Tokens that share one piece of the matrix while it is in the first cache."""

_ROWS = 4  # of fn, multiplied together
_PIECE = 4 * COLUMNS  # bytes of a block of columns of a stream
_BY_TWO = ISA.level == "avx512-vnni"  # the sums of two tokens fit the registers

_pieces = stack_floats(TOGETHER * MOST_STREAMS * COLUMNS)


def pack_mixing(fn: Floats, n: int) -> Floats:
    """Return the matrix of a site (rows, n * hidden) in the order in which it is read.

    Blocks of columns; in each, groups of four rows; in each, sixteen columns of the four rows for
    all such columns of the first stream, then of the next ones. Missing rows are zeros.
    """
    rows, hidden = fn.shape[0], fn.shape[1] // n
    padded = np.zeros((-(-rows // _ROWS) * _ROWS, fn.shape[1]), np.float32)
    padded[:rows] = fn
    parts = padded.reshape(-1, _ROWS, n, hidden // COLUMNS, COLUMNS // 16, 16)
    packed = aligned_bytes(padded.nbytes).view(np.float32)
    packed[:] = parts.transpose(3, 0, 2, 4, 1, 5).ravel()
    return packed


def partial_row(rows: int) -> int:
    """Return the floats of a block in the partials of a matrix with so many rows."""
    return (rows + _ROWS) // 16 * 16 + 16


def partial_squares(rows: int) -> int:
    """Return where in such a row the sum of squares is."""
    return (rows + _ROWS - 1) // _ROWS * _ROWS


row_floats, squares_at = device(partial_row), device(partial_squares)


@entry("fast")
def leave_and_mix(operation: int, member: int, members: int) -> None:
    """Write the update of a block into the streams, and multiply them with the next site's matrix.

    stream k = post[k] * update + sum over j of comb[j, k] * stream j, in place. The update is the
    sum of two where there is a second one.
    Words: streams (tokens, n, hidden) f32, update, second update or 0, their row stride in floats,
    mix (tokens, n + n * n) f32: post, comb of the site that is left, or 0: the streams stay as they
    are; fn: the matrix as `pack_mixing` gives it, rows: how many it has, 0: there is no next site;
    partials, tokens, n, hidden.
    """
    streams, update, second = word(operation, 1), word(operation, 2), word(operation, 3)
    stride, mix = word(operation, 4), word(operation, 5)
    fn, rows, partials = word(operation, 6), word(operation, 7), word(operation, 8)
    tokens, n, hidden = word(operation, 9), word(operation, 10), word(operation, 11)
    blocks = hidden // COLUMNS
    panels_bytes, out_bytes = squares_at(rows) * n * _PIECE, 4 * row_floats(rows)
    pieces = _pieces()
    taken = take_chunk(operation)
    while taken < -(-tokens // TOGETHER) * blocks:
        first, block = taken // blocks * TOGETHER, taken % blocks
        count = min(TOGETHER, tokens - first)
        for i in range(count):
            t = first + i
            piece, source = pieces + i * n * _PIECE, streams + 4 * n * hidden * t + _PIECE * block
            if mix == 0:
                copy_piece(piece, _PIECE, source, 4 * hidden, n)
                continue
            at = 4 * stride * t + _PIECE * block
            own = 0 if second == 0 else second + at
            write_left(piece, source, 4 * hidden, update + at, own, mix + 4 * (n + n * n) * t, n)
            copy_piece(source, 4 * hidden, piece, _PIECE, n)
        if rows > 0:
            out = partials + (first * blocks + block) * out_bytes
            panels = fn + panels_bytes * block
            write_partials(out, blocks * out_bytes, panels, rows, pieces, count, n)
        taken = take_chunk(operation)


@device
def copy_piece(out: int, out_stride: int, source: int, stride: int, n: int) -> None:
    """Copy a block of columns of all streams; strides in bytes."""
    for j in range(n):
        for c in range(0, _PIECE, 64):
            store_f32(out + j * out_stride + c, load_f32(source + j * stride + c))


@device
def write_left(
    out: int, streams: int, stride: int, update: int, second: int, mix: int, n: int
) -> None:
    """Write a block of columns of all streams as they are after an update to out (n, COLUMNS)."""
    for k in range(n):
        post = broadcast_f32(mix + 4 * k)
        for c in range(0, _PIECE, 256):
            u0, u1 = load_f32(update + c), load_f32(update + c + 64)
            u2, u3 = load_f32(update + c + 128), load_f32(update + c + 192)
            if second != 0:
                u0, u1 = add(u0, load_f32(second + c)), add(u1, load_f32(second + c + 64))
                u2, u3 = add(u2, load_f32(second + c + 128)), add(u3, load_f32(second + c + 192))
            u0, u1 = multiply(post, u0), multiply(post, u1)
            u2, u3 = multiply(post, u2), multiply(post, u3)
            for j in range(n):
                factor, source = broadcast_f32(mix + 4 * (n + n * j + k)), streams + j * stride + c
                u0 = multiply_add(factor, load_f32(source), u0)
                u1 = multiply_add(factor, load_f32(source + 64), u1)
                u2 = multiply_add(factor, load_f32(source + 128), u2)
                u3 = multiply_add(factor, load_f32(source + 192), u3)
            target = out + k * _PIECE + c
            store_f32(target, u0)
            store_f32(target + 64, u1)
            store_f32(target + 128, u2)
            store_f32(target + 192, u3)


@device
def write_partials(
    out: int, stride: int, panels: int, rows: int, pieces: int, count: int, n: int
) -> None:
    """Multiply pieces (count, n, COLUMNS) with the panels of their columns; `stride` in bytes."""
    groups, size = squares_at(rows) // _ROWS, n * _PIECE
    for group in range(groups):
        panel, i = panels + group * _ROWS * size, 0
        if _BY_TWO:
            while i + 1 < count:
                at = out + 16 * group + i * stride
                multiply_two(at, at + stride, panel, pieces + i * size, pieces + (i + 1) * size, n)
                i += 2
        while i < count:
            multiply_one(out + 16 * group + i * stride, panel, pieces + i * size, n)
            i += 1
    for i in range(count):
        squares = sum_of_squares(pieces + i * size, n * COLUMNS)
        write_f32(out + i * stride + 4 * squares_at(rows), squares)


@device
def multiply_one(out: int, panel: int, x: int, n: int) -> None:
    """Write the products of four rows with the piece of one token."""
    a0, a1, a2, a3 = zeros_f32(), zeros_f32(), zeros_f32(), zeros_f32()
    for c in range(0, n * _PIECE, 64):
        value, w = load_f32(x + c), panel + _ROWS * c
        a0 = multiply_add(load_f32(w), value, a0)
        a1 = multiply_add(load_f32(w + 64), value, a1)
        a2 = multiply_add(load_f32(w + 128), value, a2)
        a3 = multiply_add(load_f32(w + 192), value, a3)
    store_sums(out, a0, a1, a2, a3)


@device
def multiply_two(out: int, second_out: int, panel: int, x: int, second: int, n: int) -> None:
    """Do what multiply_one does for two tokens."""
    a0, a1, a2, a3 = zeros_f32(), zeros_f32(), zeros_f32(), zeros_f32()
    b0, b1, b2, b3 = zeros_f32(), zeros_f32(), zeros_f32(), zeros_f32()
    for c in range(0, n * _PIECE, 64):
        x_value, y_value, w = load_f32(x + c), load_f32(second + c), panel + _ROWS * c
        row = load_f32(w)
        a0, b0 = multiply_add(row, x_value, a0), multiply_add(row, y_value, b0)
        row = load_f32(w + 64)
        a1, b1 = multiply_add(row, x_value, a1), multiply_add(row, y_value, b1)
        row = load_f32(w + 128)
        a2, b2 = multiply_add(row, x_value, a2), multiply_add(row, y_value, b2)
        row = load_f32(w + 192)
        a3, b3 = multiply_add(row, x_value, a3), multiply_add(row, y_value, b3)
    store_sums(out, a0, a1, a2, a3)
    store_sums(second_out, b0, b1, b2, b3)


@operation(types.void, types.int64, f32x16, f32x16, f32x16, f32x16)
def store_sums(b: Builder, address: Value, v0: Value, v1: Value, v2: Value, v3: Value) -> None:
    """Write the sums of all lanes of four vectors, each added up as `simd.sum_f32` does."""
    quarters = []
    for value in (v0, v1, v2, v3):
        eighth = b.fadd(simd_ir.part(b, value, 0, 8), simd_ir.part(b, value, 1, 8))
        quarters.append(b.fadd(simd_ir.part(b, eighth, 0, 4), simd_ir.part(b, eighth, 1, 4)))
    low = _add_selected(b, quarters[0], quarters[1], (0, 1, 4, 5), (2, 3, 6, 7))
    high = _add_selected(b, quarters[2], quarters[3], (0, 1, 4, 5), (2, 3, 6, 7))
    sums = _add_selected(b, low, high, (0, 2, 4, 6), (1, 3, 5, 7))
    simd_ir.store(b, sums, address)


def _add_selected(
    b: Builder, x: Value, y: Value, lanes: tuple[int, ...], others: tuple[int, ...]
) -> Value:
    kind = ir.VectorType(simd_ir.I32, 4)
    first = b.shuffle_vector(x, y, simd_ir.constant(kind, lanes))
    return b.fadd(first, b.shuffle_vector(x, y, simd_ir.constant(kind, others)))
