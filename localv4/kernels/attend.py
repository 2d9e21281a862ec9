"""Attention of one token or many: heads in vector lanes, the same arithmetic for both.

One key row per token serves all heads and is the value, too. The keys of a token are the raw
window, oldest first, and then its compressed entries. For one token there are four operations,
which share the work inside the token; for many there is one, which shares out tokens.

All of them work in scratch memory of one layout, which does not depend on the number of keys:

| part  | bytes               | holds                                                            |
|-------|---------------------|------------------------------------------------------------------|
| lanes | n * lanes * 4       | the query, and when it is not needed any more the sums of values |
| slots | n * KEY_BLOCK * 4   | for each CHANNELS channels those of KEY_BLOCK keys, side by side |
| keys  | lanes * 4 + 64 each | score, later weight of each head; then the address of the key    |

Words that say which keys token t at `position + t` sees: context (its word 0: position), span (how
many positions the window shows, the token's own included), ratio (tokens of an entry, 0: there are
no entries), counts (i64: number of entries of each token; 0: all that are complete), chosen (i32
rows of top_k: which entries; 0: the first ones), top_k, window (cell of a ring of n float32 by
position % capacity), capacity, entries (cell of rows of n float32).
"""

import math

import numpy as np

from localv4.kernels.activations import exp
from localv4.kernels.compiler import entry
from localv4.kernels.device import device
from localv4.kernels.head_lanes import (
    lane_row,
    lanes,
    lanes_to_heads,
    norm_factors,
    rotate_heads,
    scale_heads,
    take_heads,
)
from localv4.kernels.head_tiles import CHANNELS, LAST_TILE, STEP, TILE, TILE_ROWS, TILE_VECTORS
from localv4.kernels.operation import chunk_groups, float_word, take_chunk, word
from localv4.kernels.simd import (
    Vector,
    add,
    at_least,
    divide,
    load_f32,
    multiply,
    negative,
    read_i64,
    read_u32,
    splat_f32,
    store_f32,
    write_i64,
    zeros_f32,
)

KEY_BLOCK = 64
"""Keys whose weights stay in the first cache while they meet all channels."""

_LINE = 64
_ONE = np.float32(1)
_zeros, _load, _store = TILE.zeros, TILE.load, TILE.store
_addresses, _add_channels, _add_key = TILE.addresses, TILE.add_channels, TILE.add_key
_load_last, _store_last, _add_key_last = LAST_TILE.load, LAST_TILE.store, LAST_TILE.add_key
_LAST_ROWS = LAST_TILE.rows


def scratch_bytes(heads: int, n: int, keys: int) -> int:
    """Return the size of the scratch memory for tokens that see up to `keys` keys of n channels."""
    row = 4 * lanes(heads)
    return n * row + 4 * n * KEY_BLOCK + (keys + TILE_ROWS) * (row + _LINE)


# --- the parts of the scratch memory, and the keys of a token ---


@device
def slots_of(scratch: int, heads: int, n: int) -> int:
    """Return where the channels of a block of keys are put side by side."""
    return scratch + n * lane_row(heads)


@device
def keys_of(scratch: int, heads: int, n: int) -> int:
    """Return where the rows of the keys start."""
    return slots_of(scratch, heads, n) + 4 * n * KEY_BLOCK


@device
def last_position(operation: int, t: int) -> int:
    """Return the position of token t. Words: context."""
    return word(word(operation, 1), 0) + t


@device
def window_count(operation: int, t: int) -> int:
    """Return how many positions of the window token t sees. Words: context, span."""
    return min(word(operation, 2), last_position(operation, t) + 1)


