"""The router of one layer: which experts a token uses, with what weight, and where they lie."""

import numpy as np
from llvmlite import ir
from numba import types

from localv4.kernels import simd_ir
from localv4.kernels.activations import exp
from localv4.kernels.compiler import entry
from localv4.kernels.device import device
from localv4.kernels.memory import atomic_store
from localv4.kernels.operation import float_at, float_word, take_chunk, word
from localv4.kernels.simd import (
    Vector,
    add,
    at_least,
    divide,
    highest_i32,
    i32x16,
    largest_i32,
    load_f32,
    load_i32,
    multiply,
    multiply_add,
    negative,
    operation,
    splat_f32,
    splat_i32,
    store_f32,
    write_f32,
    write_i32,
    write_i64,
    zeros_f32,
)
from localv4.kernels.simd_ir import FLOATS, INTS, Builder, Value
from localv4.kernels.stack import stack_floats
from localv4.kernels.vectors import f32x16

MOST_EXPERTS = 1024
"""Experts that a layer can have here."""

_LOWEST = np.int32(-(2**31))  # below the rank of every number
_TINY = np.float32(1e-20)

# artanh(s) / s = polynomial of s^2 for 0 <= s <= 1/3, relative error 4e-9
_ARTANH = tuple(
    np.float32(c) for c in (1, 0.33333158493, 0.20012454689, 0.13980300725, 0.14089167118)
)

_affinities, _ranks = stack_floats(MOST_EXPERTS), stack_floats(MOST_EXPERTS)
_slots = stack_floats(2 * MOST_EXPERTS)  # as many i64


@entry("fast")
def route(operation: int, member: int, members: int) -> None:
    """Choose the experts of each token and their weights, in ascending order of the experts.

    The affinity of an expert is sqrt(softplus(logit)). Chosen are the k largest affinity + bias,
    the lower number first among equals and NaN before all; or, with a table, those of the token's
    id. The weights are the affinities, normalised to sum to `scaling`.
    Words: logits, their row stride in floats (at least 16 more than the experts), n_experts, bias
    (n_experts) f32 or 0, table (vocab, k) i64 or 0, token ids (tokens) i64 or 0, k, scaling as f32
    bits, experts (tokens, k) i64, weights (tokens, k) f32, tokens.
    """
    logits, stride, n_experts = word(operation, 1), word(operation, 2), word(operation, 3)
    bias, table, ids = word(operation, 4), word(operation, 5), word(operation, 6)
    k, scaling = word(operation, 7), float_word(operation, 8)
    experts, weights, tokens = word(operation, 9), word(operation, 10), word(operation, 11)
    affinities, ranks = _affinities(), _ranks()
    t = take_chunk(operation)
    while t < tokens:
        chosen = experts + 8 * k * t
        write_affinities(affinities, logits + 4 * stride * t, n_experts)
        if table != 0:
            row = table + 8 * k * word(ids, t)
            for i in range(k):
                insert(chosen, i, word(row, i))
        else:
            write_ranks(ranks, affinities, bias, n_experts)
            for i in range(k):
                insert(chosen, i, take_highest(ranks, n_experts))
        write_weights(weights + 4 * k * t, chosen, affinities, k, scaling)
        t = take_chunk(operation)


@device
def log1p(y: Vector) -> Vector:
    """log(1 + y) within 2 ulp for 0 <= y <= 1: 2 artanh(y / (2 + y))"""
    s = divide(y, add(y, splat_f32(np.float32(2))))
    z = multiply(s, s)
    p = multiply_add(splat_f32(_ARTANH[4]), z, splat_f32(_ARTANH[3]))
    p = multiply_add(p, z, splat_f32(_ARTANH[2]))
    p = multiply_add(p, z, splat_f32(_ARTANH[1]))
    p = multiply_add(p, z, splat_f32(_ARTANH[0]))
    return multiply(add(s, s), p)


@device
def write_affinities(out: int, logits: int, count: int) -> None:
    """out = sqrt(softplus(logits)), up to the next multiple of 16."""
    for at in range(0, 4 * count, 64):
        x = load_f32(logits + at)
        size = at_least(x, negative(x))
        softplus = add(at_least(x, zeros_f32()), log1p(exp(negative(size))))
        store_f32(out + at, square_root(softplus))


