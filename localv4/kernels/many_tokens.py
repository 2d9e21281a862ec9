"""Operations on many tokens: panels of packed weights against all tokens at once.

The bodies here take the functions of a format as arguments; `kernels.formats` makes operations of
them. Tokens of all experts follow one another, sorted by expert: those of expert e are rows
starts[e] ... starts[e + 1] - 1 of the activations. The scratch memory has `gemm.SCRATCH_BYTES` for
each member.
"""

from localv4.kernels.device import device
from localv4.kernels.gemm import (
    BATCH_TOKENS,
    PANEL_GROUPS,
    SCRATCH_BYTES,
    add_weighted_sums,
    round_gated_sums,
    store_sums,
)
from localv4.kernels.operation import float_word, take_chunk, word
from localv4.kernels.panel_sums import BestSums

MOST_PANELS = 8
"""Panels that a member takes at once."""


@device
def share_gemm(operation: int, member: int, sums: BestSums) -> None:
    """out[t] = matrix . x[t] for each token.

    Words: matrix, row groups, columns, q, d, b, tokens, out, its row stride in bytes, scratch.
    """
    w, groups, cols = word(operation, 1), word(operation, 2), word(operation, 3)
    q, d, b, tokens = word(operation, 4), word(operation, 5), word(operation, 6), word(operation, 7)
    out, stride = word(operation, 8), word(operation, 9)
    scratch = word(operation, 10) + member * SCRATCH_BYTES
    panels = panels_of(groups)
    taken = take_chunk(operation)
    while taken // panels * BATCH_TOKENS < tokens:
        # all panels for some tokens, which stay in the second cache: they are more than a panel
        first, panel = taken // panels * BATCH_TOKENS, taken % panels
        count = min(BATCH_TOKENS, tokens - first)
        sums(scratch, w, panel, groups, cols, q, d, b, 0, 0, first, count)
        store_sums(out, stride, scratch, panel, groups, first, count)
        taken = take_chunk(operation)


@device
def panels_of(groups: int) -> int:
    """Return the number of panels of a matrix of `groups` groups."""
    return (groups + PANEL_GROUPS - 1) // PANEL_GROUPS


@device
def share_experts_gate_up(operation: int, member: int, sums: BestSums) -> None:
    """Round the hidden layer of each expert for its tokens.

    Words: records (i64 for each expert), experts, starts (i64, experts + 1), row groups, columns,
    q, d, b, q, d, b of the hidden layer, scratch, limit as f32 bits, 1 for scales of the
    hidden layer that are powers of two, pairs and their distance (`kernels.pairs`) or 0, the same
    of the hidden layer.
    """
    records, experts, starts = word(operation, 1), word(operation, 2), word(operation, 3)
    groups, cols = word(operation, 4), word(operation, 5)
    q, d, b = word(operation, 6), word(operation, 7), word(operation, 8)
    inner_q, inner_d, inner_b = word(operation, 9), word(operation, 10), word(operation, 11)
    scratch, limit = word(operation, 12) + member * SCRATCH_BYTES, float_word(operation, 13)
    binary, pairs, distance = word(operation, 14), word(operation, 15), word(operation, 16)
    inner_pairs, inner_distance = word(operation, 17), word(operation, 18)
    panels = panels_of(groups)
    taken = take_chunk(operation)
    while taken < experts * panels:
        expert, panel = taken // panels, taken % panels
        w, first, end = word(records, expert), word(starts, expert), word(starts, expert + 1)
        while first < end:
            count = min(BATCH_TOKENS, end - first)
            sums(scratch, w, panel, groups, cols, q, d, b, pairs, distance, first, count)
            round_gated_sums(
                *(inner_q, inner_d, inner_b, scratch, panel, groups, first, count),
                *(limit, binary, inner_pairs, inner_distance),
            )
            first += count
        taken = take_chunk(operation)


@device
def share_experts_down(operation: int, member: int, members: int, sums: BestSums) -> None:
    """out[rows[i]] += weights[i] * (down of i's expert) . hidden layer[i], in the order of experts.

    Words: records, experts, starts, row groups, columns, q, d, b, out, its row stride in bytes,
    scratch, rows (i64), weights (f32), offset of down in a record, pairs and their distance or 0.
    A member does some panels for all experts, so that the order of additions is always the same.
    """
    records, experts, starts = word(operation, 1), word(operation, 2), word(operation, 3)
    groups, cols = word(operation, 4), word(operation, 5)
    q, d, b = word(operation, 6), word(operation, 7), word(operation, 8)
    out, stride = word(operation, 9), word(operation, 10)
    scratch = word(operation, 11) + member * SCRATCH_BYTES
    rows, weights, offset = word(operation, 12), word(operation, 13), word(operation, 14)
    pairs, distance = word(operation, 15), word(operation, 16)
    panels = panels_of(groups)
    # the activations of an expert come from memory once for so many panels
    together = max(1, min(MOST_PANELS, panels // (4 * members)))
    start = take_chunk(operation) * together
    while start < panels:
        for expert in range(experts):
            w = word(records, expert) + offset
            first, end = word(starts, expert), word(starts, expert + 1)
            while first < end:
                count = min(BATCH_TOKENS, end - first)
                for panel in range(start, min(start + together, panels)):
                    sums(scratch, w, panel, groups, cols, q, d, b, pairs, distance, first, count)
                    add_weighted_sums(
                        *(out, stride, scratch, panel, groups, first, count, rows, weights)
                    )
                first += count
        start = take_chunk(operation) * together
