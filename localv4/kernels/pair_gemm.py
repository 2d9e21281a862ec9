"""Products of MX4 panels in bfloat16 tiles of AMX: the sums of `kernels.gemm`, with the same bits.

Where the scales of activations are powers of two, as those of MX4 are, int8 * scale and E2M1 *
scale are bfloat16 without loss. The sum of a block of 32 columns is exact then, in any order; tiles
round once when they add it, as the multiply-add of the other ways does. So sums stay in tiles, and
the vector unit has nothing to do with them.

Activations are `kernels.pairs`. Weights are expanded to [block][group][pair of columns][row].
"""

import struct

from llvmlite import ir
from numba import types

from localv4.kernels import simd_ir
from localv4.kernels.amx import CONFIGURATION_BYTES, WHOLE, begin_whole_tiles, end_tiles
from localv4.kernels.device import device
from localv4.kernels.float_tiles import (
    add_products,
    add_row_products,
    clear_sums,
    load_sums,
    store_sums,
)
from localv4.kernels.packed import BLOCK, MX4
from localv4.kernels.pairs import PAIRS_ROW
from localv4.kernels.panels import LINES_OFFSET, PANEL_GROUPS, SUMS_ROW, panel_groups
from localv4.kernels.readers import HEAD_BYTES, prefetch_lines
from localv4.kernels.simd import operation
from localv4.kernels.simd_ir import BYTES, I8, INTS, LANES, SHORTS, Builder, Value

LOWEST_SCALE, HIGHEST_SCALE = 109, 190
"""UE8M0 codes from 2^-18 to 2^63. Tiles take numbers below 2^-126 as 0, and no product is less:
scales of activations are at least 2^-106 (`activations.SMALLEST`), codes of weights a half."""

_COLUMNS, _SUPERBLOCK = MX4.columns, MX4.superblock_bytes
_TILE = PAIRS_ROW * WHOLE
_BLOCKS = _COLUMNS // BLOCK  # of a superblock
_BLOCK_BYTES = (_SUPERBLOCK - HEAD_BYTES) // _BLOCKS
_CONFIGURATION = LINES_OFFSET + _BLOCKS * PANEL_GROUPS * _TILE
SCRATCH_BYTES = _CONFIGURATION + CONFIGURATION_BYTES
"""Memory that each thread needs for itself."""

_E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
_address = types.int64


def _bfloat16(value: float) -> int:
    """Return the bits of a number that is a bfloat16."""
    bits: int = struct.unpack("<I", struct.pack("<f", value))[0]
    return bits >> 16


@operation(types.void, _address, _address, _address)
def _expand_block(b: Builder, out: Value, block: Value, scales: Value) -> None:
    """Write a block of sixteen rows as pairs: sixteen lines of 64 bytes."""
    values = [_bfloat16(sign * value) for sign in (1, -1) for value in _E2M1]
    table = simd_ir.constant(SHORTS, values * 2)  # of an index five bits count
    codes = b.zext(simd_ir.load(b, simd_ir.vector(I8, LANES), scales), INTS)
    exponents = b.shl(b.sub(codes, simd_ir.filled(INTS, 127)), simd_ir.filled(INTS, 7))
    exponents = b.and_(exponents, simd_ir.filled(INTS, 0xFFFF))
    both = b.bitcast(b.or_(exponents, b.shl(exponents, simd_ir.filled(INTS, 16))), SHORTS)
    for line in range(4):
        packed = b.bitcast(simd_ir.load(b, BYTES, simd_ir.offset(b, block, 64 * line)), SHORTS)
        for nibble in range(4):
            index = b.lshr(packed, simd_ir.filled(SHORTS, 4 * nibble))
            found = simd_ir.call(b, "llvm.x86.avx512.permvar.hi.512", SHORTS, table, index)
            size = b.and_(index, simd_ir.filled(SHORTS, 7))
            is_some = b.icmp_signed("!=", size, simd_ir.filled(SHORTS, 0))
            scaled = b.select(is_some, b.add(found, both), simd_ir.filled(SHORTS, 0))
            simd_ir.store(b, scaled, simd_ir.offset(b, out, 64 * (4 * line + nibble)))


