"""Heads in vector lanes: the layout of queries and sums of attention.

The vectors of all heads of a token, (heads, n) float32 in its row of activations, become *lanes*:
(n, lanes) float32, one row for each channel. `lanes(heads)` fills up the heads to whole register
tiles (`kernels.head_tiles`); the heads that do not exist are zeros.
"""

import numpy as np
from llvmlite import ir
from numba import types

from localv4.kernels import simd_ir
from localv4.kernels.arrays import Floats
from localv4.kernels.device import device
from localv4.kernels.head_tiles import TILE_VECTORS
from localv4.kernels.operation import float_at
from localv4.kernels.simd import (
    Vector,
    add,
    divide,
    load_f32,
    multiply,
    multiply_add,
    negative,
    operation,
    splat_f32,
    store_f32,
    zeros_f32,
)
from localv4.kernels.simd_ir import FLOATS, I32, I64, LANES, Builder, Value
from localv4.kernels.vectors import f32x16

_address = types.int64
_ONE = np.float32(1)


def lanes(heads: int) -> int:
    """Return the number of lanes for some heads: whole register tiles."""
    tile = LANES * TILE_VECTORS
    return -(-heads // tile) * tile


def spread(values: Floats) -> Floats:
    """Return one value for each lane, zeros behind the given ones; values (heads,) f32."""
    result = np.zeros(lanes(values.shape[0]), np.float32)
    result[: values.shape[0]] = values
    return result


@device
def lane_row(heads: int) -> int:
    """Return the bytes of a row of lanes."""
    tile = LANES * TILE_VECTORS
    return (heads + tile - 1) // tile * tile * 4


# --- sixteen heads times sixteen channels ---


def turn_square(b: Builder, rows: list[Value]) -> list[Value]:
    """Return the columns of a square of sixteen vectors.

    Four times, vector i and vector i + 8 are interleaved to vectors 2 i and 2 i + 1: that moves the
    highest bit of the row's number to the lowest bit of the lane's number and the highest bit of
    the lane's to the lowest of the row's.
    """
    half = LANES // 2
    orders = [
        simd_ir.constant(simd_ir.INTS, [first + i // 2 + LANES * (i % 2) for i in range(LANES)])
        for first in (0, half)
    ]
    for _ in range(4):
        rows = [
            b.shuffle_vector(rows[i], rows[i + half], order)
            for i in range(half)
            for order in orders
        ]
    return rows


@operation(types.void, _address, _address, _address, _address, _address)
def heads_to_lanes(
    b: Builder, out: Value, out_stride: Value, source: Value, stride: Value, count: Value
) -> None:
    """out[channel][head] = source[head][channel], strides in bytes; 0 for heads from `count`."""
    vectors = []
    for head in range(LANES):
        exists = b.icmp_signed("<", ir.Constant(I64, head), count)
        distance = b.select(exists, b.mul(stride, ir.Constant(I64, head)), ir.Constant(I64, 0))
        vector = simd_ir.load(b, FLOATS, b.add(source, distance))
        vectors.append(b.select(exists, vector, simd_ir.filled(FLOATS, 0.0)))
    for channel, vector in enumerate(turn_square(b, vectors)):
        place = b.add(out, b.mul(out_stride, ir.Constant(I64, channel)))
        simd_ir.store(b, vector, place)


@operation(types.void, _address, _address, _address, _address, _address)
def lanes_to_heads(
    b: Builder, out: Value, out_stride: Value, source: Value, stride: Value, count: Value
) -> None:
    """out[head][channel] = source[channel][head] for the first `count` heads, strides in bytes."""
    places = [b.add(source, b.mul(stride, ir.Constant(I64, channel))) for channel in range(LANES)]
    vectors = [simd_ir.load(b, FLOATS, place) for place in places]
    for head, vector in enumerate(turn_square(b, vectors)):
        with b.if_then(b.icmp_signed("<", ir.Constant(I64, head), count)):
            simd_ir.store(b, vector, b.add(out, b.mul(out_stride, ir.Constant(I64, head))))


@operation(f32x16, f32x16)
def square_root(b: Builder, x: Value) -> Value:
    """sqrt(x)"""
    return simd_ir.call(b, "llvm.sqrt.v16f32", FLOATS, x)


@operation(f32x16, f32x16, types.int64)
def first_lanes(b: Builder, x: Value, count: Value) -> Value:
    """Return the first `count` lanes and zeros."""
    bound = simd_ir.splat(b, b.trunc(count, I32))
    exists = b.icmp_signed("<", simd_ir.constant(simd_ir.INTS, range(LANES)), bound)
    return b.select(exists, x, simd_ir.filled(FLOATS, 0.0))


# --- a vector of heads ---


@device
def take_heads(out: int, row: int, source: int, n: int, first: int, heads: int) -> None:
    """Write sixteen heads from number `first` on to their lanes; out: those of channel 0."""
    count = heads - first
    if count > 0:
        source += 4 * n * first
    for channel in range(0, n, LANES):
        heads_to_lanes(out + row * channel, row, source + 4 * channel, 4 * n, count)


@device
def norm_factors(at: int, row: int, n: int, eps: np.float32) -> Vector:
    """Return 1 / sqrt(mean of the squares of the channels + eps) of sixteen heads."""
    a0, a1, a2, a3 = zeros_f32(), zeros_f32(), zeros_f32(), zeros_f32()
    for _ in range(n // 4):
        x0, x1, x2, x3 = (
            load_f32(at),
            load_f32(at + row),
            load_f32(at + 2 * row),
            load_f32(at + 3 * row),
        )
        a0, a1 = multiply_add(x0, x0, a0), multiply_add(x1, x1, a1)
        a2, a3 = multiply_add(x2, x2, a2), multiply_add(x3, x3, a3)
        at += 4 * row
    mean = multiply(add(add(a0, a1), add(a2, a3)), splat_f32(_ONE / np.float32(n)))
    return divide(splat_f32(_ONE), square_root(add(mean, splat_f32(eps))))


@device
def scale_heads(at: int, row: int, n: int, factors: Vector) -> None:
    """Multiply the n channels of sixteen heads in place."""
    for channel in range(n):
        store_f32(at + row * channel, multiply(load_f32(at + row * channel), factors))


@device
def rotate_heads(at: int, row: int, pairs: int, cos: int, sin: int, sign: np.float32) -> None:
    """Rotate channels (2i, 2i + 1) of sixteen heads in place, i < pairs; sign -1 turns back.

    at: the lanes of channel 0; cos, sin: float32 for each pair.
    """
    for i in range(pairs):
        c = splat_f32(float_at(cos + 4 * i))
        s = splat_f32(float_at(sin + 4 * i) * sign)
        even, odd = load_f32(at), load_f32(at + row)
        store_f32(at, multiply_add(odd, negative(s), multiply(even, c)))
        store_f32(at + row, multiply_add(odd, c, multiply(even, s)))
        at += 2 * row
