"""One token times packed float weights: weights exact, activations and sums in float32.

Formats: B16 and F32R (`kernels.packing_floats`), F8 (`kernels.packed`). Arguments are those of
`kernels.matvec`, with `x` the address of float32 activations and `scale` that of the float32
scales (rows / 128, cols / 128) of F8.

The order of additions, which `kernels.gemm_floats` repeats: columns are cut into spans of SPAN.
Of a span there are CHAINS sums a, b, c, d, column k belonging to number k / 4 % 4, and
((a + b) + (c + d)) * scale is added to the result.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numba import types

from localv4.kernels import packed, simd_dots, simd_ir
from localv4.kernels.device import device
from localv4.kernels.isa import ISA
from localv4.kernels.matvec import F8_UNIT, partner
from localv4.kernels.packed import PackedFormat
from localv4.kernels.packing_floats import B16, F32R
from localv4.kernels.readers import prefetch_lines
from localv4.kernels.simd import (
    Vector,
    add,
    broadcast_f32,
    multiply,
    multiply_add,
    operation,
    splat_f32,
    store_f32,
    zeros_f32,
)
from localv4.kernels.simd_ir import F32, FLOATS, I16, INTS, LANES, Builder, Value
from localv4.kernels.vectors import f32x16

SPAN = packed.F8_SPAN
CHAINS = 4
"""Independent sums of a span."""

COLUMNS = 4
"""Columns of a chain that are next to each other."""

STEP = CHAINS * COLUMNS
_ONE = np.float32(1)
_address = types.int64
_four = types.UniTuple(f32x16, COLUMNS)

Columns = Callable[[Builder, Value], list[Value]]


@dataclass(frozen=True, slots=True, eq=False)
class FloatReader:
    """How to read a format of floats.

    `columns(address)` yields COLUMNS columns of sixteen rows, `add_products(acc, w, x)` adds their
    products with as many activations; `factor(scale)` is what sums of a span are multiplied with.
    """

    fmt: PackedFormat
    columns: Any
    add_products: Any
    factor: Callable[[int], Vector]

    @property
    def column_bytes(self) -> int:
        """Bytes of a column of sixteen rows."""
        return self.fmt.superblock_bytes


def _operations(read: Columns) -> tuple[Any, Any]:
    """Make the operations `columns` and `add_products` of a reader."""

    @operation(_four, _address)
    def columns(b: Builder, address: Value) -> list[Value]:
        """Read four columns as float32."""
        return read(b, address)

    @operation(f32x16, f32x16, _address, _address)
    def add_products(b: Builder, acc: Value, address: Value, x: Value) -> Value:
        """acc + the products of four columns with four float32 at address x"""
        for i, weight in enumerate(read(b, address)):
            activation = simd_ir.splat(b, simd_ir.load(b, F32, simd_ir.offset(b, x, 4 * i)))
            acc = simd_ir.multiply_add(b, weight, activation, acc)
        return acc

    return columns, add_products


def _b16_columns(b: Builder, address: Value) -> list[Value]:
    columns = []
    for i in range(COLUMNS):
        halves = simd_ir.load(b, simd_ir.vector(I16, LANES), simd_ir.offset(b, address, 32 * i))
        bits = b.shl(b.zext(halves, INTS), simd_ir.filled(INTS, 16))
        columns.append(b.bitcast(bits, FLOATS))
    return columns


def _f32_columns(b: Builder, address: Value) -> list[Value]:
    return [simd_ir.load(b, FLOATS, simd_ir.offset(b, address, 64 * i)) for i in range(COLUMNS)]


def _f8_columns(b: Builder, address: Value) -> list[Value]:
    return simd_dots.f8_columns(b, ISA, address)


@device
def _unit_factor(scale: int) -> Vector:
    return splat_f32(_ONE)


@device
def _f8_factor(scale: int) -> Vector:
    return multiply(broadcast_f32(scale), splat_f32(F8_UNIT))


B16_READER = FloatReader(B16, *_operations(_b16_columns), _unit_factor)
F32R_READER = FloatReader(F32R, *_operations(_f32_columns), _unit_factor)
F8_READER = FloatReader(packed.F8, *_operations(_f8_columns), _f8_factor)


@device
def scale_row(scale: int, group: int, cols: int) -> int:
    """Return the address of the scales of a group; of no use where the format has none."""
    return scale + group * packed.GROUP_ROWS // SPAN * (cols // SPAN) * 4


def _product(reader: FloatReader) -> Any:
    """Make the mat-vec of a format."""
    add_products, factor = reader.add_products, reader.factor
    size = reader.column_bytes
    chain_bytes = COLUMNS * size

    @device
    def add_ahead(acc: Vector, w: int, x: int) -> Vector:
        # small portions: asking for a whole step at once leaves 5 % of the bandwidth unused
        prefetch_lines(w, chain_bytes // 64)
        return add_products(acc, w, x)

    @device
    def pair(
        w: int, v: int, cols: int, x: int, scale_w: int, scale_v: int
    ) -> tuple[Vector, Vector]:
        """Return the products of two groups; two streams of memory, as in `kernels.matvec`."""
        acc_w, acc_v = zeros_f32(), zeros_f32()
        for start in range(0, cols, SPAN):
            a0, a1, a2, a3 = zeros_f32(), zeros_f32(), zeros_f32(), zeros_f32()
            b0, b1, b2, b3 = zeros_f32(), zeros_f32(), zeros_f32(), zeros_f32()
            for _ in range(min(SPAN, cols - start) // STEP):
                a0, b0 = add_ahead(a0, w, x), add_ahead(b0, v, x)
                w, v = w + chain_bytes, v + chain_bytes
                a1, b1 = add_ahead(a1, w, x + 16), add_ahead(b1, v, x + 16)
                w, v = w + chain_bytes, v + chain_bytes
                a2, b2 = add_ahead(a2, w, x + 32), add_ahead(b2, v, x + 32)
                w, v = w + chain_bytes, v + chain_bytes
                a3, b3 = add_ahead(a3, w, x + 48), add_ahead(b3, v, x + 48)
                w, v, x = w + chain_bytes, v + chain_bytes, x + 64
            acc_w = multiply_add(add(add(a0, a1), add(a2, a3)), factor(scale_w), acc_w)
            acc_v = multiply_add(add(add(b0, b1), add(b2, b3)), factor(scale_v), acc_v)
            scale_w, scale_v = scale_w + 4, scale_v + 4
        return acc_w, acc_v

    @device
    def matvec(
        out: int, w: int, g0: int, g1: int, cols: int, x: int, scale: int, unused: int
    ) -> None:
        group_bytes, half = cols * size, (g1 - g0 + 1) // 2
        for g in range(g0, g0 + half):
            other = partner(g, half, g1)
            rows = scale_row(scale, g, cols), scale_row(scale, other, cols)
            first, second = pair(w + g * group_bytes, w + other * group_bytes, cols, x, *rows)
            store_f32(out + 64 * g, first)
            store_f32(out + 64 * other, second)

    return matvec


Matvec = Callable[[int, int, int, int, int, int, int, int], None]

matvec_b16: Matvec = _product(B16_READER)
matvec_f32r: Matvec = _product(F32R_READER)
matvec_f8: Matvec = _product(F8_READER)
