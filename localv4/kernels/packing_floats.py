"""Stored float matrices into the packed formats of floats, value for value.

| format | values   | bytes of a column of a group        |
|--------|----------|-------------------------------------|
| B16    | bfloat16 | 32: the upper halves of 16 float32  |
| F32R   | float32  | 64                                  |

Row r is lane r % 16 of group r // 16, as in `kernels.packed`. The number of rows may be any: the
last group is filled up with rows of zeros, and so a product writes results for them, too.

Every packer fills groups first ... end - 1 with sixteen rows each, so that threads can share a
matrix. `out` is the packed matrix from group 0 on; with `step` 2 the groups go to every second
place. `data` is the matrix, row after row. A result is the number of values that were lost: 0.
"""

from collections.abc import Callable
from typing import Any

import numpy as np
from llvmlite import ir
from numba import types

from localv4.kernels import simd_dots, simd_ir
from localv4.kernels.arrays import Bytes
from localv4.kernels.compiler import kernel
from localv4.kernels.device import device
from localv4.kernels.isa import ISA
from localv4.kernels.packed import GROUP_ROWS, PackedFormat
from localv4.kernels.simd import operation
from localv4.kernels.simd_ir import I16, I64, INTS, LANES, Builder, Value

B16 = PackedFormat("B16", 1, 32, 16)
F32R = PackedFormat("F32R", 1, 64, 16)

_SOURCE = "Array(u1, 1, 'C', readonly=True)"
_SIGNATURE = f"i8(u1[::1], {_SOURCE}, i8, i8, i8, i8)"
_HALVES = simd_ir.vector(I16, LANES)
_CHECKED = 1 << 18  # values that are looked at together
_address = types.int64


def groups_of(rows: int) -> int:
    """Return the number of groups of sixteen rows, the last one filled up."""
    return -(-rows // GROUP_ROWS)


def float_bytes(fmt: PackedFormat, rows: int, cols: int) -> int:
    """Return the bytes of a packed matrix of any number of rows.

    Raises ValueError if the number of columns has no packed form.
    """
    if rows <= 0 or cols <= 0 or cols % fmt.columns_unit:
        raise ValueError(f"a matrix of {rows} x {cols} has no packed form {fmt.name}")
    return groups_of(rows) * cols * fmt.superblock_bytes


def fits_bf16(data: Bytes) -> bool:
    """Tell whether all float32 of a matrix, given as its bytes in a row, are bfloat16 values."""
    low = data.view(np.uint16)[::2]
    return not any(low[i : i + _CHECKED].any() for i in range(0, low.size, _CHECKED))


def _transposer(load_row: Callable[[Builder, Value], Value]) -> Any:
    """Make the operation that packs sixteen columns of a group."""

    @operation(types.void, _address, _address, _address, _address)
    def transpose(b: Builder, out: Value, data: Value, stride: Value, rows: Value) -> None:
        """Write columns of sixteen rows `stride` bytes apart, of which `rows` exist."""
        last = b.sub(rows, ir.Constant(I64, 1))
        lanes = []
        for lane in range(LANES):
            number = ir.Constant(I64, lane)
            exists = b.icmp_signed("<", number, rows)
            value = load_row(b, b.add(data, b.mul(stride, b.select(exists, number, last))))
            lanes.append(b.select(exists, value, ir.Constant(value.type, [0] * LANES)))
        for _ in range(4):  # each round interleaves the first half with the second: 16 = 2^4
            halves = zip(lanes[: LANES // 2], lanes[LANES // 2 :], strict=True)
            lanes = [half for pair in halves for half in _interleaved(b, *pair)]
        size = LANES * lanes[0].type.element.width // 8
        for column, value in enumerate(lanes):
            simd_ir.store(b, value, simd_ir.offset(b, out, size * column))

    return transpose


def _interleaved(b: Builder, x: Value, y: Value) -> list[Value]:
    """x0 y0 x1 y1 ..., in two vectors."""
    order = [lane for i in range(LANES) for lane in (i, LANES + i)]
    halves = (order[:LANES], order[LANES:])
    return [b.shuffle_vector(x, y, simd_ir.constant(INTS, half)) for half in halves]


_transpose_u16 = _transposer(lambda b, address: simd_ir.load(b, _HALVES, address))
_transpose_u32 = _transposer(lambda b, address: simd_ir.load(b, INTS, address))
_transpose_upper = _transposer(
    lambda b, address: b.trunc(
        b.lshr(simd_ir.load(b, INTS, address), simd_ir.filled(INTS, 16)), _HALVES
    )
)
_transpose_f16 = _transposer(
    lambda b, address: b.bitcast(simd_dots.load_f16(b, ISA, address), INTS)
)


def _packer(transpose: Any, fmt: PackedFormat, value_bytes: int) -> Any:
    """Make the packer from values of some bytes to a format."""
    column_bytes, tile = fmt.superblock_bytes, LANES * value_bytes

    @device
    def pack(out: Bytes, data: Bytes, cols: int, first: int, end: int, step: int) -> int:
        size = cols * value_bytes
        rows = data.size // size
        for g in range(first, end):
            target = out.ctypes.data + g * step * column_bytes * cols
            source = data.ctypes.data + g * GROUP_ROWS * size
            for i in range(cols // LANES):
                at = target + i * LANES * column_bytes
                transpose(at, source + i * tile, size, rows - g * GROUP_ROWS)
        return 0

    return pack


_pack_bf16 = _packer(_transpose_u16, B16, 2)
_pack_f32_as_b16 = _packer(_transpose_upper, B16, 4)
_pack_f32 = _packer(_transpose_u32, F32R, 4)
_pack_f16 = _packer(_transpose_f16, F32R, 2)


@kernel(_SIGNATURE)
def pack_bf16(out: Bytes, data: Bytes, cols: int, first: int, end: int, step: int) -> int:
    """BF16 to B16."""
    count: int = _pack_bf16(out, data, cols, first, end, step)
    return count


@kernel(_SIGNATURE)
def pack_f32_as_b16(out: Bytes, data: Bytes, cols: int, first: int, end: int, step: int) -> int:
    """F32 to B16, for a matrix that `fits_bf16`."""
    count: int = _pack_f32_as_b16(out, data, cols, first, end, step)
    return count


@kernel(_SIGNATURE)
def pack_f32(out: Bytes, data: Bytes, cols: int, first: int, end: int, step: int) -> int:
    """F32 to F32R."""
    count: int = _pack_f32(out, data, cols, first, end, step)
    return count


@kernel(_SIGNATURE)
def pack_f16(out: Bytes, data: Bytes, cols: int, first: int, end: int, step: int) -> int:
    """F16 to F32R: bfloat16 would lose digits."""
    count: int = _pack_f16(out, data, cols, first, end, step)
    return count
