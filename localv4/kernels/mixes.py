"""Entering a site of the hyper-connections: its weights, the collapsed streams, their norm.

The layout of partials and the limits are those of `kernels.streams`.
"""

from typing import Any

import numpy as np

from localv4.kernels import simd_ir
from localv4.kernels.activations import exp
from localv4.kernels.compiler import entry
from localv4.kernels.device import device
from localv4.kernels.operation import float_at, float_word, take_chunk, word
from localv4.kernels.rows import inverse_size, write_normed
from localv4.kernels.simd import (
    add,
    broadcast_f32,
    divide,
    load_f32,
    multiply_add,
    operation,
    splat_f32,
    store_f32,
    sum_f32,
    write_f32,
    zeros_f32,
)
from localv4.kernels.simd_ir import Builder, Value
from localv4.kernels.stack import stack_floats
from localv4.kernels.streams import COLUMNS, MOST_STREAMS, partial_row, row_floats, squares_at
from localv4.kernels.vectors import f32x16

_ONE = np.float32(1)
_values = stack_floats(partial_row(2 * MOST_STREAMS + MOST_STREAMS * MOST_STREAMS))


@entry("fast")
def enter(operation: int, member: int, members: int) -> None:
    """Collapse the streams of each token into the normed input of a block.

    Words: partials of 2 * n + n * n rows, scale (3) f32, base (rows) f32, Sinkhorn iterations,
    hc_eps as f32 bits, streams (tokens, n, hidden) f32, weight of the norm, rms_eps as f32 bits, x,
    its row stride in floats, mix (tokens, n + n * n) f32: post, comb for `leave_and_mix`, q, d, b
    (q = 0: x is not rounded), tokens, n, hidden, 1 for scales that are powers of two.
    """
    partials, scale, base = word(operation, 1), word(operation, 2), word(operation, 3)
    iterations, hc_eps = word(operation, 4), float_word(operation, 5)
    streams, weight, rms_eps = word(operation, 6), word(operation, 7), float_word(operation, 8)
    x, stride, mix = word(operation, 9), word(operation, 10), word(operation, 11)
    q, d, b = word(operation, 12), word(operation, 13), word(operation, 14)
    tokens, n, hidden = word(operation, 15), word(operation, 16), word(operation, 17)
    binary, rows, blocks = word(operation, 18), 2 * n + n * n, hidden // COLUMNS
    values = _values()
    t = take_chunk(operation)
    while t < tokens:
        own = partials + 4 * t * blocks * row_floats(rows)
        add_partials(values, own, blocks, rows, n * hidden, rms_eps)
        split(values, mix + 4 * t * (n + n * n), scale, base, n, iterations, hc_eps)
        row = x + 4 * stride * t
        squares = collapse(row, streams + 4 * t * n * hidden, values, n, hidden)
        factor = inverse_size(squares, hidden, rms_eps)
        write_normed(row, q, d, b, t, row, weight, factor, hidden, binary)
        t = take_chunk(operation)


@entry("fast")
def enter_head(operation: int, member: int, members: int) -> None:
    """Collapse the streams of each token into the normed input of the output matrix.

    Words: partials of n rows, scale (1) f32, base (n) f32, hc_eps as f32 bits, streams
    (tokens, n, hidden) f32, weight of the norm, rms_eps as f32 bits, x, its row stride in floats,
    q, d, b (q = 0: x is not rounded), tokens, n, hidden.
    """
    partials, scale, base = word(operation, 1), word(operation, 2), word(operation, 3)
    hc_eps, streams = float_word(operation, 4), word(operation, 5)
    weight, rms_eps = word(operation, 6), float_word(operation, 7)
    x, stride = word(operation, 8), word(operation, 9)
    q, d, b = word(operation, 10), word(operation, 11), word(operation, 12)
    tokens, n, hidden = word(operation, 13), word(operation, 14), word(operation, 15)
    blocks = hidden // COLUMNS
    values = _values()
    t = take_chunk(operation)
    while t < tokens:
        add_partials(
            values, partials + 4 * t * blocks * row_floats(n), blocks, n, n * hidden, rms_eps
        )
        for i in range(n):
            logit = float_at(values + 4 * i) * float_at(scale) + float_at(base + 4 * i)
            write_f32(values + 4 * i, -logit)
        store_f32(values, exp(load_f32(values)))
        for i in range(n):
            write_f32(values + 4 * i, _ONE / (_ONE + float_at(values + 4 * i)) + hc_eps)
        row = x + 4 * stride * t
        squares = collapse(row, streams + 4 * t * n * hidden, values, n, hidden)
        factor = inverse_size(squares, hidden, rms_eps)
        write_normed(row, q, d, b, t, row, weight, factor, hidden, 0)
        t = take_chunk(operation)


@device
def add_partials(
    out: int, partials: int, blocks: int, rows: int, width: int, eps: np.float32
) -> None:
    """out = the products of the normed streams with the rows of fn, rounded up to 16 values"""
    row = 4 * row_floats(rows)
    for at in range(0, row, 64):
        total = zeros_f32()
        for block in range(blocks):
            total = add(total, load_f32(partials + block * row + at))
        store_f32(out + at, total)
    factor = inverse_size(float_at(out + 4 * squares_at(rows)), width, eps)
    for i in range(rows):
        write_f32(out + 4 * i, float_at(out + 4 * i) * factor)


