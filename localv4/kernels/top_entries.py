"""The k best of many scores, by bisection over the bits of float32.

Scores are ranked first: turned into integers that sort as they do, by groups of GROUP, of which the
largest are kept lane by lane. The k-th best of these few is a bound that no chosen score is below.
Only groups that reach it are looked at again, and the bisection runs over what is found there.

Memory, all int32: the scores, to whole groups; a vector of largest ones for each group; then
CANDIDATES scores and as many places, each with a vector to spare.
"""

import numpy as np
from llvmlite import ir
from numba import types

from localv4.kernels import simd_ir
from localv4.kernels.device import device
from localv4.kernels.simd import (
    add_i32,
    i32x16,
    largest_i32,
    load_f32,
    load_i32,
    operation,
    read_u32,
    splat_i32,
    store_i32,
    sum_i32,
    write_i32,
    write_u32,
    zeros_i32,
)
from localv4.kernels.simd_ir import I16, I32, INTS, LANES, Builder, Value
from localv4.kernels.vectors import f32x16

GROUP = 128
"""Scores whose largest ones are kept together."""

CANDIDATES = 4096
"""Scores above the bound that there is room for; if there are more, all scores take part."""

_GROUP_BYTES = 4 * GROUP
_LIST_BYTES = 4 * (CANDIDATES + LANES)
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


@operation(i32x16, i32x16, i32x16, i32x16)
def count_at_least(b: Builder, counts: Value, keys: Value, bound: Value) -> Value:
    """Return counts + 1 where keys >= bound."""
    return b.sub(counts, b.sext(b.icmp_signed(">=", keys, bound), INTS))


@operation(_int, i32x16, i32x16)
def lanes_at_least(b: Builder, keys: Value, bound: Value) -> Value:
    """Return a word with bit i set where lane i of keys >= bound."""
    return b.zext(b.bitcast(b.icmp_signed(">=", keys, bound), I16), I32)


@operation(i32x16, i32x16, _address)
def first_keys(b: Builder, keys: Value, count: Value) -> Value:
    """Return the first `count` keys, which may be less than none, and keys below all others."""
    bound = simd_ir.splat(b, b.trunc(count, I32))
    exists = b.icmp_signed("<", simd_ir.constant(INTS, range(LANES)), bound)
    return b.select(exists, keys, simd_ir.filled(INTS, _LOWEST))


@operation(_address, _int)
def lowest_bit(b: Builder, bits: Value) -> Value:
    """Return the number of the lowest bit that is set; there must be one."""
    number = simd_ir.call(b, "llvm.cttz.i32", I32, bits, ir.Constant(ir.IntType(1), 1))
    return b.zext(number, simd_ir.I64)


def ranking_bytes(count: int) -> int:
    """Return the memory that up to `count` scores and what is found among them take."""
    return -(-count // GROUP) * (_GROUP_BYTES + 4 * LANES) + 2 * _LIST_BYTES


@device
def groups_of(count: int) -> int:
    """Return the groups that some scores fill."""
    return (count + GROUP - 1) // GROUP


@device
def rank_group(scores: int, count: int, group: int) -> None:
    """Rank one group of `count` float32 scores; behind the last one come keys below all others."""
    at, end = scores + _GROUP_BYTES * group, scores + 4 * count
    largest = splat_i32(np.int32(_LOWEST))
    for i in range(at, at + _GROUP_BYTES, 4 * LANES):
        keys = order_keys(load_f32(i))
        if i + 4 * LANES > end:
            keys = first_keys(keys, (end - i) // 4)
        store_i32(i, keys)
        largest = largest_i32(keys, largest)
    store_i32(scores + _GROUP_BYTES * groups_of(count) + 4 * LANES * group, largest)


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
    """Write the int32 indices of the k best of count >= k ranked scores, ascending.

    Of equal scores at the edge the lowest indices win.
    """
    groups = groups_of(count)
    largest = scores + _GROUP_BYTES * groups
    found = largest + 4 * LANES * groups
    places = found + _LIST_BYTES
    vectors = GROUP // LANES * groups
    number = CANDIDATES + 1
    if LANES * groups >= k:
        bound = lowest_chosen(largest, groups, k)
        number = find_candidates(found, places, scores, groups, bound)
    if number > CANDIDATES:
        write_best(chosen, scores, 0, vectors, k)
    else:
        store_i32(found + 4 * number, splat_i32(np.int32(_LOWEST)))
        write_best(chosen, found, places, (number + LANES - 1) // LANES, k)


@device
def find_candidates(found: int, places: int, scores: int, groups: int, bound: int) -> int:
    """List the keys that are at least `bound` and where they are; return their number.

    There are more than CANDIDATES if that is what is returned.
    """
    largest, edge, number = scores + _GROUP_BYTES * groups, splat_i32(np.int32(bound)), 0
    for group in range(groups):
        if lanes_at_least(load_i32(largest + 4 * LANES * group), edge) == 0:
            continue
        for first in range(GROUP * group, GROUP * (group + 1), LANES):
            bits = lanes_at_least(load_i32(scores + 4 * first), edge)
            while bits != 0:
                place = first + lowest_bit(bits)
                bits &= bits - np.int32(1)
                if number == CANDIDATES:
                    return CANDIDATES + 1
                write_u32(found + 4 * number, read_u32(scores + 4 * place))
                write_i32(places + 4 * number, np.int32(place))
                number += 1
    return number


@device
def write_best(chosen: int, keys: int, places: int, vectors: int, k: int) -> None:
    """Write the places of the k best of some keys; where `places` is 0 they are their numbers."""
    edge = lowest_chosen(keys, vectors, k)
    spare = k - (how_many(keys, vectors, edge + 1) if edge < _HIGHEST else 0)
    bound = splat_i32(np.int32(edge))
    for i in range(vectors):
        bits = lanes_at_least(load_i32(keys + 64 * i), bound)
        while bits != 0:
            number = LANES * i + lowest_bit(bits)
            bits &= bits - np.int32(1)
            if np.int32(read_u32(keys + 4 * number)) == edge:
                if spare == 0:
                    continue
                spare -= 1
            place = np.int32(number) if places == 0 else np.int32(read_u32(places + 4 * number))
            write_i32(chosen, place)
            chosen += 4