@operation(types.boolean, _address)
def _are_moderate(b: Builder, scales: Value) -> Value:
    """Whether all scales of a superblock are from LOWEST_SCALE to HIGHEST_SCALE."""
    above = b.sub(simd_ir.load(b, BYTES, scales), simd_ir.filled(BYTES, LOWEST_SCALE))
    span = simd_ir.filled(BYTES, HIGHEST_SCALE - LOWEST_SCALE)
    mask = b.bitcast(b.icmp_unsigned("<=", above, span), simd_ir.I64)
    return b.icmp_signed("==", mask, ir.Constant(simd_ir.I64, -1))


@device
def can_pair(w: int, panel: int, groups: int, cols: int) -> bool:
    """Say whether the scales of a panel allow `sum_pairs`."""
    size = cols // _COLUMNS * _SUPERBLOCK
    start = w + panel * PANEL_GROUPS * size
    for scales in range(start, start + panel_groups(panel, groups) * size, _SUPERBLOCK):
        if not _are_moderate(scales):
            return False
    return True


@device
def sum_pairs(
    scratch: int,
    w: int,
    panel: int,
    groups: int,
    cols: int,
    pairs: int,
    distance: int,
    first: int,
    count: int,
) -> None:
    """Multiply a panel with some rows of pairs; arguments and sums as in `kernels.gemm`.

    Sums behind `count` are of no use; up to 31 rows behind the last one are read.
    """
    superblocks, width = cols // _COLUMNS, panel_groups(panel, groups)
    size, lines = superblocks * _SUPERBLOCK, scratch + LINES_OFFSET
    begin_whole_tiles(scratch + _CONFIGURATION)
    for start in range(superblocks):
        # more at a time would not stay in the first cache beside the activations
        _expand(lines, w + panel * PANEL_GROUPS * size + start * _SUPERBLOCK, size, width)
        own = pairs + distance * _BLOCKS * start + PAIRS_ROW * first
        for token in range(0, count, 2 * WHOLE):
            out, rows = scratch + token * SUMS_ROW, own + PAIRS_ROW * token
            if count - token > WHOLE:
                _add_two_tiles(out, lines, width, rows, distance, start == 0)
            else:
                _add_tile(out, lines, rows, distance, start == 0)
    end_tiles()


@device
def _expand(lines: int, w: int, size: int, groups: int) -> None:
    """Expand the superblock at w and those of other groups, which are `size` bytes apart."""
    for group in range(groups):
        source = w + group * size
        prefetch_lines(source, _SUPERBLOCK // 64)
        for block in range(_BLOCKS):
            out = lines + _TILE * (PANEL_GROUPS * block + group)
            at = source + HEAD_BYTES + _BLOCK_BYTES * block
            _expand_block(out, at, source + WHOLE * block)


@device
def _add_two_tiles(
    out: int, lines: int, groups: int, rows: int, distance: int, is_first: bool
) -> None:
    """Add the products of a superblock of all groups with 32 rows of pairs."""
    for group in range(0, groups, 2):
        place = out + 64 * group
        if is_first:
            clear_sums()
        else:
            load_sums(place, WHOLE * SUMS_ROW, SUMS_ROW)
        for block in range(_BLOCKS):
            weights = lines + _TILE * (PANEL_GROUPS * block + group)
            add_products(rows + distance * block, _TILE, PAIRS_ROW, weights, _TILE, 64)
        store_sums(place, WHOLE * SUMS_ROW, SUMS_ROW)


@device
def _add_tile(out: int, lines: int, rows: int, distance: int, is_first: bool) -> None:
    """The same with sixteen rows."""
    if is_first:
        clear_sums()
    else:
        load_sums(out, 128, SUMS_ROW)
    for block in range(_BLOCKS):
        weights = lines + _TILE * PANEL_GROUPS * block
        add_row_products(rows + distance * block, PAIRS_ROW, weights, _TILE, 64)
    store_sums(out, 128, SUMS_ROW)
