"""The operations of attention: for one token, shared out inside it, and for many.

Memory and words are those of `kernels.attend`. Those that read keys are made for each form of
entries. Where the processor has tiles they multiply keys of bfloat16 and less (`tiled`), which
takes a query and weights in a layout of their own.
"""

from collections.abc import Callable
from dataclasses import dataclass

from localv4.kernels.attend import (
    LINE,
    KeyProducts,
    float_count,
    key_count,
    keys_of,
    prepare_query,
    softmax,
)
from localv4.kernels.attend_lanes import lane_products
from localv4.kernels.attend_tiles import pair_queries, tile_products, weigh_pairs
from localv4.kernels.compiler import entry
from localv4.kernels.device import device
from localv4.kernels.head_lanes import lane_row
from localv4.kernels.isa import ISA
from localv4.kernels.operation import chunk_groups, float_word, take_chunk, word
from localv4.kernels.row_forms import RowForm
from localv4.kernels.simd import load_f32

AttendOne = Callable[[int, int, int, int, int, int, int], None]
Operation = Callable[[int, int, int], None]


@dataclass(frozen=True, slots=True, eq=False)
class AttendKeys:
    """The functions of the operations that read keys, with entries of one form."""

    scores: Operation
    values: Operation
    attend: Operation


def is_tiled(form: RowForm) -> bool:
    """Tell whether keys of a form are multiplied in tiles."""
    return ISA.amx and not form.is_plain


def attend_keys(form: RowForm) -> AttendKeys:
    """Make the functions for one form of entries."""
    products = tile_products(form) if is_tiled(form) else lane_products(form)
    return AttendKeys(_share_scores(products), _share_values(products), _share_tokens(products))


@entry("fast")
def attend_query(operation: int, member: int, members: int) -> None:
    """Norm and rotate the queries of one token and lay them out in lanes, or for tiles.

    Words: x, heads, n, cos, sin, pairs, eps as f32 bits, scratch, tiled. x: heads * n float32.
    """
    x, heads, n = word(operation, 1), word(operation, 2), word(operation, 3)
    cos, sin, pairs = word(operation, 4), word(operation, 5), word(operation, 6)
    eps, scratch, tiled = float_word(operation, 7), word(operation, 8), word(operation, 9)
    v = take_chunk(operation)
    while v < lane_row(heads) // 64:
        prepare_query(scratch, x, v, heads, n, cos, sin, pairs, eps)
        if tiled != 0:
            pair_queries(scratch, v, heads, n)
        v = take_chunk(operation)


@entry("fast")
def attend_softmax(operation: int, member: int, members: int) -> None:
    """Make weights of the scores of one token.

    Words: context, span, ratio, counts, heads, n, sinks (lanes), scratch, tiled.
    """
    heads, n = word(operation, 5), word(operation, 6)
    sinks, scratch, tiled = word(operation, 7), word(operation, 8), word(operation, 9)
    row, count = lane_row(heads), key_count(operation, 0)
    keys = keys_of(scratch, heads, n)
    v = take_chunk(operation)
    while v < row // 64:
        at, sink = keys + 64 * v, load_f32(sinks + 64 * v)
        if tiled != 0:
            weigh_pairs(at, row + LINE, count, sink)
        else:
            softmax(at, row + LINE, count, sink)
        v = take_chunk(operation)


def _share_scores(products: KeyProducts) -> Operation:
    score, unit = products.score, products.keys

    @device
    def scores(operation: int, member: int, members: int) -> None:
        """Multiply the queries of one token with its keys.

        Words: context, span, ratio, counts, chosen, top_k, window, capacity, entries, heads, n,
        scratch, pairs.
        """
        heads, n, scratch = word(operation, 10), word(operation, 11), word(operation, 12)
        rope = 2 * word(operation, 13)
        units = (key_count(operation, 0) + unit - 1) // unit
        chunk = chunk_groups(units, members)
        first = take_chunk(operation) * chunk
        while first < units:
            end = min(first + chunk, units)
            score(operation, 0, scratch, heads, n, rope, unit * first, unit * end)
            first = take_chunk(operation) * chunk

    return scores


def _share_values(products: KeyProducts) -> Operation:
    sum_values, finish, unit = products.sum_values, products.finish, products.channels

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
        chunk = unit * chunk_groups(n // unit, members)
        start = take_chunk(operation) * chunk
        while start < n:
            end = min(start + chunk, n)
            sum_values(scratch, heads, n, 2 * pairs, raw, count, start, end)
            for first in range(start, end, unit):
                finish(out, scratch, first, heads, n, cos, sin, pairs)
            start = take_chunk(operation) * chunk

    return values


def _attend_one(products: KeyProducts) -> AttendOne:
    score, weigh, sum_values = products.score, products.weigh, products.sum_values
    unit = products.keys

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
        end, keys = (count + unit - 1) // unit * unit, keys_of(scratch, heads, n)
        score(operation, t, scratch, heads, n, rope, 0, end)
        for v in range(row // 64):
            weigh(keys + 64 * v, row + LINE, count, load_f32(sinks + 64 * v))
        sum_values(scratch, heads, n, rope, raw, count, 0, n)

    return attend_one


def _share_tokens(products: KeyProducts) -> Operation:
    attend_one, turn = _attend_one(products), products.turn
    finish, unit = products.finish, products.channels

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
                turn(scratch, v, heads, n)
            attend_one(operation, t, scratch, heads, n, 2 * pairs, sinks)
            for first in range(0, n, unit):
                finish(own, scratch, first, heads, n, cos, sin, pairs)
            t = take_chunk(operation)

    return attend
