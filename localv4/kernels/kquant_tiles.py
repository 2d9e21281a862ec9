"""The register tile of large products with the formats of `kernels.packed_kquants`.

As in `kernels.tiles`: TILE_GROUPS groups of sixteen rows times some tokens, fewer where a block has
two parts: the sums of both are to fit the registers. A superblock of
the groups is expanded once: lines [columns / 4][TILE_GROUPS] of codes, then factors, 64 bytes for
each of [block][factor][TILE_GROUPS] as int32, then heads as float32: [number][TILE_GROUPS], what
the whole numbers (`kernels.kquant_kinds`) are to be multiplied with. The parts, float32, are sums
over a superblock before that: [token][TILE_GROUPS][number].
"""

from dataclasses import dataclass
from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils

from localv4.kernels import simd_ir
from localv4.kernels.isa import ISA
from localv4.kernels.kquant_kinds import add_dots
from localv4.kernels.kquant_lattice import turned
from localv4.kernels.kquant_readers import SuperblockReader, stack_bytes
from localv4.kernels.packed import BLOCK
from localv4.kernels.packed_kquants import STEP, SUPERBLOCK
from localv4.kernels.simd import i32x16, operation
from localv4.kernels.simd_dots import VECTORS
from localv4.kernels.simd_ir import BYTES, F32, FLOATS, I32, I64, INTS, Builder, Value
from localv4.kernels.tiles import LINE, TILE_GROUPS, TILE_TOKENS

BLOCKS = SUPERBLOCK // BLOCK
_STEP_BLOCKS = STEP // BLOCK
_LINES_BYTES = SUPERBLOCK // 4 * LINE
AT_ONCE = 4 if ISA.level == "avx2" else 2
"""Lines of each group in one call of `add_lines`; AVX2 adds up some before it widens."""

_address = types.int64


@dataclass(frozen=True, slots=True)
class TileOperations:
    """Operations on a tile: `panel` is where the expanded superblock stands.

    `expand(panel, w, step)` and `expand_head(panel, w)` fill it with a group, the address of which
    in the panel is given. `clear(parts)` starts new parts.

    Activations are given by the address of the first token and the bytes from one token to the
    next. `arrange(q, row)` gives both for activations of a superblock in the order that a format
    wants. `starts[part](b, row)` returns what the sums of products of a part of a block start from.
    `add_lines(sums, lines, q, row)` adds the products of AT_ONCE lines of codes.
    `add_block(parts, panel, block, d, d_row, b, b_row, sums)` makes whole numbers of the sums of a
    block, a tuple for each part, and adds them to the parts.

    `finish(sums, row, parts, panel)` adds the parts of a superblock to sums, float32
    [token][TILE_GROUPS * 16] with `row` bytes from token to token.
    """

    expand: Any
    expand_head: Any
    clear: Any
    arrange: Any
    starts: list[Any]
    add_lines: Any
    add_block: Any
    finish: Any


def tile_operations(reader: SuperblockReader, tokens: int) -> TileOperations:
    """Make the operations of a format for a tile of so many tokens, `tile_tokens` at most."""
    return TileOperations(
        _expander(reader),
        _head_expander(reader),
        _clearer(reader, tokens),
        _turner(reader, tokens),
        [_starter(reader, tokens, part) for part in range(reader.kind.parts)],
        _line_adder(reader, tokens),
        _block_adder(reader, tokens),
        _finisher(reader, tokens),
    )


def tile_tokens(reader: SuperblockReader) -> int:
    """Return the most tokens of a tile."""
    return TILE_TOKENS // reader.kind.parts


def _sums(tokens: int) -> Any:
    """Return the type of the sums of products of a part."""
    return types.UniTuple(i32x16, TILE_GROUPS * tokens)


def panel_bytes(reader: SuperblockReader) -> int:
    """Return the size of an expanded superblock."""
    return _heads_at(reader) + reader.kind.numbers * LINE


def parts_bytes(reader: SuperblockReader, tokens: int) -> int:
    """Return the size of the parts."""
    return tokens * LINE * reader.kind.numbers


def _heads_at(reader: SuperblockReader) -> int:
    return _LINES_BYTES + BLOCKS * reader.kind.factors * LINE


def _row(b: Builder, start: Value, row: Value, token: int, distance: int = 0) -> Value:
    """Return an address in the row of a token."""
    return simd_ir.offset(b, b.add(start, b.mul(row, ir.Constant(I64, token))), distance)


def _expander(reader: SuperblockReader) -> Any:
    factors_size = reader.kind.factors * LINE

    @operation(types.void, _address, _address, _address)
    def expand(b: Builder, panel: Value, w: Value, step: Value) -> None:
        """Write codes and factors of a step."""
        first = b.mul(step, ir.Constant(I64, _STEP_BLOCKS))
        for i, block in enumerate(reader.decode(b, ISA, w, step)):
            number = simd_ir.offset(b, first, i)
            lines = b.add(panel, b.mul(number, ir.Constant(I64, VECTORS * LINE)))
            for j, code in enumerate(block.codes):
                simd_ir.store(b, code, simd_ir.offset(b, lines, LINE * j))
            factors = b.add(panel, b.mul(number, ir.Constant(I64, factors_size)))
            for j, factor in enumerate(block.factors):
                simd_ir.store(b, factor, simd_ir.offset(b, factors, _LINES_BYTES + LINE * j))

    return expand


