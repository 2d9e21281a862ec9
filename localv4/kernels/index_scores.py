"""The lightning indexer: which compressed entries each token attends to.

A score is sum over heads of w[head] * relu(query[head] . key of the entry). Entry i is visible to a
token at position p when i < (p + 1) // ratio; the top_k best visible entries are chosen, all of
them without a look when there are no more. For one token there are four operations, which share
the work inside the token; for many there is one, which shares out tokens. Those that read entries
are made by `kernels.index_keys` and, for entries in FP4, `kernels.index_codes`.

Scratch memory of one layout, float32: the query (n, lanes), the weights of the heads (lanes), then
a score for each entry, and what `kernels.top_entries` needs to find the best. Scores are written by
blocks of up to BLOCK, the last one beyond the last entry.
"""

import numpy as np
from numba import types
from numba.core import cgutils

from localv4.kernels import simd_ir
from localv4.kernels.compiler import entry
from localv4.kernels.device import device
from localv4.kernels.head_lanes import (
    first_lanes,
    lane_row,
    lanes,
    rotate_heads,
    take_heads,
)
from localv4.kernels.head_tiles import TILE_ROWS, TILE_VECTORS
from localv4.kernels.operation import chunk_groups, take_chunk, word
from localv4.kernels.simd import (
    load_f32,
    multiply,
    operation,
    splat_f32,
    store_f32,
    write_i32,
    write_i64,
    zeros_f32,
)
from localv4.kernels.simd_ir import FLOATS, LANES, Builder, Value
from localv4.kernels.top_entries import groups_of, rank_group, ranking_bytes, write_top
from localv4.kernels.vectors import f32x16

BLOCK = 64
"""Entries that are scored together at most."""

TOKENS = 4
"""Tokens of a prompt that a member scores together at most."""

_ONE = np.float32(1)
_sums = types.UniTuple(f32x16, TILE_VECTORS * TILE_ROWS)
_parts = types.UniTuple(f32x16, TILE_ROWS)


def scratch_bytes(heads: int, n: int, entries: int) -> int:
    """Return the size of the scratch memory for a token that sees up to `entries` entries."""
    return 4 * (n + 1) * lanes(heads) + ranking_bytes(entries + BLOCK)


@operation(_parts)
def no_parts(b: Builder) -> list[Value]:
    """Return zeros for each row of a tile."""
    return [simd_ir.filled(FLOATS, 0.0)] * TILE_ROWS


@operation(_parts, _parts, _sums, types.int64)
def add_weighted(b: Builder, values: Value, sums: Value, weights: Value) -> list[Value]:
    """Return for each row of a tile: values + relu(sums) * weights, lanes apart."""
    parts: list[Value] = cgutils.unpack_tuple(b, values)
    totals = cgutils.unpack_tuple(b, sums)
    zero = simd_ir.filled(FLOATS, 0.0)
    for v in range(TILE_VECTORS):
        factors = simd_ir.load(b, FLOATS, simd_ir.offset(b, weights, 64 * v))
        for row in range(TILE_ROWS):
            total = totals[TILE_VECTORS * row + v]
            positive = b.select(b.fcmp_ordered(">", zero, total), zero, total)
            parts[row] = simd_ir.multiply_add(b, positive, factors, parts[row])
    return parts


@operation(types.void, types.int64, _parts)
def store_totals(b: Builder, address: Value, values: Value) -> None:
    """Write the sum of the lanes of each row."""
    for row, part in enumerate(cgutils.unpack_tuple(b, values)):
        total = simd_ir.fold(b, part, b.fadd)
        simd_ir.store(b, total, simd_ir.offset(b, address, 4 * row))


@device
def visible_entries(operation: int, t: int) -> int:
    """Return how many entries token t sees. Words: context, ratio."""
    return (word(word(operation, 1), 0) + t + 1) // word(operation, 2)


@device
def member_scratch(operation: int, member: int) -> int:
    """Return where the scratch memory of a member starts, in the operation for many tokens."""
    return word(operation, 18) + member * TOKENS * word(operation, 19)


@device
def scores_of(scratch: int, heads: int, n: int) -> int:
    """Return where the scores start."""
    return scratch + (n + 1) * lane_row(heads)


@device
def prepare_index_query(
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
    """Rotate vector v of the heads at x into its lanes, and their weights times `factor`."""
    row, at, first = lane_row(heads), scratch + 64 * v, LANES * v
    take_heads(at, row, x, n, first, heads)
    rotate_heads(at + (n - 2 * pairs) * row, row, pairs, cos, sin, _ONE)
    own = zeros_f32()
    if first < heads:
        own = first_lanes(load_f32(weights + 64 * v), heads - first)
    store_f32(at + n * row, multiply(own, splat_f32(factor)))


@device
def choose(scores: int, visible: int, top_k: int, chosen: int, counts: int) -> None:
    """Write the chosen entries and their number; the scores are ranked, if they are needed."""
    if visible > top_k:
        write_top(chosen, scores, visible, top_k)
    else:
        for i in range(visible):
            write_i32(chosen + 4 * i, np.int32(i))
    write_i64(counts, min(visible, top_k))


@device
def rank_all(scores: int, visible: int, top_k: int) -> None:
    """Rank the scores of a token that has more entries than it chooses."""
    if visible > top_k:
        for group in range(groups_of(visible)):
            rank_group(scores, visible, group)


@entry("fast")
def index_rank(operation: int, member: int, members: int) -> None:
    """Rank the scores of one token (`kernels.top_entries`), which are lost.

    Words: context, ratio, top_k, heads, n, scratch.
    """
    scores = scores_of(word(operation, 6), word(operation, 4), word(operation, 5))
    visible = visible_entries(operation, 0)
    groups = groups_of(visible) if visible > word(operation, 3) else 0
    chunk = chunk_groups(groups, members)
    first = take_chunk(operation) * chunk
    while first < groups:
        for group in range(first, min(first + chunk, groups)):
            rank_group(scores, visible, group)
        first = take_chunk(operation) * chunk


@entry("fast")
def index_select(operation: int, member: int, members: int) -> None:
    """Choose the entries of one token by their ranked scores.

    Words: context, ratio, top_k, heads, n, scratch, chosen (i32, top_k), counts (i64).
    """
    if take_chunk(operation) == 0:
        scores = scores_of(word(operation, 6), word(operation, 4), word(operation, 5))
        visible, top_k = visible_entries(operation, 0), word(operation, 3)
        choose(scores, visible, top_k, word(operation, 7), word(operation, 8))
