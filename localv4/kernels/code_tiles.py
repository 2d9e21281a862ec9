"""The products of `kernels.code_scores` by AMX: the same scores, with the same bits.

A tile of sixteen expanded rows times a tile of queries, sixteen lines of sixteen heads, is a tile
of int32 sums: a row of sixteen heads for each key. For queries of 128 channels and 64 heads, those
of the released models; the queries of 32 heads stay in four tiles for all keys of a block.
"""

from collections.abc import Callable

from llvmlite import ir
from numba import types

from localv4.kernels import simd_ir
from localv4.kernels.amx import (
    CONFIGURATION_BYTES,
    WHOLE,
    Call,
    begin_whole_tiles,
    emit,
    end_tiles,
    pointer,
)
from localv4.kernels.code_keys import AHEAD, KEYS, Expand
from localv4.kernels.code_scores import ScoreBlocks, positive_floats
from localv4.kernels.device import device
from localv4.kernels.index_scores import scores_of
from localv4.kernels.row_forms import E2M1_ROWS
from localv4.kernels.simd import operation
from localv4.kernels.simd_dots import prefetch
from localv4.kernels.simd_ir import FLOATS, I64, INTS, LANES, Builder, Value
from localv4.kernels.stack import stack_floats

CHANNELS, ROW = 128, 256
"""Channels of a query, and bytes of a row of 64 heads in lanes."""

_BLOCK_LINES = KEYS * E2M1_ROWS.nbytes(CHANNELS, 0) // 64
_SUMS, _KEYS, _QUERIES = (0, 1), (2, 3), ((4, 5), (6, 7))  # numbers of tiles; of each half of n
_address = types.int64
_codes = stack_floats(KEYS * CHANNELS // 4)
_sums, _other_sums = stack_floats(KEYS * ROW // 4), stack_floats(KEYS * ROW // 4)
_scales, _other_scales = stack_floats(KEYS), stack_floats(KEYS)
_configuration = stack_floats(CONFIGURATION_BYTES // 4)


@operation(types.void, _address, _address, _address)
def _multiply(b: Builder, sums: Value, lines: Value, keys: Value) -> None:
    """Write the sums of KEYS rows, ROW bytes apart."""
    for call in _multiplication(b, sums, lines, keys):
        emit(b, call)


@operation(types.void, _address, _address, _address, _address)
def _weigh(b: Builder, out: Value, sums: Value, weights: Value, scales: Value) -> None:
    """Write the scores of KEYS rows."""
    _weighing(b, out, sums, weights, scales, lambda _: None)


@operation(types.void, *[_address] * 8)
def _both(
    b: Builder,
    sums: Value,
    lines: Value,
    keys: Value,
    out: Value,
    earlier: Value,
    weights: Value,
    scales: Value,
    ahead: Value,
) -> None:
    """Multiply a block and write the scores of an earlier one, evenly mixed.

    Meanwhile memory is asked for a block at `ahead`: a few requests at a time, since those beyond
    what a core can have under way would stop it.
    """
    calls = _multiplication(b, sums, lines, keys)

    def emit_share(row: int) -> None:
        for call in calls[len(calls) * row // KEYS : len(calls) * (row + 1) // KEYS]:
            emit(b, call)
        for line in range(_BLOCK_LINES * row // KEYS, _BLOCK_LINES * (row + 1) // KEYS):
            prefetch(b, simd_ir.offset(b, ahead, 64 * line), 2)

    _weighing(b, out, earlier, weights, scales, emit_share)


def _multiplication(b: Builder, sums: Value, lines: Value, keys: Value) -> list[Call]:
    """Return the instructions that multiply a block."""
    row, stride = ir.Constant(I64, ROW), ir.Constant(I64, CHANNELS)
    calls: list[Call] = []
    for pair in range(2):
        for i, tiles in enumerate(_QUERIES):
            for half, tile in enumerate(tiles):
                at = simd_ir.offset(b, lines, 16 * ROW * half + 64 * (2 * pair + i))
                calls.append(("tileloadd64", tile, pointer(b, at), row))
        for first in range(0, KEYS, WHOLE):
            for half, tile in enumerate(_KEYS):
                at = simd_ir.offset(b, keys, CHANNELS * first + 64 * half)
                calls.append(("tileloadd64", tile, pointer(b, at), stride))
            calls += [("tilezero", tile) for tile in _SUMS]
            for half, own in enumerate(_KEYS):
                for tile, queries in zip(_SUMS, _QUERIES, strict=True):
                    calls.append(("tdpbssd", tile, own, queries[half]))
            for i, tile in enumerate(_SUMS):
                at = simd_ir.offset(b, sums, ROW * first + 64 * (2 * pair + i))
                calls.append(("tilestored64", tile, pointer(b, at), row))
    return calls


def _weighing(
    b: Builder,
    out: Value,
    sums: Value,
    weights: Value,
    scales: Value,
    before: Callable[[int], None],
) -> None:
    """Write scores; `before(i)` is called before the i-th row."""
    vectors = range(0, ROW, 64)
    factors = [simd_ir.load(b, FLOATS, simd_ir.offset(b, weights, v)) for v in vectors]
    for first in range(0, KEYS, LANES):
        parts = []
        for i in range(first, first + LANES):
            before(i)
            part = simd_ir.filled(FLOATS, 0.0)
            for v, factor in zip(vectors, factors, strict=True):
                own = simd_ir.load(b, INTS, simd_ir.offset(b, sums, ROW * i + v))
                part = simd_ir.multiply_add(b, positive_floats(b, own), factor, part)
            parts.append(part)
        scale = simd_ir.load(b, FLOATS, simd_ir.offset(b, scales, 4 * first))
        simd_ir.store(b, b.fmul(_fold_all(b, parts), scale), simd_ir.offset(b, out, 4 * first))


def _fold_all(b: Builder, parts: list[Value]) -> Value:
    """Return the sums of the lanes of sixteen vectors, with the additions of `simd_ir.fold`."""
    width = LANES
    while width > 1:
        width //= 2
        low = [2 * width * (i // width) + i % width for i in range(LANES)]
        orders = [simd_ir.constant(INTS, [i + shift for i in low]) for shift in (0, width)]
        parts = [
            b.fadd(*(b.shuffle_vector(first, second, order) for order in orders))
            for first, second in zip(parts[::2], parts[1::2], strict=True)
        ]
    return parts[0]


def tile_scorer(expand: Expand) -> ScoreBlocks:
    """Make the function that scores blocks which `expand` expands without a bias."""

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
        """The same as that of `code_scores.scorer`.

        So that both units have work, a block is multiplied while the one before is weighed.
        """
        begin_whole_tiles(_configuration())
        codes, sums, earlier = _codes(), _sums(), _other_sums()
        scales, earlier_scales = _scales(), _other_scales()
        out, weights = 0, 0
        for block in range(first, end):
            expand(codes, scales, entries, KEYS * block, visible - 1, n)
            ahead = entries + (block + AHEAD) * _BLOCK_LINES * 64
            for t in range(tokens):
                lines = scratch + size * t
                if out == 0:
                    _multiply(sums, lines, codes)
                else:
                    own = scales if t > 0 else earlier_scales
                    _both(sums, lines, codes, out, earlier, weights, own, ahead)
                out = scores_of(lines, heads, n) + 4 * KEYS * block
                weights = lines + n * ROW
                sums, earlier = earlier, sums
            scales, earlier_scales = earlier_scales, scales
        if out != 0:
            _weigh(out, earlier, weights, earlier_scales)
        end_tiles()

    return score_blocks
