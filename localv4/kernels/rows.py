"""Rows of activations between the big products: norms, rotation angles, window keys, SwiGLU.

A row of n float32 has n a multiple of 32. Where an operation rounds its rows to int8, q, d and b
are the buffers of `kernels.activations`; q = 0: it does not.
"""

import math

import numpy as np

from localv4.kernels import activations
from localv4.kernels.compiler import entry
from localv4.kernels.device import device
from localv4.kernels.operation import float_at, float_word, take_chunk, word
from localv4.kernels.packed import BLOCK
from localv4.kernels.simd import (
    add,
    load_f32,
    multiply,
    multiply_add,
    splat_f32,
    store_f32,
    sum_f32,
    write_f32,
    zeros_f32,
)

SWIGLU_CHUNK = 512
"""Columns of a token that a member takes at once."""


@entry("fast")
def norm(operation: int, member: int, members: int) -> None:
    """out = weight * x / sqrt(mean(x^2) + eps) for each token, as float32 and rounded to int8.

    Words: x, its row stride in floats, weight, eps as f32 bits, out (0: only rounded; may be x),
    its row stride, q, d, b, tokens, columns.
    """
    x, stride, weight = word(operation, 1), word(operation, 2), word(operation, 3)
    eps = float_word(operation, 4)
    out, out_stride = word(operation, 5), word(operation, 6)
    q, d, b = word(operation, 7), word(operation, 8), word(operation, 9)
    tokens, cols = word(operation, 10), word(operation, 11)
    t = take_chunk(operation)
    while t < tokens:
        row = x + 4 * stride * t
        own = 0 if out == 0 else out + 4 * out_stride * t
        factor = inverse_size(sum_of_squares(row, cols), cols, eps)
        write_normed(own, q, d, b, t, row, weight, factor, cols, 0)
        t = take_chunk(operation)


@device
def sum_of_squares(x: int, cols: int) -> np.float32:
    """Return the sum of the squares of a row."""
    low, high = zeros_f32(), zeros_f32()
    for at in range(x, x + 4 * cols, 128):
        first, second = load_f32(at), load_f32(at + 64)
        low, high = multiply_add(first, first, low), multiply_add(second, second, high)
    total: np.float32 = sum_f32(add(low, high))
    return total


@device
def inverse_size(squares: np.float32, cols: int, eps: np.float32) -> np.float32:
    """Return 1 / sqrt(squares / cols + eps)."""
    return np.float32(1) / np.float32(math.sqrt(squares / np.float32(cols) + eps))


