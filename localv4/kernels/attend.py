"""Attention of one token or many: heads in vector lanes, the same arithmetic for both.

One key row per token serves all heads and is the value, too. The keys of a token are the raw
window, oldest first, and then its compressed entries. For one token there are four operations,
which share the work inside the token; for many there is one, which shares out tokens. Those that
read keys are made by `kernels.attend_keys`, for each form of entries.

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
position % capacity), capacity, entries (cell of rows of n channels in a
form of `kernels.row_forms`).
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
from localv4.kernels.head_tiles import CHANNELS, TILE_ROWS
from localv4.kernels.operation import float_word, take_chunk, word
from localv4.kernels.simd import (
    Vector,
    add,
    at_least,
    divide,
    load_f32,
    multiply,
    negative,
    read_u32,
    splat_f32,
    store_f32,
)
from localv4.kernels.simd_ir import LANES

KEY_BLOCK = 64
"""Keys whose weights stay in the first cache while they meet all channels."""

LINE = 64
_ONE = np.float32(1)


def scratch_bytes(heads: int, n: int, keys: int) -> int:
    """Return the size of the scratch memory for tokens that see up to `keys` keys of n channels."""
    row = 4 * lanes(heads)
    return n * row + 4 * n * KEY_BLOCK + (keys + TILE_ROWS) * (row + LINE)


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
def key_address(operation: int, t: int, j: int, row: int, entry_row: int) -> int:
    """Return where key number j of token t is; bytes of a key of the window, and of an entry."""
    raw = window_count(operation, t)
    if j < raw:
        position = last_position(operation, t) - raw + 1 + j
        return word(word(operation, 7), 0) + position % word(operation, 8) * row
    chosen, place = word(operation, 5), j - raw
    if chosen != 0:
        place = int(read_u32(chosen + 4 * (t * word(operation, 6) + place)))
    return word(word(operation, 9), 0) + place * entry_row


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
        softmax(keys + 64 * v, row + LINE, count, load_f32(sinks + 64 * v))
        v = take_chunk(operation)
