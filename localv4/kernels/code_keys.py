"""Rows of the indexer in FP4 (`row_forms.E2M1_ROWS`), expanded to int8 by blocks of KEYS.

All codes of a row become whole numbers that share one scale: twice the value of the code, times 8,
4, 2 or 1 as the scale of its group is the largest of the row, a half, a quarter or an eighth of it
(smaller ones are never written). They are at most 96. So a product over all channels is a sum of
integers, exact. Where vector registers take unsigned weights, they are stored with the bias of
`simd_dots.add_byte_dot`, for tiles (`kernels.code_tiles`) without.

Memory of a block: bytes [key][n] in the order of `code_queries.line_channel`; beside them a float32
for each key, 2^(e - 127), e the largest stored exponent: infinite if something in the row was not.
"""

from collections.abc import Callable
from typing import Any

import numpy as np
from llvmlite import ir
from numba import types
from numba.core import cgutils

from localv4.kernels import simd_dots, simd_ir
from localv4.kernels.code_queries import WIDE
from localv4.kernels.device import device
from localv4.kernels.isa import ISA
from localv4.kernels.row_codes import E2M1_UNIT, load_e2m1, splat_power
from localv4.kernels.row_forms import E2M1_ROWS, SPREAD
from localv4.kernels.simd import (
    add_i32,
    multiply,
    operation,
    read_u8,
    read_u32,
    round_i32,
    splat_i32,
    store_i8,
    write_u32,
)
from localv4.kernels.simd_ir import BYTES, I8, I32, I64, INTS, LANES, SHORTS, Builder, Value
from localv4.kernels.stack import stack_floats

KEYS = 48
"""Rows of a block: whole register tiles, and whole tiles of AMX."""

AHEAD = 2
"""Blocks between the one that is multiplied and the one that memory is asked for."""

_address = types.int64
_GROUP = 32
_stride = E2M1_ROWS.stride
_block_words = stack_floats(KEYS)


def _table(bias: int) -> list[int]:
    """Return what each code means at each shift, 16 bytes after 16."""
    values = (
        (value << SPREAD >> shift) + bias
        for shift in range(SPREAD + 1)
        for value in simd_dots.E2M1_DOUBLED
    )
    return [value & 255 for value in values]


@operation(types.void, _address, _address, _address)
def _share_scales(b: Builder, scales: Value, shifts: Value, exponents: Value) -> None:
    """Turn the four exponents of sixteen rows into shifts, times 16, and a float32 for each row."""
    words = simd_ir.load(b, INTS, exponents)
    largest = b.and_(words, simd_ir.filled(INTS, 255))
    for i in range(1, 4):
        own = b.and_(b.lshr(words, simd_ir.filled(INTS, 8 * i)), simd_ir.filled(INTS, 255))
        largest = b.select(b.icmp_signed(">", own, largest), own, largest)
    simd_ir.store(b, b.shl(largest, simd_ir.filled(INTS, 23)), scales)
    spread = b.or_(largest, b.shl(largest, simd_ir.filled(INTS, 8)))
    spread = b.or_(spread, b.shl(spread, simd_ir.filled(INTS, 16)))
    simd_ir.store(b, b.shl(b.sub(spread, words), simd_ir.filled(INTS, 4)), shifts)


def _row_expander(bias: int) -> Any:
    """Make the operation that expands the 64 bytes of codes of WIDE channels."""
    table = _table(bias)

    @operation(types.void, _address, _address, _address)
    def expand(b: Builder, out: Value, codes: Value, shifts: Value) -> None:
        """Write the channels of low nibbles, then of high ones; shifts: a byte for each group."""
        low = simd_ir.load(b, BYTES, codes)
        high = b.bitcast(b.lshr(b.bitcast(low, SHORTS), simd_ir.filled(SHORTS, 4)), BYTES)
        look_up = _permute(b, table, shifts) if ISA.bytes_permute else _shuffle(b, table, shifts)
        for i, nibbles in enumerate((low, high)):
            found = look_up(b.and_(nibbles, simd_ir.filled(BYTES, 15)))
            simd_ir.store(b, found, simd_ir.offset(b, out, 64 * i))

    return expand


