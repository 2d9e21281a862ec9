"""The part of attention that reads keys, for each form of compressed rows.

Memory and words are those of `kernels.attend`. Entries that are not float32 are read a tile at a
time where queries are multiplied with them, and CHANNELS channels at a time where they are values.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from localv4.kernels.attend import (
    KEY_BLOCK,
    LINE,
    finish_values,
    key_address,
    key_count,
    keys_of,
    prepare_query,
    slots_of,
    softmax,
    window_count,
)
from localv4.kernels.device import device
from localv4.kernels.head_lanes import lane_row
from localv4.kernels.head_tiles import CHANNELS, LAST_TILE, STEP, TILE, TILE_ROWS, TILE_VECTORS
from localv4.kernels.operation import chunk_groups, float_word, take_chunk, word
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


Score = Callable[[int, int, int, int, int, int, int, int], None]
SumValues = Callable[[int, int, int, int, int, int, int, int], None]


AttendOne = Callable[[int, int, int, int, int, int, int], None]
Operation = Callable[[int, int, int], None]


@dataclass(frozen=True, slots=True, eq=False)
class AttendKeys:
    """The functions of the operations that read keys, with entries of one form."""

    scores: Operation
    values: Operation
    attend: Operation


@device
def float_count(operation: int, t: int) -> int:
    """Return how many keys of token t, copies of the last one included, lie in its window."""
    raw, count = window_count(operation, t), key_count(operation, t)
    return raw if raw < count else count + TILE_ROWS


@device
def find_keys(
    operation: int, t: int, scratch: int, heads: int, n: int, entry_row: int, first: int, end: int
) -> None:
    """Write the addresses of tiles of keys to their rows; behind the last key its copies.

    entry_row: bytes of an entry.
    """
    row = lane_row(heads)
    keys, last = keys_of(scratch, heads, n) + row, key_count(operation, t) - 1
    for j in range(first * TILE_ROWS, end * TILE_ROWS):
        key = key_address(operation, t, min(j, last), 4 * n, entry_row)
        write_i64(keys + j * (row + LINE), key)


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


def attend_keys(form: RowForm) -> AttendKeys:
    """Make the functions for one form of entries."""
    score, sum_values = _scorer(form), _summer(form)
    attend = _share_tokens(_attend_one(score, sum_values))
    return AttendKeys(_share_scores(score), _share_values(sum_values), attend)


def _scorer(form: RowForm) -> Score:
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
        """Find and score tiles of keys of token t."""
        find_keys(operation, t, scratch, heads, n, stride(n, rope), first, end)
        row, raw = lane_row(heads), float_count(operation, t)
        key_row, ahead = row + LINE, stride(n, rope) * LANES // n
        floats, places = _tile_floats(), _tile_addresses()
        for tile in range(first, end):
            at = keys_of(scratch, heads, n) + tile * TILE_ROWS * key_row
            following = at + TILE_ROWS * key_row if tile + 1 < end else at
            keys, next_keys = _addresses(at + row, key_row), _addresses(following + row, key_row)
            if not is_plain:
                own = raw - tile * TILE_ROWS
                read_tile(places, floats, at + row, key_row, own, n, rope)
                keys = _addresses(places, 8)
            score_tile(scratch, at, row, n, keys, next_keys, ahead)

    return score


def _summer(form: RowForm) -> SumValues:
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


def _share_scores(score: Score) -> Operation:
    @device
    def scores(operation: int, member: int, members: int) -> None:
        """Multiply the queries of one token with its keys.

        Words: context, span, ratio, counts, chosen, top_k, window, capacity, entries, heads, n,
        scratch, pairs.
        """
        heads, n, scratch = word(operation, 10), word(operation, 11), word(operation, 12)
        rope = 2 * word(operation, 13)
        tiles = (key_count(operation, 0) + TILE_ROWS - 1) // TILE_ROWS
        chunk = chunk_groups(tiles, members)
        first = take_chunk(operation) * chunk
        while first < tiles:
            end = min(first + chunk, tiles)
            score(operation, 0, scratch, heads, n, rope, first, end)
            first = take_chunk(operation) * chunk

    return scores


def _share_values(sum_values: SumValues) -> Operation:
    @device
    def values(operation: int, member: int, members: int) -> None:
        """Sum the values of one token and turn them back.

        Words: context, span, ratio, counts, heads, n, cos, sin, pairs, scratch, out. out: heads * n
        float32.
        """
        heads, n = word(operation, 5), word(operation, 6)
        cos, sin, pairs = word(operation, 7), word(operation, 8), word(operation, 9)
        scratch, out = word(operation, 10), word(operation, 11)
        raw, count = float_count(operation, 0), key_count(operation, 0)
        chunk = CHANNELS * chunk_groups(n // CHANNELS, members)
        start = take_chunk(operation) * chunk
        while start < n:
            end = min(start + chunk, n)
            sum_values(scratch, heads, n, 2 * pairs, raw, count, start, end)
            for first in range(start, end, CHANNELS):
                finish_values(out, scratch, first, heads, n, cos, sin, pairs)
            start = take_chunk(operation) * chunk

    return values


def _attend_one(score: Score, sum_values: SumValues) -> AttendOne:
    @device
    def attend_one(
        operation: int,
        t: int,
        scratch: int,
        heads: int,
        n: int,
        rope: int,
        sinks: int,
    ) -> None:
        """Replace the query of token t, in lanes of scratch memory, by the sums of its values."""
        row, raw, count = lane_row(heads), float_count(operation, t), key_count(operation, t)
        tiles, keys = (count + TILE_ROWS - 1) // TILE_ROWS, keys_of(scratch, heads, n)
        score(operation, t, scratch, heads, n, rope, 0, tiles)
        for v in range(row // 64):
            softmax(keys + 64 * v, row + LINE, count, load_f32(sinks + 64 * v))
        sum_values(scratch, heads, n, rope, raw, count, 0, n)

    return attend_one


def _share_tokens(attend_one: AttendOne) -> Operation:
    @device
    def attend(operation: int, member: int, members: int) -> None:
        """Replace the raw queries of each token by the output of its attention.

        Words: context, span, ratio, counts, chosen, top_k, window, capacity, entries, x, its row
        stride in floats, tokens, heads, n, cos, sin, pairs, eps as f32 bits, sinks (lanes),
        scratch, bytes of scratch memory of a member. x (tokens, heads * n); cos, sin (tokens,
        pairs).
        """
        x, row_stride, tokens = word(operation, 10), word(operation, 11), word(operation, 12)
        heads, n = word(operation, 13), word(operation, 14)
        pairs, eps, sinks = word(operation, 17), float_word(operation, 18), word(operation, 19)
        scratch = word(operation, 20) + member * word(operation, 21)
        t = take_chunk(operation)
        while t < tokens:
            own, cos = x + 4 * row_stride * t, word(operation, 15) + 4 * pairs * t
            sin = word(operation, 16) + 4 * pairs * t
            for v in range(lane_row(heads) // 64):
                prepare_query(scratch, own, v, heads, n, cos, sin, pairs, eps)
            attend_one(operation, t, scratch, heads, n, 2 * pairs, sinks)
            for first in range(0, n, CHANNELS):
                finish_values(own, scratch, first, heads, n, cos, sin, pairs)
            t = take_chunk(operation)

    return attend
