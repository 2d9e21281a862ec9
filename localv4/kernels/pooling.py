"""Compressed keys: projections of tokens go into rings, whole windows are pooled into entries.

The rings keys, gates (capacity, width) f32 are indexed by position % capacity; entries have n
channels, n a multiple of 32 and at most MOST_CHANNELS, in a form of `kernels.row_forms`. width is
n, or 2 n where windows overlap: then an entry pools the previous window with its first n channels
and its own window with its last n channels.
"""

from collections.abc import Callable

import numpy as np

from localv4.kernels.activations import exp
from localv4.kernels.compiler import entry
from localv4.kernels.device import device
from localv4.kernels.operation import float_at, float_word, take_chunk, word
from localv4.kernels.row_forms import MOST_CHANNELS, RowForm
from localv4.kernels.rows import (
    angle,
    inverse_size,
    rotate_pair,
    sum_of_squares,
    write_normed,
)
from localv4.kernels.simd import (
    add,
    at_least,
    divide,
    load_f32,
    multiply_add,
    negative,
    splat_f32,
    store_f32,
    zeros_f32,
)
from localv4.kernels.stack import stack_floats

_row = stack_floats(MOST_CHANNELS)


@entry("fast")
def append(operation: int, member: int, members: int) -> None:
    """Put the projected keys and gates of each token into their rings; gates get their slot's bias.

    Words: keys, gates, their row stride in floats, ape (ratio, width) f32, ratio, cell of the keys'
    ring, cell of the gates' ring, capacity, width, context, tokens.
    """
    keys, gates, stride = word(operation, 1), word(operation, 2), word(operation, 3)
    ape, ratio = word(operation, 4), word(operation, 5)
    key_ring, gate_ring = word(word(operation, 6), 0), word(word(operation, 7), 0)
    capacity, width = word(operation, 8), word(operation, 9)
    position, tokens = word(word(operation, 10), 0), word(operation, 11)
    t = take_chunk(operation)
    while t < tokens:
        row = 4 * stride * t
        out = 4 * width * ((position + t) % capacity)
        bias = ape + 4 * width * ((position + t) % ratio)
        for c in range(0, 4 * width, 64):
            store_f32(key_ring + out + c, load_f32(keys + row + c))
            gate = add(load_f32(gates + row + c), load_f32(bias + c))
            store_f32(gate_ring + out + c, gate)
        t = take_chunk(operation)


@device
def pool_window(
    out: int, keys: int, gates: int, capacity: int, width: int, ratio: int, number: int, n: int
) -> None:
    """out = sum over the slots of entry `number` of softmax(gate)[slot] * key, per channel."""
    previous = ratio if width > n and number > 0 else 0
    first, slots = (number * ratio - previous) % capacity, previous + ratio
    for c in range(0, n, 16):
        before, own = 4 * c, 4 * (width - n + c)
        largest = splat_f32(np.float32(-np.inf))
        slot = first
        for i in range(slots):
            at = 4 * width * slot + (before if i < previous else own)
            largest = at_least(load_f32(gates + at), largest)
            slot = 0 if slot + 1 == capacity else slot + 1
        largest = negative(largest)
        weights, total = zeros_f32(), zeros_f32()
        slot = first
        for i in range(slots):
            at = 4 * width * slot + (before if i < previous else own)
            weight = exp(add(load_f32(gates + at), largest))
            weights = add(weights, weight)
            total = multiply_add(weight, load_f32(keys + at), total)
            slot = 0 if slot + 1 == capacity else slot + 1
        store_f32(out + 4 * c, divide(total, weights))


def pooling(form: RowForm) -> Callable[[int, int, int], None]:
    """Make the function of the operation that writes entries in a form."""
    stride, encode = form.stride, form.encode

    @device
    def pool(operation: int, member: int, members: int) -> None:
        """Write the entries that the tokens complete: softmax over the slots, norm, rotation.

        Entry w has the rotation of its window's first token, ratio * w.
        Words: cell of the keys' ring, cell of the gates' ring, capacity, width, ratio, weight of
        the norm, eps as f32 bits, frequencies (pairs) f32, pairs, cell of the entries, n, context,
        tokens.
        """
        keys, gates = word(word(operation, 1), 0), word(word(operation, 2), 0)
        capacity, width, ratio = word(operation, 3), word(operation, 4), word(operation, 5)
        weight, eps = word(operation, 6), float_word(operation, 7)
        frequencies, pairs = word(operation, 8), word(operation, 9)
        entries, n = word(word(operation, 10), 0), word(operation, 11)
        position, tokens = word(word(operation, 12), 0), word(operation, 13)
        end, row = (position + tokens) // ratio, _row()
        number = position // ratio + take_chunk(operation)
        while number < end:
            pool_window(row, keys, gates, capacity, width, ratio, number, n)
            factor = inverse_size(sum_of_squares(row, n), n, eps)
            write_normed(row, 0, 0, 0, 0, row, weight, factor, n, 0)
            first = row + 4 * (n - 2 * pairs)
            for i in range(pairs):
                cos, sin = angle(number * ratio, float_at(frequencies + 4 * i))
                rotate_pair(first + 8 * i, cos, sin)
            encode(entries + stride(n, 2 * pairs) * number, row, n, 2 * pairs)
            number = position // ratio + take_chunk(operation)

    return pool
