"""Hyper-connections: what a block leaves in the streams, and what the next one reads first.

A site turns the n streams of a token into the weights of its mix (`kernels.mixes`), for which it
multiplies all of them with a matrix `fn` of `rows` rows. That happens while the streams are in the
cache: right after the block before has written into them, for blocks of COLUMNS columns of hidden,
so that even a single token occupies many threads.

The results wait in partials (tokens, hidden / COLUMNS, partial_row(rows)) f32: for each block of
columns the dot products of the streams with the rows of fn, and at partial_squares(rows) the sum of
their squares; the other floats are of no meaning.
"""

from typing import Any

import numpy as np
from llvmlite import ir
from numba import types
from numba.core import cgutils

from localv4.kernels import simd_ir
from localv4.kernels.arrays import Floats
from localv4.kernels.buffers import aligned_bytes
from localv4.kernels.compiler import entry
from localv4.kernels.device import device
from localv4.kernels.isa import ISA
from localv4.kernels.operation import take_chunk, word
from localv4.kernels.readers import prefetch_lines
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
)
from localv4.kernels.simd_ir import FLOATS, I64, Builder, Value
from localv4.kernels.stack import stack_floats
from localv4.kernels.vectors import f32x16

MOST_STREAMS = 8
"""Streams that a token can have here."""

COLUMNS = 128
"""Columns of a stream that are one piece of work."""

_TOGETHER = 8  # tokens that share a panel of the matrix while it is in the first cache
_GROUP = 32  # tokens that share the panels of a block of columns while they are in the second
_ROWS = 4  # of fn, multiplied together
_PIECE = 4 * COLUMNS  # bytes of a block of columns of a stream
_TILE = 4 if ISA.level == "avx512-vnni" else 1  # tokens multiplied together: registers for sums

_pieces = stack_floats(_TOGETHER * MOST_STREAMS * COLUMNS)


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
    tokens, blocks = word(operation, 9), word(operation, 11) // COLUMNS
    pieces = _pieces()
    taken = take_chunk(operation)
    while taken < -(-tokens // _GROUP) * blocks:
        first, block = taken // blocks * _GROUP, taken % blocks
        end = min(first + _GROUP, tokens)
        for t in range(first, end, _TOGETHER):
            count = min(_TOGETHER, end - t)
            leave(operation, pieces, t, count, block)
            if word(operation, 7) > 0:
                mix(operation, pieces, t, count, block)
        taken = take_chunk(operation)


@device
def leave(operation: int, pieces: int, first: int, count: int, block: int) -> None:
    """Update a block of columns of some tokens, and put it into pieces (count, n, COLUMNS)."""
    update, second, stride = word(operation, 2), word(operation, 3), word(operation, 4)
    factors, n, hidden = word(operation, 5), word(operation, 10), word(operation, 11)
    streams = word(operation, 1) + 4 * n * hidden * first + _PIECE * block
    for i in range(count):
        piece, source = pieces + i * n * _PIECE, streams + 4 * n * hidden * i
        if factors == 0:
            copy_piece(piece, _PIECE, source, 4 * hidden, n)
            continue
        at = 4 * stride * (first + i) + _PIECE * block
        own = factors + 4 * (n + n * n) * (first + i)
        write_left(
            piece, source, 4 * hidden, update + at, second + at if second != 0 else 0, own, n
        )
        copy_piece(source, 4 * hidden, piece, _PIECE, n)


@device
def mix(operation: int, pieces: int, first: int, count: int, block: int) -> None:
    """Multiply pieces (count, n, COLUMNS) with the panels of their columns."""
    rows, partials = word(operation, 7), word(operation, 8)
    n, blocks = word(operation, 10), word(operation, 11) // COLUMNS
    size, row = n * _PIECE, 4 * row_floats(rows)
    panel = word(operation, 6) + squares_at(rows) * size * block
    out, stride = partials + (first * blocks + block) * row, blocks * row
    for at in range(0, 4 * squares_at(rows), 4 * _ROWS):
        i = 0
        while i + _TILE <= count:
            multiply_tile(out + at + i * stride, stride, panel, pieces + i * size, n)
            i += _TILE
        while i < count:
            multiply_one(out + at + i * stride, stride, panel, pieces + i * size, n)
            i += 1
        panel += _ROWS * size
    for i in range(count):
        squares = sum_of_squares(pieces + i * size, n * COLUMNS)
        write_f32(out + i * stride + 4 * squares_at(rows), squares)


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


def _products(tokens: int) -> Any:
    """Make the function that multiplies four rows with the pieces of some tokens."""
    sums = types.UniTuple(f32x16, _ROWS * tokens)

    @operation(sums)
    def no_sums(b: Builder) -> list[Value]:
        return [simd_ir.filled(FLOATS, 0.0)] * (_ROWS * tokens)

    @operation(sums, sums, types.int64, types.int64, types.int64)
    def add_products(b: Builder, before: Value, panel: Value, x: Value, size: Value) -> list[Value]:
        totals: list[Value] = cgutils.unpack_tuple(b, before)
        values = [
            simd_ir.load(b, FLOATS, b.add(x, b.mul(size, ir.Constant(I64, token))))
            for token in range(tokens)
        ]
        for row in range(_ROWS):
            weights = simd_ir.load(b, FLOATS, simd_ir.offset(b, panel, 64 * row))
            for token, value in enumerate(values):
                i = _ROWS * token + row
                totals[i] = simd_ir.multiply_add(b, weights, value, totals[i])
        return totals

    @operation(types.void, types.int64, types.int64, sums)
    def store_sums(b: Builder, address: Value, stride: Value, done: Value) -> None:
        totals = cgutils.unpack_tuple(b, done)
        for token in range(tokens):
            folded = _fold_four(b, totals[_ROWS * token : _ROWS * (token + 1)])
            simd_ir.store(b, folded, b.add(address, b.mul(stride, ir.Constant(I64, token))))

    @device
    def multiply_pieces(out: int, stride: int, panel: int, x: int, n: int) -> None:
        total = no_sums()
        for c in range(0, n * _PIECE, 64):
            if tokens == 1:
                prefetch_lines(panel + _ROWS * c, _ROWS)
            total = add_products(total, panel + _ROWS * c, x + c, n * _PIECE)
        store_sums(out, stride, total)

    return multiply_pieces


multiply_one, multiply_tile = _products(1), _products(_TILE)


def _fold_four(b: Builder, vectors: list[Value]) -> Value:
    """Return the sums of all lanes of four vectors, each added up as `simd.sum_f32` does."""
    first, second = _fold(b, vectors[0], vectors[1], 8), _fold(b, vectors[2], vectors[3], 8)
    sums = _fold(b, first, second, 4)
    for distance in (2, 1):
        sums = _fold(b, sums, simd_ir.undefined(sums.type), distance)
    return simd_ir.part(b, sums, 0, _ROWS)


def _fold(b: Builder, x: Value, y: Value, distance: int) -> Value:
    """Add lanes of x and of y at a distance of each other; return x's sums, then y's."""
    lanes = [lane for lane in range(2 * simd_ir.LANES) if not lane & distance]
    others = b.shuffle_vector(x, y, simd_ir.constant(simd_ir.INTS, [i + distance for i in lanes]))
    return b.fadd(b.shuffle_vector(x, y, simd_ir.constant(simd_ir.INTS, lanes)), others)
