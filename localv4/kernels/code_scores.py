"""Scores of a block of entries from integers: products of lines of queries with expanded rows.

A register tile is TILE_ROWS rows times TILE_VECTORS vectors of heads (`kernels.head_tiles`). Sums
over the channels are integers, so their order is of no account; the weighted sum over the heads is
float32: vectors of heads one after another, then the lower half of the lanes to the upper half.
"""

from collections.abc import Callable

from llvmlite import ir
from numba import types
from numba.core import cgutils

from localv4.kernels import simd_dots, simd_ir
from localv4.kernels.code_keys import AHEAD, KEYS, Expand
from localv4.kernels.device import device
from localv4.kernels.head_lanes import lane_row
from localv4.kernels.head_tiles import TILE_ROWS, TILE_VECTORS
from localv4.kernels.index_scores import no_parts, scores_of, store_totals
from localv4.kernels.isa import ISA
from localv4.kernels.row_forms import E2M1_ROWS, MOST_CHANNELS
from localv4.kernels.simd import i32x16, load_f32, multiply, operation, prefetch_far, store_f32
from localv4.kernels.simd_ir import BYTES, FLOATS, I32, I64, INTS, Builder, Value
from localv4.kernels.stack import stack_floats
from localv4.kernels.vectors import f32x16

_STEP = 4
"""Lines of one call of `_add_lines`."""

ScoreBlocks = Callable[[int, int, int, int, int, int, int, int, int], None]

_address = types.int64
_stride = E2M1_ROWS.stride
_codes, _scales = stack_floats(KEYS * MOST_CHANNELS // 4), stack_floats(KEYS)
_sums = types.UniTuple(i32x16, TILE_VECTORS * TILE_ROWS)
_parts = types.UniTuple(f32x16, TILE_ROWS)


def positive_floats(b: Builder, sums: Value) -> Value:
    """Return relu(sums) as float32."""
    zero = simd_ir.filled(INTS, 0)
    return b.sitofp(b.select(b.icmp_signed(">", sums, zero), sums, zero), FLOATS)


@operation(_sums, _address)
def _start(b: Builder, starts: Value) -> list[Value]:
    """Return where the sums of each row start: int32 for each head."""
    vectors = [
        simd_ir.load(b, INTS, simd_ir.offset(b, starts, 64 * v)) for v in range(TILE_VECTORS)
    ]
    return vectors * TILE_ROWS


@operation(_sums, _sums, _address, _address, _address, _address)
def _add_lines(
    b: Builder, values: Value, lines: Value, row: Value, keys: Value, stride: Value
) -> list[Value]:
    """Return sums + lines * keys: lines are `row` bytes apart, keys `stride` bytes."""
    totals: list[Value] = cgutils.unpack_tuple(b, values)
    for step in range(_STEP):
        at = b.add(lines, b.mul(row, ir.Constant(I64, step)))
        queries = [
            simd_ir.load(b, BYTES, simd_ir.offset(b, at, 64 * v)) for v in range(TILE_VECTORS)
        ]
        for i in range(TILE_ROWS):
            key = b.add(keys, b.mul(stride, ir.Constant(I64, i)))
            word = simd_ir.load(b, I32, simd_ir.offset(b, key, 4 * step))
            codes = b.bitcast(simd_ir.splat(b, word), BYTES)
            for v, query in enumerate(queries):
                number = TILE_VECTORS * i + v
                totals[number] = simd_dots.add_byte_dot(b, ISA, totals[number], codes, query)
    return totals


@operation(_parts, _parts, _sums, _address)
def _add_positive(b: Builder, values: Value, sums: Value, weights: Value) -> list[Value]:
    """Return for each row of a tile: values + relu(sums) * weights, lanes apart."""
    parts: list[Value] = cgutils.unpack_tuple(b, values)
    totals = cgutils.unpack_tuple(b, sums)
    for v in range(TILE_VECTORS):
        factors = simd_ir.load(b, FLOATS, simd_ir.offset(b, weights, 64 * v))
        for i in range(TILE_ROWS):
            positive = positive_floats(b, totals[TILE_VECTORS * i + v])
            parts[i] = simd_ir.multiply_add(b, positive, factors, parts[i])
    return parts


@device
def _score_block(
    out: int, scratch: int, keys: int, scales: int, ahead: int, heads: int, n: int
) -> None:
    """Write the scores of the KEYS expanded rows at `keys`; ask memory for a block at `ahead`."""
    row, starts, size = lane_row(heads), n // 4, _stride(n, 0)
    for first in range(0, KEYS, TILE_ROWS):
        for at in range(ahead + first * size, ahead + (first + TILE_ROWS) * size, 64):
            prefetch_far(at)
        parts, tile = no_parts(), keys + n * first
        for v in range(0, row // 64, TILE_VECTORS):
            at = scratch + 64 * v
            sums = _start(at + starts * row)
            for line in range(0, starts, _STEP):
                sums = _add_lines(sums, at + line * row, row, tile + 4 * line, n)
            parts = _add_positive(parts, sums, at + n * row)
        store_totals(out + 4 * first, parts)
    for i in range(0, 4 * KEYS, 64):
        store_f32(out + i, multiply(load_f32(out + i), load_f32(scales + i)))


def scorer(expand: Expand) -> ScoreBlocks:
    """Make the function that scores blocks which `expand` expands with the bias of bytes."""

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
        """Score blocks first ... end - 1 of `visible` entries for some tokens.

        size: bytes of scratch memory of a token.
        """
        codes, scales = _codes(), _scales()
        for block in range(first, end):
            expand(codes, scales, entries, KEYS * block, visible - 1, n)
            ahead = entries + KEYS * (block + AHEAD) * _stride(n, 0)
            for t in range(tokens):
                own = scratch + size * t
                out = scores_of(own, heads, n) + 4 * KEYS * block
                _score_block(out, own, codes, scales, ahead, heads, n)

    return score_blocks
