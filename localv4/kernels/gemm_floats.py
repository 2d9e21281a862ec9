"""Many tokens times packed float weights: weights exact, activations and sums in float32.

The first of the two steps of `kernels.gemm`, in the order of additions of `kernels.float_rows`, so
that a token has the same bits in any company. A span of columns of a panel is expanded to float32
once and multiplied with all tokens of a batch.

Arguments: `w` a packed matrix of `groups` groups, `panel` the number of a panel of it; `x` float32
activations, a token `stride` float32 behind the one before; `first` the first of `count` tokens,
at most `gemm.BATCH_TOKENS`; `scale` float32 (rows / 128, cols / 128) for F8. Rows of activations
behind the last token are read, but not used: there must be room for `gemm.SPARE_TOKENS` of them.
The scratch memory has SCRATCH_BYTES for each thread.
"""

from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils

from localv4.kernels import simd_ir
from localv4.kernels.device import device
from localv4.kernels.float_rows import (
    B16_READER,
    CHAINS,
    COLUMNS,
    F8_READER,
    F32R_READER,
    SPAN,
    STEP,
    FloatReader,
    scale_row,
)
from localv4.kernels.gemm import (
    BATCH_TOKENS,
    PANEL_GROUPS,
    SUMS_ROW,
    Sums,
    panel_groups,
)
from localv4.kernels.readers import prefetch_lines
from localv4.kernels.simd import Vector, operation, prefetch, store_f32, zeros_f32
from localv4.kernels.simd_ir import F32, FLOATS, I64, Builder, Value
from localv4.kernels.tiles import LINE, TILE_GROUPS, TILE_TOKENS
from localv4.kernels.vectors import f32x16

_SUMS = TILE_GROUPS * TILE_TOKENS
_PART_BYTES = 4 * SPAN // CHAINS
_sums = types.UniTuple(f32x16, _SUMS)
_address = types.int64

# The sums of all tokens, the lines of a span, then the sums of each chain of a tile.
_LINES = BATCH_TOKENS * SUMS_ROW
_STORED = _LINES + SPAN * LINE
_STORED_BYTES = 64 * _SUMS
SCRATCH_BYTES = _STORED + CHAINS * _STORED_BYTES
"""Memory that each thread needs for itself."""


def _summer(reader: FloatReader) -> Any:
    """Make the function that multiplies panels of a format."""
    columns, column_bytes, factor_of = reader.columns, reader.column_bytes, reader.factor

    @device
    def expand(lines: int, w: int, group_bytes: int, groups: int, length: int) -> None:
        """Convert `length` columns of some groups to float32 [column][group][row]."""
        for group in range(groups):
            for k in range(0, length, COLUMNS):
                source = w + group * group_bytes + column_bytes * k
                target = lines + LINE * k + 64 * group
                prefetch_lines(source, COLUMNS * column_bytes // 64)
                loaded = columns(source)
                for i in range(COLUMNS):
                    store_f32(target + LINE * i, loaded[i])

    @device
    def sums(
        scratch: int,
        w: int,
        panel: int,
        groups: int,
        cols: int,
        x: int,
        scale: int,
        stride: int,
        first: int,
        count: int,
    ) -> None:
        size, row = column_bytes * cols, 4 * stride
        factors = scale_row(scale, panel * PANEL_GROUPS, cols)
        tiles = (count + TILE_TOKENS - 1) // TILE_TOKENS
        for i in range(tiles * TILE_TOKENS * PANEL_GROUPS):
            store_f32(scratch + 64 * i, zeros_f32())
        for start in range(0, cols, SPAN):
            length, factor = min(SPAN, cols - start), factor_of(factors + start // SPAN * 4)
            for group in range(0, panel_groups(panel, groups), TILE_GROUPS):
                source = w + (panel * PANEL_GROUPS + group) * size + column_bytes * start
                width = min(TILE_GROUPS, panel_groups(panel, groups) - group)
                expand(scratch + _LINES, source, size, width, length)
                for tile in range(tiles):
                    out = scratch + tile * TILE_TOKENS * SUMS_ROW + 64 * group
                    tokens = x + (first + tile * TILE_TOKENS) * row + 4 * start
                    _add_tile(out, scratch, tokens, row, length, factor)

    return sums


@device
def _add_tile(out: int, scratch: int, x: int, row: int, length: int, factor: Vector) -> None:
    """Add a span times a tile of tokens to the sums at out."""
    lines, stored = scratch + _LINES, scratch + _STORED
    for chain in range(CHAINS):
        _prefetch_tile(x + TILE_TOKENS * row + _PART_BYTES * chain, row)
        sums = zero_sums()
        for k in range(COLUMNS * chain, length, STEP):
            sums = add_products(sums, lines + LINE * k, x + 4 * k, row)
        store_sums(stored + _STORED_BYTES * chain, sums)
    flush_sums(out, stored, factor)


@device
def _prefetch_tile(x: int, row: int) -> None:
    """Ask for a part of a span of a tile of tokens; any address is harmless."""
    for token in range(TILE_TOKENS):
        for line in range(_PART_BYTES // 64):
            prefetch(x + token * row + 64 * line)


sums_b16: Sums = _summer(B16_READER)
sums_f32r: Sums = _summer(F32R_READER)
sums_f8: Sums = _summer(F8_READER)


# --- operations on the sums of a tile ---


@operation(_sums)
def zero_sums(b: Builder) -> list[Value]:
    """Return sums of nothing."""
    return [simd_ir.filled(FLOATS, 0.0)] * _SUMS


@operation(_sums, _sums, _address, _address, _address)
def add_products(b: Builder, sums: Value, lines: Value, x: Value, row: Value) -> list[Value]:
    """Return sums + products of four columns of weights with those of tokens `row` bytes apart."""
    totals: list[Value] = cgutils.unpack_tuple(b, sums)
    starts = [b.add(x, b.mul(row, ir.Constant(I64, token))) for token in range(TILE_TOKENS)]
    for column in range(COLUMNS):
        weights = [
            simd_ir.load(b, FLOATS, simd_ir.offset(b, lines, LINE * column + 64 * group))
            for group in range(TILE_GROUPS)
        ]
        for token, start in enumerate(starts):
            value = simd_ir.splat(b, simd_ir.load(b, F32, simd_ir.offset(b, start, 4 * column)))
            for group, weight in enumerate(weights):
                i = TILE_GROUPS * token + group
                totals[i] = simd_ir.multiply_add(b, weight, value, totals[i])
    return totals


@operation(types.void, _address, _sums)
def store_sums(b: Builder, address: Value, sums: Value) -> None:
    """Write the sums of a tile."""
    for i, total in enumerate(cgutils.unpack_tuple(b, sums)):
        simd_ir.store(b, total, simd_ir.offset(b, address, 64 * i))


@operation(types.void, _address, _address, f32x16)
def flush_sums(b: Builder, out: Value, stored: Value, factor: Value) -> None:
    """out[token][row] += sums of all chains * factor"""
    for i in range(_SUMS):
        chains = [
            simd_ir.load(b, FLOATS, simd_ir.offset(b, stored, _STORED_BYTES * chain + 64 * i))
            for chain in range(CHAINS)
        ]
        token, group = divmod(i, TILE_GROUPS)
        at = simd_ir.offset(b, out, SUMS_ROW * token + 64 * group)
        total = b.fadd(b.fadd(chains[0], chains[1]), b.fadd(chains[2], chains[3]))
        before = simd_ir.load(b, FLOATS, at)
        simd_ir.store(b, simd_ir.multiply_add(b, total, factor, before), at)