def _permute(b: Builder, table: list[int], shifts: Value) -> Callable[[Value], Value]:
    """Return how to look up codes in the whole table at a time."""
    word = simd_ir.splat(b, simd_ir.load(b, I32, shifts))
    spread = [4 * (lane // 4) + lane // 16 % 4 for lane in range(64)]  # stays in 128 bits
    kind = simd_ir.vector(I32, 64)
    own = b.shuffle_vector(
        b.bitcast(word, BYTES), simd_ir.undefined(BYTES), ir.Constant(kind, spread)
    )
    values = simd_ir.constant(BYTES, table)
    name = "llvm.x86.avx512.permvar.qi.512"
    return lambda codes: simd_ir.call(b, name, BYTES, values, b.or_(codes, own))


def _shuffle(b: Builder, table: list[int], shifts: Value) -> Callable[[Value], Value]:
    """Return how to look up the codes of each group in the part of the table that it needs."""
    values = cgutils.global_constant(b, "index_codes", simd_ir.constant(BYTES, table))
    start = b.ptrtoint(values, I64)
    parts = []
    for group in range(4):
        shift = b.zext(simd_ir.load(b, I8, simd_ir.offset(b, shifts, group)), I64)
        parts.append(simd_ir.load(b, simd_ir.vector(I8, 16), b.add(start, shift)))
    own = simd_ir.join(b, parts)
    return lambda codes: simd_dots.look_up(b, ISA, own, codes)


Expand = Callable[[int, int, int, int, int, int], None]


def expander(bias: int) -> Expand:
    """Make the function that expands a block of rows, with a bias or without."""
    expand_any = _any_expander(bias)
    expand_wide = _wide_expander(bias) if WIDE else expand_any

    @device
    def expand(out: int, scales: int, entries: int, first: int, last: int, n: int) -> None:
        """Expand the KEYS rows from number `first` on; behind the last one its copies."""
        if n == WIDE:
            expand_wide(out, scales, entries, first, last, n)
        else:
            expand_any(out, scales, entries, first, last, n)

    return expand


def _wide_expander(bias: int) -> Expand:
    expand_row = _row_expander(bias)

    @device
    def expand(out: int, scales: int, entries: int, first: int, last: int, n: int) -> None:
        """Expand rows of WIDE channels."""
        size, words = _stride(n, 0), _block_words()
        for i in range(KEYS):
            row = entries + min(first + i, last) * size
            write_u32(words + 4 * i, read_u32(row + WIDE // 2))
        for i in range(0, 4 * KEYS, 64):
            _share_scales(scales + i, words + i, words + i)
        for i in range(KEYS):
            row = entries + min(first + i, last) * size
            expand_row(out + WIDE * i, row, words + 4 * i)

    return expand


def _any_expander(bias: int) -> Expand:
    added = np.int32(bias)

    @device
    def expand(out: int, scales: int, entries: int, first: int, last: int, n: int) -> None:
        """Expand rows of any width."""
        for i in range(KEYS):
            row, at = entries + min(first + i, last) * _stride(n, 0), out + n * i
            largest = 0
            for group in range(n // _GROUP):
                largest = max(largest, int(read_u8(row + n // 2 + group)))
            write_u32(scales + 4 * i, np.uint32(largest << 23))
            for half in range(n // LANES):
                group = half // 2
                shift = largest - int(read_u8(row + n // 2 + group))
                factor = splat_power(127 + E2M1_UNIT + SPREAD + 1 - shift)
                codes = multiply(load_e2m1(row + LANES * group, half % 2 * 4), factor)
                whole = add_i32(round_i32(codes), splat_i32(added))
                store_i8(at + LANES * half, whole)

    return expand