@device
def write_ranks(out: int, affinities: int, bias: int, count: int) -> None:
    """out = ranks of affinities + bias, up to the next multiple of 16."""
    whole = count // 16 * 16
    for at in range(0, 4 * whole, 64):
        store_ranks(out + at, add(load_f32(affinities + at), load_f32(bias + at)))
    if whole == count:
        return
    # the vector of bias is not padded
    for e in range(whole, count):
        write_f32(out + 4 * e, float_at(bias + 4 * e))
    store_ranks(out + 4 * whole, add(load_f32(affinities + 4 * whole), load_f32(out + 4 * whole)))
    for e in range(count, whole + 16):
        write_i32(out + 4 * e, _LOWEST)


@device
def take_highest(ranks: int, count: int) -> int:
    """Return the first of the highest ranks, and take it out."""
    highest = splat_i32(_LOWEST)
    for at in range(0, 4 * count, 64):
        highest = largest_i32(load_i32(ranks + at), highest)
    rank = splat_i32(highest_i32(highest))
    at = 0
    lane = first_equal(load_i32(ranks), rank)
    while lane == 16 and at + 64 < 4 * count:
        at += 64
        lane = first_equal(load_i32(ranks + at), rank)
    number: int = at // 4 + lane
    write_i32(ranks + 4 * number, _LOWEST)
    return number


@device
def insert(experts: int, count: int, number: int) -> None:
    """Put a number into `count` ascending i64."""
    i = count
    while i > 0 and word(experts, i - 1) > number:
        write_i64(experts + 8 * i, word(experts, i - 1))
        i -= 1
    write_i64(experts + 8 * i, number)


@device
def write_weights(out: int, experts: int, affinities: int, k: int, scaling: np.float32) -> None:
    """out = the affinities of k experts, normalised to sum to `scaling`."""
    total = np.float32(0)
    for i in range(k):
        total += float_at(affinities + 4 * word(experts, i))
    for i in range(k):
        share = float_at(affinities + 4 * word(experts, i)) / (total + _TINY)
        write_f32(out + 4 * i, share * scaling)


@entry("fast")
def resolve(operation: int, member: int, members: int) -> None:
    """Look up where the experts of one token lie, and halt the program when one is not in memory.

    When none is missing their use is noted: heat = heat * decay[age] + 1, where the age is how far
    the clock is beyond the last use, and the last use is now. An expert of form f gets its address
    into row f of `records`, where the other rows have 0.
    Words: experts (k) i64, k, table (n_experts) i64 of record addresses (not in memory: 0 or less),
    forms of the experts (n_experts) i64, number of forms, records (forms, k) i64, heat (n_experts)
    f32, last use (n_experts) i64, cell of the clock, decay (steps) f32, steps, halt address.
    """
    if member > 0:
        return
    experts, k, table = word(operation, 1), word(operation, 2), word(operation, 3)
    forms, form_count, records = word(operation, 4), word(operation, 5), word(operation, 6)
    for i in range(k):
        number = word(experts, i)
        record, form = word(table, number), word(forms, number)
        if record <= 0:
            atomic_store(word(operation, 12), 1)
            return
        for f in range(form_count):
            write_i64(records + 8 * (f * k + i), record if f == form else 0)
    note_uses(operation, experts, k)


@device
def note_uses(operation: int, experts: int, k: int) -> None:
    """Count the use of k experts, as `resolve` says."""
    heat, last, clock = word(operation, 7), word(operation, 8), word(word(operation, 9), 0)
    decay, steps = word(operation, 10), word(operation, 11)
    for i in range(k):
        number = word(experts, i)
        age = min(clock - word(last, number), steps - 1)
        at = heat + 4 * number
        write_f32(at, float_at(at) * float_at(decay + 4 * age) + np.float32(1))
        write_i64(last + 8 * number, clock)


