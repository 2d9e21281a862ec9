"""Many tokens times packed F8 weights: weights exact, activations and sums in float32.

The same two steps as in `kernels.gemm`. `sums_f8` adds in the order of `matvec_f8`, so a token has
the same bits in any company; the mat-vec is faster for up to three tokens. The activations are
tiles of TILE_TOKENS tokens, the last one filled up with zeros: float32 of column k and token m of
a tile at WORD * k + 4 * m.
"""

from llvmlite import ir
from numba import types
from numba.core import cgutils

from localv4.kernels import simd_dots, simd_ir
from localv4.kernels.device import device
from localv4.kernels.gemm import LINES_OFFSET, PANEL_GROUPS, SUMS_ROW, panel_groups
from localv4.kernels.isa import ISA
from localv4.kernels.matvec import F8_UNIT
from localv4.kernels.packed import F8_SPAN, GROUP_ROWS
from localv4.kernels.readers import prefetch_lines
from localv4.kernels.simd import (
    broadcast_f32,
    load_f32,
    multiply,
    operation,
    read_i64,
    splat_f32,
    store_f32,
    zeros_f32,
)
from localv4.kernels.simd_ir import F32, FLOATS, I64, LANES, Builder, Value
from localv4.kernels.tiles import LINE, TILE_GROUPS, TILE_TOKENS, WORD
from localv4.kernels.vectors import f32x16

CHAINS = 4
"""Independent sums of `matvec_f8` in a span: column k belongs to number k / 4 % 4."""

_COLUMNS = 4  # next to each other in a chain
_sums = types.UniTuple(f32x16, TILE_GROUPS * TILE_TOKENS)
_columns = types.UniTuple(f32x16, _COLUMNS)
_address = types.int64
# Two sets of sums of a tile, behind the lines of a span.
_STORED = LINES_OFFSET + F8_SPAN * LINE
_STORED_BYTES = 64 * TILE_GROUPS * TILE_TOKENS


