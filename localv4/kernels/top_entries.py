"""The k best of many scores, by bisection over the bits of float32."""

import numpy as np
from llvmlite import ir
from numba import types

from localv4.kernels import simd_ir
from localv4.kernels.device import device
from localv4.kernels.simd import (
    add_i32,
    i32x16,
    load_f32,
    load_i32,
    operation,
    read_u32,
    splat_i32,
    sum_i32,
    write_i32,
    zeros_i32,
)
from localv4.kernels.simd_ir import I16, I32, INTS, LANES, Builder, Value
from localv4.kernels.vectors import f32x16

_address, _int = types.int64, types.int32
_LOWEST = -(1 << 31)
_HIGHEST = (1 << 31) - 1


@operation(i32x16, f32x16)
def order_keys(b: Builder, scores: Value) -> Value:
    """Map float32 to integers above -2^31 that sort as they do.

    -0 and +0 are both 0, NaN is beyond the infinity of its sign.
    """
    bits = b.bitcast(scores, INTS)
    mirrored = b.sub(simd_ir.filled(INTS, _LOWEST), bits)
    return b.select(b.icmp_signed("<", bits, simd_ir.filled(INTS, 0)), mirrored, bits)


@operation(types.void, _address, i32x16)
def store_i32(b: Builder, address: Value, value: Value) -> None:
    """Write sixteen int32."""
    simd_ir.store(b, value, address)


@operation(i32x16, i32x16, i32x16, i32x16)
def count_at_least(b: Builder, counts: Value, keys: Value, bound: Value) -> Value:
    """Return counts + 1 where keys >= bound."""
    return b.sub(counts, b.sext(b.icmp_signed(">=", keys, bound), INTS))


@operation(_int, i32x16, i32x16)
def lanes_at_least(b: Builder, keys: Value, bound: Value) -> Value:
    """Return a word with bit i set where lane i of keys >= bound."""
    return b.zext(b.bitcast(b.icmp_signed(">=", keys, bound), I16), I32)


@operation(_address, _int)
def lowest_bit(b: Builder, bits: Value) -> Value:
    """Return the number of the lowest bit that is set; there must be one."""
    number = simd_ir.call(b, "llvm.cttz.i32", I32, bits, ir.Constant(ir.IntType(1), 1))
    return b.zext(number, simd_ir.I64)


@device
def make_order_keys(scores: int, count: int) -> int:
    """Replace float32 scores by their order keys; return the number of vectors they fill.

    Behind them, to the end of the last vector, come keys below all others.
    """
    vectors = (count + LANES - 1) // LANES
    for i in range(vectors):
        store_i32(scores + 64 * i, order_keys(load_f32(scores + 64 * i)))
    for i in range(count, LANES * vectors):
        write_i32(scores + 4 * i, np.int32(_LOWEST))
    return vectors


@device
def how_many(keys: int, vectors: int, bound: int) -> int:
    """Return how many keys are at least `bound`."""
    edge = splat_i32(np.int32(bound))
    a, b, c, d = zeros_i32(), zeros_i32(), zeros_i32(), zeros_i32()
    whole = vectors // 4 * 4
    for i in range(0, whole, 4):
        at = keys + 64 * i
        a, b = count_at_least(a, load_i32(at), edge), count_at_least(b, load_i32(at + 64), edge)
        c = count_at_least(c, load_i32(at + 128), edge)
        d = count_at_least(d, load_i32(at + 192), edge)
    for i in range(whole, vectors):
        a = count_at_least(a, load_i32(keys + 64 * i), edge)
    total: int = sum_i32(add_i32(add_i32(a, b), add_i32(c, d)))
    return total


@device
def lowest_chosen(keys: int, vectors: int, k: int) -> int:
    """Return the largest bound that at least k keys reach, or any that just k keys reach."""
    low, high = _LOWEST, _HIGHEST
    while low < high:
        middle = (low + high + 1) >> 1
        reached = how_many(keys, vectors, middle)
        if reached == k:
            return middle
        if reached > k:
            low = middle
        else:
            high = middle - 1
    return low


@device
def write_top(chosen: int, scores: int, count: int, k: int) -> None:
    """Write the int32 indices of the k best of count >= k scores, ascending; scores are lost.

    Of equal scores at the edge the lowest indices win. There must be room for sixteen more scores.
    """
    vectors = make_order_keys(scores, count)
    edge = lowest_chosen(scores, vectors, k)
    spare = k - (how_many(scores, vectors, edge + 1) if edge < _HIGHEST else 0)
    bound = splat_i32(np.int32(edge))
    for i in range(vectors):
        found = lanes_at_least(load_i32(scores + 64 * i), bound)
        while found != 0:
            place = LANES * i + lowest_bit(found)
            found &= found - np.int32(1)
            if np.int32(read_u32(scores + 4 * place)) == edge:
                if spare == 0:
                    continue
                spare -= 1
            write_i32(chosen, np.int32(place))
            chosen += 4