@device
def key_count(operation: int, t: int) -> int:
    """Return how many keys token t sees. Words: context, span, ratio, counts."""
    raw, ratio, counts = window_count(operation, t), word(operation, 3), word(operation, 4)
    if ratio == 0:
        return raw
    return raw + ((last_position(operation, t) + 1) // ratio if counts == 0 else word(counts, t))


@device
def key_address(operation: int, t: int, j: int, row: int) -> int:
    """Return where key number j of token t is; row: bytes of a key."""
    raw = window_count(operation, t)
    if j < raw:
        position = last_position(operation, t) - raw + 1 + j
        return word(word(operation, 7), 0) + position % word(operation, 8) * row
    chosen, place = word(operation, 5), j - raw
    if chosen != 0:
        place = int(read_u32(chosen + 4 * (t * word(operation, 6) + place)))
    return word(word(operation, 9), 0) + place * row


# --- the arithmetic ---


@device
def prepare_query(out: int, row: int, x: int, v: int, heads: int, n: int, eps: np.float32) -> None:
    """Norm vector v of the heads at x and write it, divided by sqrt(n), to its lanes of `out`."""
    take_heads(out, row, x, n, 16 * v, heads)
    scale = splat_f32(_ONE / np.float32(math.sqrt(n)))
    scale_heads(out, row, n, multiply(norm_factors(out, row, n, eps), scale))


@device
def score_keys(operation: int, t: int, scratch: int, heads: int, n: int, tile: int) -> None:
    """Write the scores of a tile of keys, and their addresses; behind the last key its copies."""
    row = lane_row(heads)
    key_row = row + _LINE
    at = keys_of(scratch, heads, n) + tile * TILE_ROWS * key_row
    last = key_count(operation, t) - 1
    for i in range(TILE_ROWS):
        key = key_address(operation, t, min(tile * TILE_ROWS + i, last), 4 * n)
        write_i64(at + i * key_row + row, key)
    keys = _addresses(at + row, key_row)
    for v in range(0, row // 64, TILE_VECTORS):
        sums = _zeros()
        for channel in range(0, n, STEP):
            sums = _add_channels(sums, scratch + channel * row + 64 * v, row, keys, 4 * channel)
        _store(at + 64 * v, key_row, sums)


@device
def softmax(at: int, row: int, count: int, sink: Vector) -> None:
    """Make weights of the scores of sixteen heads; the sink takes part in maximum and sum only."""
    largest = sink
    for j in range(count):
        largest = at_least(load_f32(at + row * j), largest)
    lowered = negative(largest)
    total = exp(add(sink, lowered))
    for j in range(count):
        e = exp(add(load_f32(at + row * j), lowered))
        store_f32(at + row * j, e)
        total = add(total, e)
    share = divide(splat_f32(_ONE), total)
    for j in range(count):
        store_f32(at + row * j, multiply(load_f32(at + row * j), share))


@device
def clear_sums(scratch: int, row: int, first: int) -> None:
    """Set the sums of CHANNELS channels to zero."""
    for i in range(CHANNELS * row // 64):
        store_f32(scratch + first * row + 64 * i, zeros_f32())


@device
def add_values(scratch: int, keys: int, slot: int, row: int, first: int, count: int) -> None:
    """Add `count` keys, at most KEY_BLOCK, to the sums of CHANNELS channels from `first` on.

    keys: the row of the first key; slot: memory for the channels of the keys.
    """
    key_row = row + _LINE
    for j in range(count):
        key = read_i64(keys + j * key_row + row)
        store_f32(slot + _LINE * j, load_f32(key + 4 * first))
    for v in range(0, row // 64, TILE_VECTORS):
        at, weights = scratch + first * row + 64 * v, keys + 64 * v
        for channel in range(0, CHANNELS - _LAST_ROWS, TILE_ROWS):
            sums = _load(at + channel * row, row)
            for j in range(count):
                sums = _add_key(sums, weights + j * key_row, slot + _LINE * j + 4 * channel)
            _store(at + channel * row, row, sums)
        at += (CHANNELS - _LAST_ROWS) * row
        slot_end = slot + 4 * (CHANNELS - _LAST_ROWS)
        last_sums = _load_last(at, row)
        for j in range(count):
            last_sums = _add_key_last(last_sums, weights + j * key_row, slot_end + _LINE * j)
        _store_last(at, row, last_sums)


@device
def finish_values(
    out: int, scratch: int, first: int, heads: int, n: int, cos: int, sin: int, pairs: int
) -> None:
    """Turn CHANNELS sums back by the angles of the query and write them to the row at out."""
    row, start = lane_row(heads), n - 2 * pairs
    turned = max(first, start)
    skipped, count = (turned - start) // 2, max(0, first + CHANNELS - turned) // 2
    for v in range((heads + 15) // 16):
        at, head = scratch + 64 * v, 16 * v
        angles = (cos + 4 * skipped, sin + 4 * skipped)
        rotate_heads(at + turned * row, row, count, angles[0], angles[1], -_ONE)
        place = out + 4 * (head * n + first)
        lanes_to_heads(place, 4 * n, at + first * row, row, heads - head)


# --- one token ---


@entry("fast")
def attend_query(operation: int, member: int, members: int) -> None:
    """Norm and rotate the queries of one token and lay them out in lanes.

    Words: x, heads, n, cos, sin, pairs, eps as f32 bits, scratch. x: heads * n float32.
    """
    x, heads, n, scratch = (
        word(operation, 1),
        word(operation, 2),
        word(operation, 3),
        word(operation, 8),
    )
    cos, sin, pairs = word(operation, 4), word(operation, 5), word(operation, 6)
    eps, row = float_word(operation, 7), lane_row(heads)
    v = take_chunk(operation)
    while v < row // 64:
        at = scratch + 64 * v
        prepare_query(at, row, x, v, heads, n, eps)
        rotate_heads(at + (n - 2 * pairs) * row, row, pairs, cos, sin, _ONE)
        v = take_chunk(operation)


@entry("fast")
def attend_scores(operation: int, member: int, members: int) -> None:
    """Multiply the queries of one token with its keys.

    Words: context, span, ratio, counts, chosen, top_k, window, capacity, entries, heads, n,
    scratch.
    """
    heads, n, scratch = word(operation, 10), word(operation, 11), word(operation, 12)
    tiles = (key_count(operation, 0) + TILE_ROWS - 1) // TILE_ROWS
    chunk = chunk_groups(tiles, members)
    first = take_chunk(operation) * chunk
    while first < tiles:
        for tile in range(first, min(first + chunk, tiles)):
            score_keys(operation, 0, scratch, heads, n, tile)
        first = take_chunk(operation) * chunk


@entry("fast")
def attend_softmax(operation: int, member: int, members: int) -> None:
    """Make weights of the scores of one token.

    Words: context, span, ratio, counts, heads, n, sinks (lanes), scratch.
    """
    heads, n = word(operation, 5), word(operation, 6)
    sinks, scratch = word(operation, 7), word(operation, 8)
    row, count = lane_row(heads), key_count(operation, 0)
    keys = keys_of(scratch, heads, n)
    v = take_chunk(operation)
    while v < row // 64:
        softmax(keys + 64 * v, row + _LINE, count, load_f32(sinks + 64 * v))
        v = take_chunk(operation)


@entry("fast")
def attend_values(operation: int, member: int, members: int) -> None:
    """Sum the values of one token and turn them back.

    Words: context, span, ratio, counts, heads, n, cos, sin, pairs, scratch, out. out: heads * n
    float32.
    """
    heads, n = word(operation, 5), word(operation, 6)
    cos, sin, pairs = word(operation, 7), word(operation, 8), word(operation, 9)
    scratch, out = word(operation, 10), word(operation, 11)
    row, count = lane_row(heads), key_count(operation, 0)
    keys, slots = keys_of(scratch, heads, n), slots_of(scratch, heads, n)
    block = take_chunk(operation)
    while block < n // CHANNELS:
        first, slot = block * CHANNELS, slots + block * KEY_BLOCK * _LINE
        clear_sums(scratch, row, first)
        for j in range(0, count, KEY_BLOCK):
            at = keys + j * (row + _LINE)
            add_values(scratch, at, slot, row, first, min(KEY_BLOCK, count - j))
        finish_values(out, scratch, first, heads, n, cos, sin, pairs)
        block = take_chunk(operation)


# --- many tokens ---


@device
def attend_keys(operation: int, t: int, scratch: int, heads: int, n: int, sinks: int) -> None:
    """Replace the query of token t, in lanes of the scratch memory, by the sums of its values."""
    row, count = lane_row(heads), key_count(operation, t)
    keys, slot = keys_of(scratch, heads, n), slots_of(scratch, heads, n)
    for tile in range((count + TILE_ROWS - 1) // TILE_ROWS):
        score_keys(operation, t, scratch, heads, n, tile)
    for v in range(row // 64):
        softmax(keys + 64 * v, row + _LINE, count, load_f32(sinks + 64 * v))
    for first in range(0, n, CHANNELS):
        clear_sums(scratch, row, first)
    for j in range(0, count, KEY_BLOCK):
        at, some = keys + j * (row + _LINE), min(KEY_BLOCK, count - j)
        for first in range(0, n, CHANNELS):
            add_values(scratch, at, slot, row, first, some)


@entry("fast")
def attend(operation: int, member: int, members: int) -> None:
    """Replace the raw queries of each token by the output of its attention.

    Words: context, span, ratio, counts, chosen, top_k, window, capacity, entries, x, its row stride
    in floats, tokens, heads, n, cos, sin, pairs, eps as f32 bits, sinks (lanes), scratch, bytes of
    scratch memory of a member. x (tokens, heads * n); cos, sin (tokens, pairs).
    """
    x, stride, tokens = word(operation, 10), word(operation, 11), word(operation, 12)
    heads, n = word(operation, 13), word(operation, 14)
    pairs, eps, sinks = word(operation, 17), float_word(operation, 18), word(operation, 19)
    scratch, row = word(operation, 20) + member * word(operation, 21), lane_row(heads)
    t = take_chunk(operation)
    while t < tokens:
        own, cos = x + 4 * stride * t, word(operation, 15) + 4 * pairs * t
        sin = word(operation, 16) + 4 * pairs * t
        for v in range(row // 64):
            at = scratch + 64 * v
            prepare_query(at, row, own, v, heads, n, eps)
            rotate_heads(at + (n - 2 * pairs) * row, row, pairs, cos, sin, _ONE)
        attend_keys(operation, t, scratch, heads, n, sinks)
        for first in range(0, n, CHANNELS):
            finish_values(own, scratch, first, heads, n, cos, sin, pairs)
        t = take_chunk(operation)
