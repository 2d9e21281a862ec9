"""Queries of the indexer as int8, for products with the codes of its rows.

The queries of a token, lanes of float32 (`kernels.head_lanes`), are turned in place into *lines* of
int8: line j has four channels of every head, byte 4 * lane + i of it is channel `line_channel(j, n)
+ i`. Each head has one scale, size / 127, size the largest absolute value of its channels. It
becomes part of the head's weight.

Memory: line j takes the place of channel j. Behind the n / 4 lines comes a row of int32 where the
products of a head start (`kernels.simd_dots`: keys are unsigned on x86). The weights stay where
they were, behind channel n - 1.
"""

import numpy as np

from localv4.kernels import simd_ir
from localv4.kernels.activations import LEVELS, PER_LEVEL, SMALLEST
from localv4.kernels.device import device
from localv4.kernels.isa import ISA
from localv4.kernels.row_codes import E2M1_UNIT
from localv4.kernels.row_forms import SPREAD, mixed_block, mixing_factor
from localv4.kernels.simd import (
    add,
    add_i32,
    at_least,
    divide,
    i32x16,
    largest_i32,
    load_f32,
    magnitudes,
    multiply,
    negative,
    operation,
    round_i32,
    splat_f32,
    splat_i32,
    store_f32,
    store_i32,
    zeros_i32,
)
from localv4.kernels.simd_ir import FLOATS, INTS, Builder, Value
from localv4.kernels.vectors import f32x16

WIDE = 128 if ISA.level != "generic" else 0
"""Rows of so many channels are expanded with all their codes at a time (`kernels.code_keys`)."""

# Codes are read as value * 16 / 2^k, k the exponent of their row's largest scale (`code_keys`).
_UNIT = np.float32(2.0 ** -(E2M1_UNIT + SPREAD + 1))
_START = np.int32(-ISA.byte_bias)


@operation(f32x16, i32x16)
def from_bits(b: Builder, bits: Value) -> Value:
    """Take the bits of sixteen float32 for what they are."""
    return b.bitcast(bits, FLOATS)


@operation(i32x16, i32x16, i32x16)
def multiply_i32(b: Builder, x: Value, y: Value) -> Value:
    """x * y"""
    return b.mul(x, y)


@operation(i32x16, i32x16, i32x16, i32x16, i32x16)
def pack_bytes(b: Builder, first: Value, second: Value, third: Value, fourth: Value) -> Value:
    """Put the low bytes of four vectors into the lanes of one, the first in the lowest byte."""
    packed = simd_ir.filled(INTS, 0)
    for i, value in enumerate((first, second, third, fourth)):
        low = b.and_(value, simd_ir.filled(INTS, 255))
        packed = b.or_(packed, b.shl(low, simd_ir.filled(INTS, 8 * i)))
    return packed


@device
def line_channel(line: int, n: int) -> int:
    """Return the first of the four channels of a line of n channels.

    They follow the bytes of an expanded row: of WIDE channels come first those of all low nibbles,
    then those of all high ones.
    """
    if n != WIDE:
        return 4 * line
    half, place = line // 16, line % 16
    return place // 4 * 32 + half * 16 + place % 4 * 4


@device
def mix_heads(at: int, row: int, n: int) -> None:
    """Mix the n channels of sixteen heads in place (`row_forms.mix`)."""
    block = mixed_block(n)
    distance = 1
    while distance < block:
        for i in range(n):
            if i & distance == 0:
                low, high = load_f32(at + i * row), load_f32(at + (i + distance) * row)
                store_f32(at + i * row, add(low, high))
                store_f32(at + (i + distance) * row, add(low, negative(high)))
        distance *= 2
    factor = splat_f32(mixing_factor(n))
    for i in range(n):
        store_f32(at + i * row, multiply(load_f32(at + i * row), factor))


@device
def round_heads(at: int, row: int, n: int) -> None:
    """Turn the n channels of sixteen heads into lines, and scale the weights of these heads."""
    largest = zeros_i32()
    for channel in range(n):
        largest = largest_i32(magnitudes(load_f32(at + channel * row)), largest)
    size = at_least(from_bits(largest), splat_f32(SMALLEST))
    factor, total = divide(splat_f32(LEVELS), size), zeros_i32()
    for line in range(n // 4):
        first = at + line_channel(line, n) * row
        a, b = round_one(first, factor), round_one(first + row, factor)
        c, d = round_one(first + 2 * row, factor), round_one(first + 3 * row, factor)
        total = add_i32(total, add_i32(add_i32(a, b), add_i32(c, d)))
        store_i32(at + line * row, pack_bytes(a, b, c, d))
    store_i32(at + n // 4 * row, multiply_i32(total, splat_i32(_START)))
    scale = multiply(size, splat_f32(PER_LEVEL * _UNIT))
    store_f32(at + n * row, multiply(load_f32(at + n * row), scale))


@device
def round_one(at: int, factor: object) -> object:
    """Return a channel of sixteen heads times `factor`, as integers."""
    return round_i32(multiply(load_f32(at), factor))
