"""The part of the indexer that reads entries, for each form of their rows.

Memory and words are those of `kernels.index_scores`. Rows that are not float32 are read a tile at a
time.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from localv4.kernels.device import device
from localv4.kernels.head_lanes import lane_row
from localv4.kernels.head_tiles import STEP, TILE, TILE_ROWS, TILE_VECTORS
from localv4.kernels.index_scores import (
    add_weighted,
    choose,
    member_scratch,
    no_parts,
    prepare_index_query,
    rank_all,
    scores_of,
    store_totals,
    visible_entries,
)
from localv4.kernels.operation import chunk_groups, float_word, take_chunk, word
from localv4.kernels.row_forms import MOST_CHANNELS, RowForm
from localv4.kernels.simd import prefetch_far, store_f32
from localv4.kernels.simd_ir import LANES
from localv4.kernels.stack import stack_floats

_zeros, _places = TILE.zeros, TILE.places
_prefetch, _add_channels = TILE.prefetch, TILE.add_channels
_tile_floats = stack_floats(TILE_ROWS * MOST_CHANNELS)
_TILES_AHEAD = 8
"""How far ahead of its reads a tile asks for memory."""


Prepare = Callable[[int, int, int, int, int, int, int, int, np.float32, int], None]
Score = Callable[[int, int, int, int, int, int, int], None]


Operation = Callable[[int, int, int], None]


@dataclass(frozen=True, slots=True, eq=False)
class IndexKeys:
    """The functions of the operations that read entries of one form, or what suits them."""

    query: Operation
    scores: Operation
    choose: Operation


def index_keys(form: RowForm) -> IndexKeys:
    """Make the functions for one form of entries."""
    score, prepare = _scorer(form), prepare_index_query
    return IndexKeys(share_query(prepare), _share_scores(score), _share_tokens(prepare, score))


def _scorer(form: RowForm) -> Score:
    stride, read, is_plain = form.stride, form.load, form.is_plain

    @device
    def read_tile(out: int, entries: int, first: int, last: int, n: int, rope: int) -> None:
        """Write a tile of entries as float32; behind the last one its copies."""
        size = stride(n, rope)
        ahead = entries + (first + _TILES_AHEAD * TILE_ROWS) * size
        for at in range(ahead, ahead + TILE_ROWS * size, 64):
            prefetch_far(at)
        for i in range(first, first + TILE_ROWS):
            row = entries + min(i, last) * size
            for channel in range(0, n, LANES):
                store_f32(out + 4 * channel, read(row, channel, n, rope))
            out += 4 * n

    @device
    def score(
        scratch: int, entries: int, visible: int, heads: int, n: int, rope: int, tile: int
    ) -> None:
        """Score a tile of entries."""
        row, first, floats = lane_row(heads), tile * TILE_ROWS, _tile_floats()
        if is_plain:
            keys = _places(entries + 4 * n * first, 4 * n, visible - first)
        else:
            read_tile(floats, entries, first, visible - 1, n, rope)
            keys = _places(floats, 4 * n, TILE_ROWS)
        parts = no_parts()
        for v in range(0, row // 64, TILE_VECTORS):
            sums, at = _zeros(), scratch + 64 * v
            for line in range(0, n, LANES):
                if is_plain:
                    _prefetch(keys, 4 * n * TILE_ROWS + 4 * line)
                for channel in range(line, line + LANES, STEP):
                    sums = _add_channels(sums, at + channel * row, row, keys, 4 * channel)
            parts = add_weighted(parts, sums, at + n * row)
        store_totals(scores_of(scratch, heads, n) + 4 * first, parts)

    return score


def share_query(prepare: Prepare) -> Operation:
    """Make the function of the operation that prepares a query, vector by vector."""

    @device
    def query(operation: int, member: int, members: int) -> None:
        """Lay out the index queries of one token in lanes, turned and mixed as the entries are.

        Words: x, heads, n, cos, sin, pairs, weights, factor as f32 bits, scratch. x: heads * n
        float32; weights: heads float32, of which sixteen more may be read; they are multiplied by
        the factor.
        """
        x, heads, n = word(operation, 1), word(operation, 2), word(operation, 3)
        cos, sin, pairs = word(operation, 4), word(operation, 5), word(operation, 6)
        weights, factor, scratch = word(operation, 7), float_word(operation, 8), word(operation, 9)
        v = take_chunk(operation)
        while v < lane_row(heads) // 64:
            prepare(scratch, x, heads, n, cos, sin, pairs, weights, factor, v)
            v = take_chunk(operation)

    return query


def token_query(prepare: Prepare) -> Operation:
    """Make the function that lays out the query of one of many tokens with `prepare`."""

    @device
    def prepare_token(operation: int, t: int, scratch: int) -> None:
        heads, n, pairs = word(operation, 4), word(operation, 5), word(operation, 12)
        x = word(operation, 7) + 4 * word(operation, 8) * t
        cos, sin = word(operation, 10) + 4 * pairs * t, word(operation, 11) + 4 * pairs * t
        weights, factor = (
            word(operation, 13) + 4 * word(operation, 14) * t,
            float_word(operation, 15),
        )
        for v in range(lane_row(heads) // 64):
            prepare(scratch, x, heads, n, cos, sin, pairs, weights, factor, v)

    return prepare_token


def _share_scores(score: Score) -> Operation:
    @device
    def scores(operation: int, member: int, members: int) -> None:
        """Score the entries that one token sees; nothing is done when all of them are chosen.

        Words: context, ratio, top_k, heads, n, entries (cell), scratch, pairs.
        """
        heads, n, entries = word(operation, 4), word(operation, 5), word(word(operation, 6), 0)
        visible, scratch = visible_entries(operation, 0), word(operation, 7)
        rope = 2 * word(operation, 8)
        tiles = (visible + TILE_ROWS - 1) // TILE_ROWS if visible > word(operation, 3) else 0
        chunk = chunk_groups(tiles, members)
        first = take_chunk(operation) * chunk
        while first < tiles:
            for tile in range(first, min(first + chunk, tiles)):
                score(scratch, entries, visible, heads, n, rope, tile)
            first = take_chunk(operation) * chunk

    return scores


def _share_tokens(prepare: Prepare, score: Score) -> Operation:
    prepare_token = token_query(prepare)

    @device
    def choose_all(operation: int, member: int, members: int) -> None:
        """Choose the entries of each token.

        Words: context, ratio, top_k, heads, n, entries (cell), x, its row stride in floats, tokens,
        cos, sin, pairs, weights, their row stride in floats, factor as f32 bits, chosen (i32, rows
        of top_k), counts (i64), scratch, bytes of scratch memory of a token; a member has that of
        TOKENS. x (tokens, heads * n); cos, sin (tokens, pairs); weights (tokens, heads), of which
        sixteen more may be read; they are multiplied by the factor.
        """
        top_k, heads, n = word(operation, 3), word(operation, 4), word(operation, 5)
        entries, tokens = word(word(operation, 6), 0), word(operation, 9)
        rope, scratch = 2 * word(operation, 12), member_scratch(operation, member)
        t = take_chunk(operation)
        while t < tokens:
            visible = visible_entries(operation, t)
            if visible > top_k:
                prepare_token(operation, t, scratch)
                for tile in range((visible + TILE_ROWS - 1) // TILE_ROWS):
                    score(scratch, entries, visible, heads, n, rope, tile)
            chosen, counts = word(operation, 16) + 4 * top_k * t, word(operation, 17) + 8 * t
            scores = scores_of(scratch, heads, n)
            rank_all(scores, visible, top_k)
            choose(scores, visible, top_k, chosen, counts)
            t = take_chunk(operation)

    return choose_all