def _head_expander(reader: SuperblockReader) -> Any:
    @operation(types.void, _address, _address)
    def expand_head(b: Builder, panel: Value, w: Value) -> None:
        """Write what whole numbers are multiplied with."""
        for i, factor in enumerate(reader.head(b, w)):
            simd_ir.store(b, factor, simd_ir.offset(b, panel, _heads_at(reader) + LINE * i))

    return expand_head


def _clearer(reader: SuperblockReader, tokens: int) -> Any:
    @operation(types.void, _address)
    def clear(b: Builder, parts: Value) -> None:
        """Write zeros."""
        for at in range(0, parts_bytes(reader, tokens), 64):
            simd_ir.store(b, simd_ir.filled(FLOATS, 0.0), simd_ir.offset(b, parts, at))

    return clear


def _turner(reader: SuperblockReader, tokens: int) -> Any:
    place = types.UniTuple(_address, 2)

    @operation(place, _address, _address)
    def arrange(b: Builder, q: Value, row: Value) -> list[Value]:
        """Return address and row of the activations, turned ones valid until the next call."""
        if not reader.is_turned:
            return [q, row]
        target = stack_bytes(b, tokens * SUPERBLOCK)
        for token in range(tokens):
            for at in range(0, SUPERBLOCK, BLOCK):
                own = simd_ir.offset(b, target, token * SUPERBLOCK + at)
                turned(b, own, _row(b, q, row, token, at))
        return [target, ir.Constant(I64, SUPERBLOCK)]

    return arrange


def _starter(reader: SuperblockReader, tokens: int, part: int) -> Any:
    @operation(_sums(tokens), _address, _address)
    def start(b: Builder, s: Value, row: Value) -> list[Value]:
        """Return the starts of a part, the same for all groups."""
        sums = []
        for token in range(tokens):
            totals = reader.kind.totals(b, _row(b, s, row, token))
            sums += [reader.kind.starts(b, totals)[part]] * TILE_GROUPS
        return sums

    return start


def _line_adder(reader: SuperblockReader, tokens: int) -> Any:
    @operation(_sums(tokens), _sums(tokens), _address, _address, _address)
    def add_lines(b: Builder, sums: Value, lines: Value, q: Value, row: Value) -> list[Value]:
        """sums + products of some lines"""
        totals, largest = cgutils.unpack_tuple(b, sums), reader.kind.largest
        codes = [
            [
                simd_ir.load(b, BYTES, simd_ir.offset(b, lines, LINE * j + 64 * group))
                for j in range(AT_ONCE)
            ]
            for group in range(TILE_GROUPS)
        ]
        for token in range(tokens):
            words = [simd_ir.load(b, I32, _row(b, q, row, token, 4 * j)) for j in range(AT_ONCE)]
            columns = [b.bitcast(simd_ir.splat(b, word), BYTES) for word in words]
            for group in range(TILE_GROUPS):
                i = TILE_GROUPS * token + group
                totals[i] = add_dots(b, ISA, totals[i], codes[group], columns, largest)
        return list(totals)

    return add_lines


def _block_adder(reader: SuperblockReader, tokens: int) -> Any:
    kind = reader.kind
    sums_type = types.UniTuple(_sums(tokens), kind.parts)

    @operation(types.void, *[_address] * 7, sums_type)
    def add_block(
        b: Builder,
        parts: Value,
        panel: Value,
        block: Value,
        d: Value,
        d_row: Value,
        s: Value,
        s_row: Value,
        sums: Value,
    ) -> None:
        """parts += whole numbers of a block * scales of its activations"""
        dots = [cgutils.unpack_tuple(b, own) for own in cgutils.unpack_tuple(b, sums)]
        at = b.add(panel, b.mul(block, ir.Constant(I64, kind.factors * LINE)))
        for token in range(tokens):
            totals = kind.totals(b, _row(b, s, s_row, token))
            scale = simd_ir.splat(b, simd_ir.load(b, F32, _row(b, d, d_row, token)))
            for group in range(TILE_GROUPS):
                i, own = TILE_GROUPS * token + group, simd_ir.offset(b, at, 64 * group)
                factors = [
                    simd_ir.load(b, INTS, simd_ir.offset(b, own, _LINES_BYTES + LINE * k))
                    for k in range(kind.factors)
                ]
                wholes = kind.whole(b, ISA, [part[i] for part in dots], factors, totals)
                for k, whole in enumerate(wholes):
                    place = simd_ir.offset(b, parts, 64 * (i * kind.numbers + k))
                    before, wide = simd_ir.load(b, FLOATS, place), b.sitofp(whole, FLOATS)
                    simd_ir.store(b, simd_ir.multiply_add(b, wide, scale, before), place)

    return add_block


def _finisher(reader: SuperblockReader, tokens: int) -> Any:
    numbers = reader.kind.numbers

    @operation(types.void, _address, _address, _address, _address)
    def finish(b: Builder, sums: Value, row: Value, parts: Value, panel: Value) -> None:
        """sums += heads * parts"""
        heads = simd_ir.offset(b, panel, _heads_at(reader))
        for token in range(tokens):
            start = b.add(sums, b.mul(row, ir.Constant(I64, token)))
            for group in range(TILE_GROUPS):
                place = simd_ir.offset(b, start, 64 * group)
                total = simd_ir.load(b, FLOATS, place)
                for i in range(numbers):
                    at = 64 * ((token * TILE_GROUPS + group) * numbers + i)
                    own = simd_ir.load(b, FLOATS, simd_ir.offset(b, parts, at))
                    head = simd_ir.load(b, FLOATS, simd_ir.offset(b, heads, LINE * i + 64 * group))
                    total = simd_ir.multiply_add(b, own, head, total)
                simd_ir.store(b, total, place)

    return finish