@device
def split(
    values: int, mix: int, scale: int, base: int, n: int, iterations: int, eps: np.float32
) -> None:
    """Turn raw mixes into pre, the first n of `values`, and post and the doubly stochastic comb."""
    pre_scale, post_scale, comb_scale = float_at(scale), float_at(scale + 4), float_at(scale + 8)
    for i in range(n):
        at = 4 * i
        write_f32(values + at, -(float_at(values + at) * pre_scale + float_at(base + at)))
        at += 4 * n
        write_f32(values + at, -(float_at(values + at) * post_scale + float_at(base + at)))
    for start in range(8 * n, 8 * n + 4 * n * n, 4 * n):
        largest = np.float32(-np.inf)
        for at in range(start, start + 4 * n, 4):
            logit = float_at(values + at) * comb_scale + float_at(base + at)
            write_f32(values + at, logit)
            largest = max(largest, logit)
        for at in range(start, start + 4 * n, 4):
            write_f32(values + at, float_at(values + at) - largest)
    for at in range(0, 4 * (2 * n + n * n), 64):
        store_f32(values + at, exp(load_f32(values + at)))
    for i in range(n):
        at = 4 * i
        write_f32(values + at, _ONE / (_ONE + float_at(values + at)) + eps)
        write_f32(mix + at, np.float32(2) * (_ONE / (_ONE + float_at(values + 4 * n + at))))
    for j in range(n):
        start = 4 * n + 4 * n * j
        total = np.float32(0)
        for at in range(start, start + 4 * n, 4):
            total += float_at(values + 4 * n + at)
        for at in range(start, start + 4 * n, 4):
            write_f32(mix + at, float_at(values + 4 * n + at) / total + eps)
    if n == 4:
        balance_four(mix + 16, iterations, eps)
    else:
        balance(mix + 4 * n, n, iterations, eps)


@device
def balance(comb: int, n: int, iterations: int, eps: np.float32) -> None:
    """Divide the columns of comb (n, n) by their sums + eps, then rows and columns in turn."""
    divide_lines(comb, n, 4, 4 * n, eps)
    for _ in range(iterations - 1):
        divide_lines(comb, n, 4 * n, 4, eps)
        divide_lines(comb, n, 4, 4 * n, eps)


@device
def divide_lines(comb: int, n: int, stride: int, step: int, eps: np.float32) -> None:
    """Divide each of n lines by its sum + eps: `stride` bytes apart, values `step` bytes apart."""
    for line in range(comb, comb + n * stride, stride):
        total = eps
        for at in range(line, line + n * step, step):
            total += float_at(at)
        for at in range(line, line + n * step, step):
            write_f32(at, float_at(at) / total)


def _add_crossed(distance: int) -> Any:
    """Make the function x -> x + the lanes of x whose numbers differ in the bit `distance`."""

    @operation(f32x16, f32x16)
    def crossed(b: Builder, x: Value) -> Value:
        lanes = [lane ^ distance for lane in range(simd_ir.LANES)]
        other = b.shuffle_vector(
            x, simd_ir.undefined(x.type), simd_ir.constant(simd_ir.INTS, lanes)
        )
        return b.fadd(x, other)

    return crossed


_add_1, _add_2, _add_4, _add_8 = (_add_crossed(distance) for distance in (1, 2, 4, 8))


@device
def balance_four(comb: int, iterations: int, eps: np.float32) -> None:
    """Do what `balance` does for n = 4, where the matrix is one vector."""
    matrix, offset = load_f32(comb), splat_f32(eps)
    matrix = divide(matrix, add(_add_8(_add_4(matrix)), offset))
    for _ in range(iterations - 1):
        matrix = divide(matrix, add(_add_2(_add_1(matrix)), offset))
        matrix = divide(matrix, add(_add_8(_add_4(matrix)), offset))
    store_f32(comb, matrix)


@device
def collapse(out: int, streams: int, pre: int, n: int, hidden: int) -> np.float32:
    """out = sum over i of pre[i] * stream i; return the sum of its squares."""
    q0, q1, q2, q3 = zeros_f32(), zeros_f32(), zeros_f32(), zeros_f32()
    for c in range(0, 4 * hidden, 256):
        a0, a1, a2, a3 = zeros_f32(), zeros_f32(), zeros_f32(), zeros_f32()
        for i in range(n):
            factor, source = broadcast_f32(pre + 4 * i), streams + 4 * hidden * i + c
            a0 = multiply_add(factor, load_f32(source), a0)
            a1 = multiply_add(factor, load_f32(source + 64), a1)
            a2 = multiply_add(factor, load_f32(source + 128), a2)
            a3 = multiply_add(factor, load_f32(source + 192), a3)
        store_f32(out + c, a0)
        store_f32(out + c + 64, a1)
        store_f32(out + c + 128, a2)
        store_f32(out + c + 192, a3)
        q0, q1 = multiply_add(a0, a0, q0), multiply_add(a1, a1, q1)
        q2, q3 = multiply_add(a2, a2, q2), multiply_add(a3, a3, q3)
    total: np.float32 = sum_f32(add(add(q0, q1), add(q2, q3)))
    return total
