"""Attention's products with keys in vector registers, in float32: heads in lanes, keys beside.

Memory and words are those of `kernels.attend`. Entries that are not float32 are read a tile at a
time where queries are multiplied with them, and CHANNELS channels at a time where they are values.
"""

from typing import Any

import numpy as np

from localv4.kernels.attend import (
    KEY_BLOCK,
    LINE,
    KeyProducts,
    find_keys,
    float_count,
    keys_of,
    slots_of,
    softmax,
)
from localv4.kernels.device import device
from localv4.kernels.head_lanes import lane_row, lanes_to_heads, rotate_heads
from localv4.kernels.head_tiles import CHANNELS, LAST_TILE, STEP, TILE, TILE_ROWS, TILE_VECTORS
from localv4.kernels.row_forms import MOST_CHANNELS, RowForm
from localv4.kernels.simd import load_f32, read_i64, store_f32, write_i64, zeros_f32
from localv4.kernels.simd_ir import LANES
from localv4.kernels.stack import stack_floats

_zeros, _load, _store = TILE.zeros, TILE.load, TILE.store
_addresses, _prefetch = TILE.addresses, TILE.prefetch
_add_channels, _add_key = TILE.add_channels, TILE.add_key
_load_last, _store_last, _add_key_last = LAST_TILE.load, LAST_TILE.store, LAST_TILE.add_key
_LAST_ROWS = LAST_TILE.rows
_tile_floats = stack_floats(TILE_ROWS * MOST_CHANNELS)
_tile_addresses = stack_floats(2 * TILE_ROWS)
_ONE = np.float32(1)


def lane_products(form: RowForm) -> KeyProducts:
    """Make the functions for entries of one form."""
    return KeyProducts(
        keys=TILE_ROWS,
        channels=CHANNELS,
        turn=_stay,
        score=_scorer(form),
        weigh=softmax,
        sum_values=_summer(form),
        finish=finish_values,
    )


@device
def _stay(scratch: int, v: int, heads: int, n: int) -> None:
    """Leave the queries as they are."""


@device
def score_tile(
    scratch: int, at: int, row: int, n: int, keys: Any, next_keys: Any, ahead: int
) -> None:
    """Write the scores of a tile of keys to its rows at `at`; keys: where its float32 are.

    Of the next keys, `ahead` bytes are asked for with each LANES channels.
    """
    key_row = row + LINE
    for v in range(0, row // 64, TILE_VECTORS):
        sums = _zeros()
        for line in range(0, n, LANES):
            _prefetch(next_keys, line // LANES * ahead)
            for channel in range(line, line + LANES, STEP):
                queries = scratch + channel * row + 64 * v
                sums = _add_channels(sums, queries, row, keys, 4 * channel)
        _store(at + 64 * v, key_row, sums)


@device
def add_slots(scratch: int, keys: int, slot: int, row: int, first: int, count: int) -> None:
    """Add `count` keys, at most KEY_BLOCK, to the sums of CHANNELS channels from `first` on.

    keys: the row of the first key, where its weights are; slot: the channels of the keys.
    """
    key_row = row + LINE
    for v in range(0, row // 64, TILE_VECTORS):
        at, weights = scratch + first * row + 64 * v, keys + 64 * v
        for channel in range(0, CHANNELS - _LAST_ROWS, TILE_ROWS):
            sums = _load(at + channel * row, row)
            for j in range(count):
                sums = _add_key(sums, weights + j * key_row, slot + LINE * j + 4 * channel)
            _store(at + channel * row, row, sums)
        at += (CHANNELS - _LAST_ROWS) * row
        slot_end = slot + 4 * (CHANNELS - _LAST_ROWS)
        last_sums = _load_last(at, row)
        for j in range(count):
            last_sums = _add_key_last(last_sums, weights + j * key_row, slot_end + LINE * j)
        _store_last(at, row, last_sums)


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


def _scorer(form: RowForm) -> Any:
    stride, read, is_plain = form.stride, form.load, form.is_plain

    @device
    def read_tile(
        places: int, out: int, keys: int, key_row: int, raw: int, n: int, rope: int
    ) -> None:
        """Write where the float32 of a tile of keys are: the first `raw` have them."""
        for i in range(TILE_ROWS):
            key = read_i64(keys + i * key_row)
            if i >= raw:
                for channel in range(0, n, LANES):
                    store_f32(out + 4 * channel, read(key, channel, n, rope))
                key = out
                out += 4 * n
            write_i64(places + 8 * i, key)

    @device
    def score(
        operation: int, t: int, scratch: int, heads: int, n: int, rope: int, first: int, end: int
    ) -> None:
        """Find and score keys first ... end - 1 of token t, whole tiles of them."""
        find_keys(operation, t, scratch, heads, n, stride(n, rope), first, end)
        row, raw = lane_row(heads), float_count(operation, t)
        key_row, ahead = row + LINE, stride(n, rope) * LANES // n
        floats, places = _tile_floats(), _tile_addresses()
        for j in range(first, end, TILE_ROWS):
            at = keys_of(scratch, heads, n) + j * key_row
            following = at + TILE_ROWS * key_row if j + TILE_ROWS < end else at
            keys, next_keys = _addresses(at + row, key_row), _addresses(following + row, key_row)
            if not is_plain:
                read_tile(places, floats, at + row, key_row, raw - j, n, rope)
                keys = _addresses(places, 8)
            score_tile(scratch, at, row, n, keys, next_keys, ahead)

    return score


def _summer(form: RowForm) -> Any:
    read = form.load

    @device
    def add_values(
        scratch: int,
        keys: int,
        slot: int,
        row: int,
        n: int,
        rope: int,
        first: int,
        raw: int,
        count: int,
    ) -> None:
        """Add `count` keys, at most KEY_BLOCK, of which the first `raw` are float32.

        They are added to the sums of CHANNELS channels from `first` on. keys: the row of the first
        key; slot: memory for the channels of the keys.
        """
        for j in range(count):
            key = read_i64(keys + j * (row + LINE) + row)
            channels = load_f32(key + 4 * first) if j < raw else read(key, first, n, rope)
            store_f32(slot + LINE * j, channels)
        add_slots(scratch, keys, slot, row, first, count)

    @device
    def sum_values(
        scratch: int, heads: int, n: int, rope: int, raw: int, count: int, start: int, end: int
    ) -> None:
        """Sum channels start ... end - 1 of all keys."""
        row = lane_row(heads)
        keys, slot = keys_of(scratch, heads, n), slots_of(scratch, heads, n) + start * 4 * KEY_BLOCK
        for at in range(scratch + start * row, scratch + end * row, 64):
            store_f32(at, zeros_f32())
        for j in range(0, count, KEY_BLOCK):
            at, some = keys + j * (row + LINE), min(KEY_BLOCK, count - j)
            for first in range(start, end, CHANNELS):
                add_values(scratch, at, slot, row, n, rope, first, raw - j, some)

    return sum_values
