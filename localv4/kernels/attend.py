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
from localv4.kernels.simd_ir import LANES

KEY_BLOCK = 64
"""Keys whose weights stay in the first cache while they meet all channels."""

_LINE = 64
_ONE = np.float32(1)
_zeros, _load, _store = TILE.zeros, TILE.load, TILE.store
_addresses, _prefetch = TILE.addresses, TILE.prefetch
_add_channels, _add_key = TILE.add_channels, TILE.add_key
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
def prepare_query(
    scratch: int,
    x: int,
    v: int,
    heads: int,
    n: int,
    cos: int,
    sin: int,
    pairs: int,
    eps: np.float32,
) -> None:
    """Norm and rotate vector v of the heads at x into its lanes, divided by sqrt(n)."""
    row, at = lane_row(heads), scratch + 64 * v
    take_heads(at, row, x, n, LANES * v, heads)
    scale = splat_f32(_ONE / np.float32(math.sqrt(n)))
    scale_heads(at, row, n, multiply(norm_factors(at, row, n, eps), scale))
    rotate_heads(at + (n - 2 * pairs) * row, row, pairs, cos, sin, _ONE)


@device
def find_keys(
    operation: int, t: int, scratch: int, heads: int, n: int, first: int, end: int
) -> None:
    """Write the addresses of tiles of keys to their rows; behind the last key its copies."""
    row = lane_row(heads)
    keys, last = keys_of(scratch, heads, n) + row, key_count(operation, t) - 1
    for j in range(first * TILE_ROWS, end * TILE_ROWS):
        write_i64(keys + j * (row + _LINE), key_address(operation, t, min(j, last), 4 * n))


@device
def score_keys(scratch: int, heads: int, n: int, first: int, end: int) -> None:
    """Write the scores of tiles of keys."""
    row = lane_row(heads)
    key_row = row + _LINE
    for tile in range(first, end):
        at = keys_of(scratch, heads, n) + tile * TILE_ROWS * key_row
        following = at + TILE_ROWS * key_row if tile + 1 < end else at
        keys, next_keys = _addresses(at + row, key_row), _addresses(following + row, key_row)
        for v in range(0, row // 64, TILE_VECTORS):
            sums = _zeros()
            for line in range(0, n, LANES):
                _prefetch(next_keys, 4 * line)
                for channel in range(line, line + LANES, STEP):
                    queries = scratch + channel * row + 64 * v
                    sums = _add_channels(sums, queries, row, keys, 4 * channel)
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
def sum_values(scratch: int, heads: int, n: int, count: int, start: int, end: int) -> None:
    """Sum channels start ... end - 1 of all keys."""
    row = lane_row(heads)
    keys, slot = keys_of(scratch, heads, n), slots_of(scratch, heads, n) + start * 4 * KEY_BLOCK
    for at in range(scratch + start * row, scratch + end * row, 64):
        store_f32(at, zeros_f32())
    for j in range(0, count, KEY_BLOCK):
        some = min(KEY_BLOCK, count - j)
        for first in range(start, end, CHANNELS):
            add_values(scratch, keys + j * (row + _LINE), slot, row, first, some)


@device
def finish_values(
    out: int, scratch: int, first: int, heads: int, n: int, cos: int, sin: int, pairs: int
) -> None:
    """Turn CHANNELS sums back by the angles of the query and write them to the row at out."""
    row, start = lane_row(heads), n - 2 * pairs
    turned = max(first, start)
    done, count = (turned - start) // 2, max(0, first + CHANNELS - turned) // 2
    for head in range(0, heads, LANES):
        at = scratch + 4 * head
        rotate_heads(at + turned * row, row, count, cos + 4 * done, sin + 4 * done, -_ONE)
        place = out + 4 * (head * n + first)
        lanes_to_heads(place, 4 * n, at + first * row, row, heads - head)


# --- one token ---


@entry("fast")
def attend_query(operation: int, member: int, members: int) -> None:
    """Norm and rotate the queries of one token and lay them out in lanes.

    Words: x, heads, n, cos, sin, pairs, eps as f32 bits, scratch. x: heads * n float32.
    """
    x, heads, n = word(operation, 1), word(operation, 2), word(operation, 3)
    cos, sin, pairs = word(operation, 4), word(operation, 5), word(operation, 6)
    eps, scratch = float_word(operation, 7), word(operation, 8)
    v = take_chunk(operation)
    while v < lane_row(heads) // 64:
        prepare_query(scratch, x, v, heads, n, cos, sin, pairs, eps)
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
        end = min(first + chunk, tiles)
        find_keys(operation, 0, scratch, heads, n, first, end)
        score_keys(scratch, heads, n, first, end)
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
    count, chunk = key_count(operation, 0), CHANNELS * chunk_groups(n // CHANNELS, members)
    start = take_chunk(operation) * chunk
    while start < n:
        end = min(start + chunk, n)
        sum_values(scratch, heads, n, count, start, end)
        for first in range(start, end, CHANNELS):
            finish_values(out, scratch, first, heads, n, cos, sin, pairs)
        start = take_chunk(operation) * chunk


# --- many tokens ---


@device
def attend_keys(operation: int, t: int, scratch: int, heads: int, n: int, sinks: int) -> None:
    """Replace the query of token t, in lanes of the scratch memory, by the sums of its values."""
    row, count = lane_row(heads), key_count(operation, t)
    tiles, keys = (count + TILE_ROWS - 1) // TILE_ROWS, keys_of(scratch, heads, n)
    find_keys(operation, t, scratch, heads, n, 0, tiles)
    score_keys(scratch, heads, n, 0, tiles)
    for v in range(row // 64):
        softmax(keys + 64 * v, row + _LINE, count, load_f32(sinks + 64 * v))
    sum_values(scratch, heads, n, count, 0, n)


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
    scratch = word(operation, 20) + member * word(operation, 21)
    t = take_chunk(operation)
    while t < tokens:
        own, cos = x + 4 * stride * t, word(operation, 15) + 4 * pairs * t
        sin = word(operation, 16) + 4 * pairs * t
        for v in range(lane_row(heads) // 64):
            prepare_query(scratch, own, v, heads, n, cos, sin, pairs, eps)
        attend_keys(operation, t, scratch, heads, n, sinks)
        for first in range(0, n, CHANNELS):
            finish_values(own, scratch, first, heads, n, cos, sin, pairs)
        t = take_chunk(operation)
