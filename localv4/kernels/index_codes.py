"""The part of the indexer that reads entries in FP4: products of int8, no float per channel.

Memory and words are those of `kernels.index_scores`. Queries are mixed as the entries are and
rounded to int8 (`kernels.code_queries`); entries are expanded to int8 by blocks of KEYS
(`kernels.code_keys`) and multiplied in vector registers (`kernels.code_scores`) or tiles
(`kernels.code_tiles`). What is the same for all members, and for tokens alone and together, is each
sum: integers in any order, then float32 in one.
"""

import numpy as np

from localv4.kernels.code_keys import KEYS, expander
from localv4.kernels.code_queries import mix_heads, round_heads
from localv4.kernels.code_scores import ScoreBlocks, scorer
from localv4.kernels.code_tiles import CHANNELS, ROW, tile_scorer
from localv4.kernels.device import device
from localv4.kernels.head_lanes import lane_row
from localv4.kernels.index_keys import IndexKeys, share_query, token_query
from localv4.kernels.index_scores import (
    BLOCK,
    TOKENS,
    choose,
    member_scratch,
    prepare_index_query,
    rank_all,
    scores_of,
    visible_entries,
)
from localv4.kernels.isa import ISA
from localv4.kernels.operation import chunk_groups, take_chunk, word

assert KEYS <= BLOCK


@device
def _prepare(
    scratch: int,
    x: int,
    heads: int,
    n: int,
    cos: int,
    sin: int,
    pairs: int,
    weights: int,
    factor: np.float32,
    v: int,
) -> None:
    """Lay out vector v of the heads at x, turned and mixed as the entries are, as int8."""
    prepare_index_query(scratch, x, heads, n, cos, sin, pairs, weights, factor, v)
    mix_heads(scratch + 64 * v, lane_row(heads), n)
    round_heads(scratch + 64 * v, lane_row(heads), n)


def _vectors_or_tiles() -> ScoreBlocks:
    """Make the function that scores blocks in the fastest way of this machine."""
    by_vectors = scorer(expander(ISA.byte_bias))
    if not ISA.amx:
        return by_vectors
    by_tiles = tile_scorer(expander(0))

    @device
    def score_blocks(
        scratch: int,
        size: int,
        tokens: int,
        entries: int,
        visible: int,
        heads: int,
        n: int,
        first: int,
        end: int,
    ) -> None:
        if n == CHANNELS and lane_row(heads) == ROW:
            by_tiles(scratch, size, tokens, entries, visible, heads, n, first, end)
        else:
            by_vectors(scratch, size, tokens, entries, visible, heads, n, first, end)

    return score_blocks


_score_blocks = _vectors_or_tiles()


@device
def _scores(operation: int, member: int, members: int) -> None:
    """Score the entries that one token sees; nothing is done when all of them are chosen.

    Words: context, ratio, top_k, heads, n, entries (cell), scratch, pairs.
    """
    heads, n, entries = word(operation, 4), word(operation, 5), word(word(operation, 6), 0)
    visible, scratch = visible_entries(operation, 0), word(operation, 7)
    blocks = (visible + KEYS - 1) // KEYS if visible > word(operation, 3) else 0
    chunk = chunk_groups(blocks, members)
    first = take_chunk(operation) * chunk
    while first < blocks:
        end = min(first + chunk, blocks)
        _score_blocks(scratch, 0, 1, entries, visible, heads, n, first, end)
        first = take_chunk(operation) * chunk


_prepare_token = token_query(_prepare)


@device
def _choose_all(operation: int, member: int, members: int) -> None:
    """Choose the entries of each token. Words: as those of `index_keys`.

    A member takes several tokens at a time, for which it expands entries once.
    """
    top_k, heads, n = word(operation, 3), word(operation, 4), word(operation, 5)
    entries, tokens, size = word(word(operation, 6), 0), word(operation, 9), word(operation, 19)
    scratch = member_scratch(operation, member)
    together = max(1, min(TOKENS, tokens // members))
    first = take_chunk(operation) * together
    while first < tokens:
        end = min(first + together, tokens)
        visible = visible_entries(operation, end - 1)
        if visible > top_k:
            for t in range(first, end):
                _prepare_token(operation, t, scratch + size * (t - first))
            blocks = (visible + KEYS - 1) // KEYS
            _score_blocks(scratch, size, end - first, entries, visible, heads, n, 0, blocks)
        for t in range(first, end):
            chosen, counts = word(operation, 16) + 4 * top_k * t, word(operation, 17) + 8 * t
            own = visible_entries(operation, t)
            scores = scores_of(scratch + size * (t - first), heads, n)
            rank_all(scores, own, top_k)
            choose(scores, own, top_k, chosen, counts)
        first = take_chunk(operation) * together


def index_codes() -> IndexKeys:
    """Return the functions for entries in FP4."""
    return IndexKeys(share_query(_prepare), _scores, _choose_all)