@device
def write_normed(
    out: int,
    q: int,
    d: int,
    b: int,
    token: int,
    x: int,
    weight: int,
    factor: np.float32,
    cols: int,
    binary: int,
) -> None:
    """Write weight * (x * factor) to `out` unless that is 0, and as row `token` of q, d, b."""
    factors = splat_f32(factor)
    q = 0 if q == 0 else q + token * activations.q_row(cols)
    d, b = d + token * activations.d_row(cols), b + token * activations.b_row(cols)
    for i in range(cols // BLOCK):
        at = 128 * i
        low = multiply(load_f32(weight + at), multiply(load_f32(x + at), factors))
        high = multiply(load_f32(weight + at + 64), multiply(load_f32(x + at + 64), factors))
        if out != 0:
            store_f32(out + at, low)
            store_f32(out + at + 64, high)
        if q != 0:
            sums = b + activations.SUMS_BYTES * i
            activations.quantize_block(q + BLOCK * i, d + 4 * i, sums, low, high, binary)


@entry("fast")
def angles(operation: int, member: int, members: int) -> None:
    """Fill cos, sin (tokens, pairs) f32 for the positions of the tokens.

    Words: frequencies (pairs) f32, pairs, cos, sin, context, tokens.
    """
    frequencies, pairs = word(operation, 1), word(operation, 2)
    cos, sin = word(operation, 3), word(operation, 4)
    position, tokens = word(word(operation, 5), 0), word(operation, 6)
    t = take_chunk(operation)
    while t < tokens:
        for i in range(pairs):
            c, s = angle(position + t, float_at(frequencies + 4 * i))
            write_f32(cos + 4 * (t * pairs + i), c)
            write_f32(sin + 4 * (t * pairs + i), s)
        t = take_chunk(operation)


@device
def angle(position: int, frequency: np.float32) -> tuple[np.float32, np.float32]:
    """Return (cos, sin) of position * frequency, which is rounded to float32 as the model does."""
    wide = np.float64(np.float32(position) * frequency)
    return np.float32(math.cos(wide)), np.float32(math.sin(wide))


@device
def rotate_pair(at: int, cos: np.float32, sin: np.float32) -> None:
    """Rotate two neighbouring float32 in place."""
    even, odd = float_at(at), float_at(at + 4)
    write_f32(at, even * cos - odd * sin)
    write_f32(at + 4, even * sin + odd * cos)


@entry("fast")
def key(operation: int, member: int, members: int) -> None:
    """Norm the projected key of each token, rotate its last pairs, put it into the window ring.

    Words: x, its row stride in floats, weight, eps as f32 bits, cos, sin (tokens, pairs) f32,
    pairs, cell of the ring (capacity, columns) f32, capacity, columns, context, tokens.
    """
    x, stride, weight = word(operation, 1), word(operation, 2), word(operation, 3)
    eps = float_word(operation, 4)
    cos, sin, pairs = word(operation, 5), word(operation, 6), word(operation, 7)
    ring, capacity, cols = word(word(operation, 8), 0), word(operation, 9), word(operation, 10)
    position, tokens = word(word(operation, 11), 0), word(operation, 12)
    t = take_chunk(operation)
    while t < tokens:
        row = x + 4 * stride * t
        out = ring + 4 * cols * ((position + t) % capacity)
        factor = inverse_size(sum_of_squares(row, cols), cols, eps)
        write_normed(out, 0, 0, 0, 0, row, weight, factor, cols, 0)
        first = out + 4 * (cols - 2 * pairs)
        for i in range(pairs):
            at = 4 * (t * pairs + i)
            rotate_pair(first + 8 * i, float_at(cos + at), float_at(sin + at))
        t = take_chunk(operation)


@entry("fast")
def clear(operation: int, member: int, members: int) -> None:
    """Set rows to zero.

    Words: x, its row stride in floats, tokens, columns (a multiple of 16).
    """
    x, stride, tokens = word(operation, 1), word(operation, 2), word(operation, 3)
    t = take_chunk(operation)
    while t < tokens:
        for at in range(0, 4 * word(operation, 4), 64):
            store_f32(x + 4 * stride * t + at, zeros_f32())
        t = take_chunk(operation)


@entry("fast")
def swiglu(operation: int, member: int, members: int) -> None:
    """out = silu(min(gate, limit)) * clip(up, -limit, limit)

    Words: gate, up, their row stride in floats, out (may be gate), its row stride, limit as f32
    bits, tokens, columns (a multiple of 16).
    """
    gate, up, stride = word(operation, 1), word(operation, 2), word(operation, 3)
    out, out_stride = word(operation, 4), word(operation, 5)
    limit, tokens, cols = float_word(operation, 6), word(operation, 7), word(operation, 8)
    chunks = -(-cols // SWIGLU_CHUNK)
    taken = take_chunk(operation)
    while taken < tokens * chunks:
        t, first = taken // chunks, taken % chunks * SWIGLU_CHUNK
        for c in range(first, min(first + SWIGLU_CHUNK, cols), 16):
            at = 4 * (stride * t + c)
            h = activations.swiglu(load_f32(gate + at), load_f32(up + at), limit)
            store_f32(out + 4 * (out_stride * t + c), h)
        taken = take_chunk(operation)
