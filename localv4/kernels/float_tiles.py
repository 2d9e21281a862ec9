"""Tiles of AMX that multiply bfloat16: four of float32 sums, as many as the operands leave.

A tile of sixteen lines, 32 bfloat16 each, times another one of sixteen pairs of lines side by side
adds sums over these 32 to a tile of float32. Such a sum is made by itself, and added when it is
whole: where it is exact, one rounding follows, as of a multiply-add.
"""

from llvmlite import ir
from numba import types

from localv4.kernels import simd_ir
from localv4.kernels.amx import emit, pointer
from localv4.kernels.simd import operation
from localv4.kernels.simd_ir import I64, Builder, Value

_SUMS, _LEFT, _RIGHT = ((0, 1), (2, 3)), (4, 5), (6, 7)  # numbers of tiles
_address = types.int64


@operation(types.void)
def clear_sums(b: Builder) -> None:
    """Begin sums of nothing."""
    for pair in _SUMS:
        for tile in pair:
            emit(b, ("tilezero", tile))


@operation(types.void, _address, _address, _address)
def load_sums(b: Builder, address: Value, distance: Value, row: Value) -> None:
    """Read sums: two tiles beside one another, two more `distance` bytes further on."""
    _move(b, "tileloadd64", address, distance, row)


@operation(types.void, _address, _address, _address)
def store_sums(b: Builder, address: Value, distance: Value, row: Value) -> None:
    """Write sums, to the places that `load_sums` reads."""
    _move(b, "tilestored64", address, distance, row)


def _move(b: Builder, name: str, address: Value, distance: Value, row: Value) -> None:
    for number, pair in enumerate(_SUMS):
        own = b.add(address, b.mul(distance, ir.Constant(I64, number)))
        for half, tile in enumerate(pair):
            emit(b, (name, tile, pointer(b, simd_ir.offset(b, own, 64 * half)), row))


@operation(types.void, *[_address] * 6)
def add_products(
    b: Builder,
    left: Value,
    left_distance: Value,
    left_row: Value,
    right: Value,
    right_distance: Value,
    right_row: Value,
) -> None:
    """Add the products of two tiles with two others: sums[i][j] += left[i] * right[j]."""
    operands = ((_LEFT, left, left_distance, left_row), (_RIGHT, right, right_distance, right_row))
    for tiles, address, distance, row in operands:
        for number, tile in enumerate(tiles):
            _load(b, tile, address, distance, row, number)
    for sums, own_left in zip(_SUMS, _LEFT, strict=True):
        for tile, own_right in zip(sums, _RIGHT, strict=True):
            emit(b, ("tdpbf16ps", tile, own_left, own_right))


@operation(types.void, *[_address] * 5)
def add_row_products(
    b: Builder, left: Value, left_row: Value, right: Value, right_distance: Value, right_row: Value
) -> None:
    """Add the products of one tile with four others: sums[i][j] += left * right[2 * i + j]."""
    emit(b, ("tileloadd64", _LEFT[0], pointer(b, left), left_row))
    for number, tile in enumerate((*_SUMS[0], *_SUMS[1])):
        own_right = _RIGHT[number % 2]
        _load(b, own_right, right, right_distance, right_row, number)
        emit(b, ("tdpbf16ps", tile, _LEFT[0], own_right))


def _load(b: Builder, tile: int, address: Value, distance: Value, row: Value, number: int) -> None:
    """Read an operand, the one that is `number` distances behind an address."""
    own = b.add(address, b.mul(distance, ir.Constant(I64, number)))
    emit(b, ("tileloadd64", tile, pointer(b, own), row))
