"""Attention of one token or many: heads in vector lanes, the same arithmetic for both.

One key row per token serves all heads and is the value, too. The keys of a token are the raw
window, oldest first, and then its compressed entries. For one token there are four operations,
which share the work inside the token; for many there is one, which shares out tokens
(`kernels.attend_keys`). The products with keys are made in vector registers
(`kernels.attend_lanes`) or in tiles (`kernels.attend_tiles`).

All of them work in scratch memory of one layout, which does not depend on the number of keys:

| part  | bytes               | holds                                                            |
|-------|---------------------|------------------------------------------------------------------|
| lanes | n * lanes * 4       | the query, and when it is not needed any more the sums of values |
| slots | n * KEY_BLOCK * 4   | for each CHANNELS channels those of KEY_BLOCK keys, side by side |
| keys  | lanes * 4 + 64 each | score, later weight of each head; then the address of the key    |

Behind the last key its copies fill up a block of keys.

Words that say which keys token t at `position + t` sees: context (its word 0: position), span (how
many positions the window shows, the token's own included), ratio (tokens of an entry, 0: there are
no entries), counts (i64: number of entries of each token; 0: all that are complete), chosen (i32
rows of top_k: which entries; 0: the first ones), top_k, window (cell of a ring of n float32 by
position % capacity), capacity, entries (cell of rows of n channels in a
form of `kernels.row_forms`).
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from localv4.kernels.activations import exp
from localv4.kernels.device import device
from localv4.kernels.head_lanes import (
    lane_row,
    lanes,
    norm_factors,
    rotate_heads,
    scale_heads,
    take_heads,
)
from localv4.kernels.head_tiles import TILE_ROWS
from localv4.kernels.operation import word
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
    write_i64,
)
from localv4.kernels.simd_ir import LANES

KEY_BLOCK = 64
"""Keys whose weights stay in the first cache while they meet all channels."""

LINE = 64

MOST_KEYS = max(TILE_ROWS, 32)
"""Keys that are multiplied together at most."""

_ONE = np.float32(1)


@dataclass(frozen=True, slots=True, eq=False)
class KeyProducts:
    """One way to multiply queries and weights with keys, as functions of kernels.

    `keys`, `channels`: how many are taken at once at least. `turn(scratch, v, heads, n)` brings
    vector v of the prepared queries into the layout that `score` needs, `weigh(keys, row, count,
    sink)` makes weights of the scores of sixteen heads in the layout that `sum_values` needs.
    `score(operation, t, scratch, heads, n, rope, first, end)` finds and scores keys of token t;
    `sum_values(scratch, heads, n, rope, raw, count, start, end)` sums channels of all keys, of
    which the first `raw` are float32; `finish(out, scratch, first, heads, n, cos, sin, pairs)`
    turns the sums of `channels` channels back and writes them to the row at out.
    """

    keys: int
    channels: int
    turn: Callable[[int, int, int, int], None]
    score: Callable[[int, int, int, int, int, int, int, int], None]
    weigh: Callable[[int, int, int, Vector], None]
    sum_values: Callable[[int, int, int, int, int, int, int, int], None]
    finish: Callable[[int, int, int, int, int, int, int, int], None]


def scratch_bytes(heads: int, n: int, keys: int) -> int:
    """Return the size of the scratch memory for tokens that see up to `keys` keys of n channels."""
    row = 4 * lanes(heads)
    return (n + LANES) * row + 4 * n * KEY_BLOCK + (keys + MOST_KEYS) * (row + LINE)


# --- the parts of the scratch memory, and the keys of a token ---


@device
def slots_of(scratch: int, heads: int, n: int) -> int:
    """Return where the channels of a block of keys are put side by side."""
    return scratch + (n + LANES) * lane_row(heads)


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


@device
def float_count(operation: int, t: int) -> int:
    """Return how many keys of token t, copies of the last one included, lie in its window."""
    raw, count = window_count(operation, t), key_count(operation, t)
    return raw if raw < count else count + MOST_KEYS


@device
def find_keys(
    operation: int, t: int, scratch: int, heads: int, n: int, entry_row: int, first: int, end: int
) -> None:
    """Write the addresses of keys first ... end - 1 to their rows; behind the last key its copies.

    entry_row: bytes of an entry.
    """
    row = lane_row(heads)
    keys, last = keys_of(scratch, heads, n) + row, key_count(operation, t) - 1
    for j in range(first, end):
        key = key_address(operation, t, min(j, last), 4 * n, entry_row)
        write_i64(keys + j * (row + LINE), key)


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