def x_bytes(tokens: int, cols: int) -> int:
    """Return the bytes of the activations."""
    return -(-tokens // TILE_TOKENS) * cols * WORD


@device
def copy_tiles(out: int, x: int, rows: int, count: int, cols: int, first: int, end: int) -> None:
    """Fill tiles first ... end - 1 of the activations.

    x: float32 (any, cols); rows: `count` int64, the rows of x that are the tokens.
    """
    for tile in range(first, end):
        for m in range(TILE_TOKENS):
            token, target = tile * TILE_TOKENS + m, out + tile * cols * WORD + 4 * m
            if token < count:
                source = x + 4 * cols * read_i64(rows + 8 * token)
                for k in range(0, cols, LANES):
                    scatter_f32(target + WORD * k, load_f32(source + 4 * k))
            else:
                for k in range(0, cols, LANES):
                    scatter_f32(target + WORD * k, zeros_f32())


@device
def sums_f8(
    scratch: int,
    w: int,
    panel: int,
    groups: int,
    cols: int,
    x: int,
    scale: int,
    first: int,
    count: int,
) -> None:
    """Multiply a panel; x: the activations, scale: float32 (rows / 128, cols / 128)."""
    size, first_tile = GROUP_ROWS * cols, first // TILE_TOKENS
    tiles = (count + TILE_TOKENS - 1) // TILE_TOKENS
    row = scale + panel * PANEL_GROUPS * GROUP_ROWS // F8_SPAN * (cols // F8_SPAN) * 4
    for i in range(tiles * TILE_TOKENS * PANEL_GROUPS):
        store_f32(scratch + 64 * i, zeros_f32())
    for start in range(0, cols, F8_SPAN):
        factor = row + start // F8_SPAN * 4
        for group in range(0, panel_groups(panel, groups), TILE_GROUPS):
            source = w + (panel * PANEL_GROUPS + group) * size + GROUP_ROWS * start
            width = min(TILE_GROUPS, panel_groups(panel, groups) - group)
            _expand(scratch + LINES_OFFSET, source, size, width)
            for tile in range(tiles):
                out = scratch + tile * TILE_TOKENS * SUMS_ROW + 64 * group
                _add_tile(out, scratch, x + ((first_tile + tile) * cols + start) * WORD, factor)


@device
def _expand(lines: int, w: int, size: int, groups: int) -> None:
    """Convert a span of some groups to float32 [column][group][row]."""
    for group in range(groups):
        for k in range(0, F8_SPAN, _COLUMNS):
            source, target = w + group * size + GROUP_ROWS * k, lines + LINE * k + 64 * group
            prefetch_lines(source, 1)
            columns = f8_columns(source)
            for i in range(_COLUMNS):
                store_f32(target + LINE * i, columns[i])


@device
def _add_tile(out: int, scratch: int, x: int, scale: int) -> None:
    """Add a span times a tile of tokens to the sums at out."""
    lines, stored = scratch + LINES_OFFSET, scratch + _STORED
    store_sums(stored, _chain(lines, x, 0))
    store_sums(stored, add_stored(stored, _chain(lines, x, 1)))
    store_sums(stored + _STORED_BYTES, _chain(lines, x, 2))
    upper = add_stored(stored + _STORED_BYTES, _chain(lines, x, 3))
    factor = multiply(broadcast_f32(scale), splat_f32(F8_UNIT))
    flush_sums(out, SUMS_ROW, add_stored(stored, upper), factor)


@device
def _chain(lines: int, x: int, chain: int) -> tuple[Value, ...]:
    """The sums over the columns of a chain, in their order."""
    sums = zero_sums()
    for k in range(_COLUMNS * chain, F8_SPAN, _COLUMNS * CHAINS):
        sums = add_products(sums, lines + LINE * k, x + WORD * k)
    result: tuple[Value, ...] = sums
    return result


# --- operations ---


@operation(_columns, _address)
def f8_columns(b: Builder, address: Value) -> list[Value]:
    """Read four columns of E4M3 codes as float32, times 2^-8."""
    return simd_dots.f8_columns(b, ISA, address)


@operation(types.void, _address, f32x16)
def scatter_f32(b: Builder, address: Value, value: Value) -> None:
    """Write sixteen float32, WORD bytes apart."""
    for i in range(LANES):
        element = b.extract_element(value, ir.Constant(simd_ir.I32, i))
        simd_ir.store(b, element, simd_ir.offset(b, address, WORD * i))


@operation(_sums)
def zero_sums(b: Builder) -> list[Value]:
    """Return sums of nothing."""
    return [simd_ir.filled(FLOATS, 0.0)] * (TILE_GROUPS * TILE_TOKENS)


@operation(_sums, _sums, _address, _address)
def add_products(b: Builder, sums: Value, lines: Value, words: Value) -> list[Value]:
    """Return sums + products of four columns of weights with those of the activations."""
    totals: list[Value] = cgutils.unpack_tuple(b, sums)
    for column in range(_COLUMNS):
        weights = [
            simd_ir.load(b, FLOATS, simd_ir.offset(b, lines, LINE * column + 64 * group))
            for group in range(TILE_GROUPS)
        ]
        for token in range(TILE_TOKENS):
            at = simd_ir.offset(b, words, WORD * column + 4 * token)
            x = simd_ir.splat(b, simd_ir.load(b, F32, at))
            for group, weight in enumerate(weights):
                i = TILE_GROUPS * token + group
                totals[i] = simd_ir.multiply_add(b, weight, x, totals[i])
    return totals


@operation(types.void, _address, _sums)
def store_sums(b: Builder, address: Value, sums: Value) -> None:
    """Write the sums of a tile."""
    for i, total in enumerate(cgutils.unpack_tuple(b, sums)):
        simd_ir.store(b, total, simd_ir.offset(b, address, 64 * i))


@operation(_sums, _address, _sums)
def add_stored(b: Builder, address: Value, sums: Value) -> list[Value]:
    """Return the sums at an address + sums."""
    return [
        b.fadd(simd_ir.load(b, FLOATS, simd_ir.offset(b, address, 64 * i)), total)
        for i, total in enumerate(cgutils.unpack_tuple(b, sums))
    ]


@operation(types.void, _address, _address, _sums, f32x16)
def flush_sums(b: Builder, out: Value, stride: Value, sums: Value, factor: Value) -> None:
    """out[token][row] += sums * factor; tokens are `stride` bytes apart"""
    totals = cgutils.unpack_tuple(b, sums)
    for token in range(TILE_TOKENS):
        start = b.add(out, b.mul(stride, ir.Constant(I64, token)))
        for group in range(TILE_GROUPS):
            at = simd_ir.offset(b, start, 64 * group)
            before, total = simd_ir.load(b, FLOATS, at), totals[TILE_GROUPS * token + group]
            simd_ir.store(b, simd_ir.multiply_add(b, total, factor, before), at)