@entry("fast")
def group(operation: int, member: int, members: int) -> None:
    """Sort the experts of some tokens as products of many tokens take them; halts as `resolve`.

    A slot is a pair of a token and one of its experts. Slots are sorted by form, expert, token; row
    f of `records` and `starts` has the experts of form f in ascending order, each once, with the
    slots starts[e] ... starts[e + 1] - 1, and behind them as many without a slot as fill the row.
    Words: experts (tokens, k) i64, k, table, forms of the experts, number of forms, records (forms,
    tokens * k) i64, heat, last use, cell of the clock, decay, steps, halt address (all as in
    `resolve`), tokens, starts (forms, tokens * k + 1) i64, token of each slot (tokens * k) i64,
    weights (tokens, k) f32, weight of each slot (tokens * k) f32, n_experts.
    """
    if member > 0:
        return
    experts, k, table = word(operation, 1), word(operation, 2), word(operation, 3)
    tokens, n_experts, slots = word(operation, 13), word(operation, 18), _slots()
    total = tokens * k
    for number in range(n_experts):
        write_i64(slots + 8 * number, 0)
    for i in range(total):
        number = word(experts, i)
        if word(table, number) <= 0:
            atomic_store(word(operation, 12), 1)
            return
        write_i64(slots + 8 * number, word(slots, number) + 1)
    list_experts(operation, slots, total, n_experts)
    places, weights, shares = word(operation, 15), word(operation, 16), word(operation, 17)
    for i in range(total):
        number = word(experts, i)
        slot = word(slots, number)
        write_i64(slots + 8 * number, slot + 1)
        write_i64(places + 8 * slot, i // k)
        write_f32(shares + 4 * slot, float_at(weights + 4 * i))
    note_uses(operation, experts, total)


@device
def list_experts(operation: int, slots: int, total: int, n_experts: int) -> None:
    """Write `records` and `starts` of `group`; turn numbers of slots into the first slots."""
    table, forms, form_count = word(operation, 3), word(operation, 4), word(operation, 5)
    records, starts, first = word(operation, 6), word(operation, 14), 0
    for form in range(form_count):
        row, row_starts, listed = records + 8 * form * total, starts + 8 * form * (total + 1), 0
        for number in range(n_experts):
            count = word(slots, number)
            if count > 0 and word(forms, number) == form:
                write_i64(row + 8 * listed, word(table, number))
                write_i64(row_starts + 8 * listed, first)
                write_i64(slots + 8 * number, -1 - first)  # not to be taken for a number again
                listed += 1
                first += count
        for i in range(listed, total + 1):
            write_i64(row_starts + 8 * i, first)
    for number in range(n_experts):
        write_i64(slots + 8 * number, -1 - word(slots, number))


@entry("fast")
def glance(operation: int, member: int, members: int) -> None:
    """Halt the program when an expert is neither in memory nor on its way.

    Words: experts (k) i64, k, table (n_experts) i64 of record addresses (absent: 0; on its way:
    -1), halt address.
    """
    if member > 0:
        return
    experts, table = word(operation, 1), word(operation, 3)
    for i in range(word(operation, 2)):
        if word(table, word(experts, i)) == 0:
            atomic_store(word(operation, 4), 1)


@operation(f32x16, f32x16)
def square_root(b: Builder, x: Value) -> Value:
    """sqrt(x)"""
    return simd_ir.call(b, "llvm.sqrt.v16f32", FLOATS, x)


@operation(types.void, types.int64, f32x16)
def store_ranks(b: Builder, address: Value, x: Value) -> None:
    """Write int32 in the order of sixteen floats, NaN on top, all above the lowest int32."""
    bits = b.bitcast(x, INTS)
    flips = b.and_(b.ashr(bits, simd_ir.filled(INTS, 31)), simd_ir.filled(INTS, 0x7FFFFFFF))
    is_number = b.fcmp_ordered("ord", x, x)
    ranks = b.select(is_number, b.xor(bits, flips), simd_ir.filled(INTS, 0x7FFFFFFF))
    simd_ir.store(b, ranks, address)


@operation(types.int64, i32x16, i32x16)
def first_equal(b: Builder, x: Value, y: Value) -> Value:
    """Return the number of the first lane in which x = y, 16 if there is none."""
    half = ir.IntType(16)
    bits = b.zext(b.bitcast(b.icmp_signed("==", x, y), half), simd_ir.I32)
    stop = b.or_(bits, ir.Constant(simd_ir.I32, 1 << simd_ir.LANES))
    lane = simd_ir.call(b, "llvm.cttz.i32", simd_ir.I32, stop, ir.Constant(ir.IntType(1), 1))
    return b.zext(lane, simd_ir.I64)
