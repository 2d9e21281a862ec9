"""Operations of kernels on blocks of packed weights: 32 columns of sixteen rows in eight vectors.

The vectors are those of `kernels.simd_dots`: weights plus the bias of the machine.
"""

from llvmlite import ir
from numba import types
from numba.core import cgutils

from localv4.kernels import simd_dots, simd_ir
from localv4.kernels.isa import ISA
from localv4.kernels.simd import i8x64, i32x16, operation
from localv4.kernels.simd_ir import Builder, Value

block = types.UniTuple(i8x64, simd_dots.VECTORS)
_address = types.int64


@operation(block, _address)
def mx4_codes(b: Builder, address: Value) -> list[Value]:
    """Decode the 256 bytes of an MX4 block: twice its values."""
    return simd_dots.mx4_codes(b, ISA, address)


@operation(block, _address)
def q4_codes(b: Builder, address: Value) -> list[Value]:
    """Decode the 256 bytes of a Q4 block."""
    return simd_dots.q4_codes(b, ISA, address)


@operation(block, _address)
def q8_bytes(b: Builder, address: Value) -> list[Value]:
    """Load the 512 bytes of a Q8 block."""
    return simd_dots.q8_bytes(b, ISA, address)


@operation(i32x16, i32x16, block, _address)
def add_code_dots(b: Builder, acc: Value, weights: Value, q: Value) -> Value:
    """acc + products of a block of 4-bit weights with 32 int8 at address q"""
    columns = simd_dots.activations(b, q)
    return simd_dots.add_code_dots(b, ISA, acc, cgutils.unpack_tuple(b, weights), columns)


@operation(i32x16, i32x16, block, _address)
def add_byte_dots(b: Builder, acc: Value, weights: Value, q: Value) -> Value:
    """acc + products of a block of 8-bit weights with 32 int8 at address q"""
    columns = simd_dots.activations(b, q)
    return simd_dots.add_byte_dots(b, ISA, acc, cgutils.unpack_tuple(b, weights), columns)


@operation(types.void, _address, _address, block)
def scatter_block(b: Builder, address: Value, stride: Value, vectors: Value) -> None:
    """Write the eight vectors of a block, `stride` bytes apart."""
    for i, value in enumerate(cgutils.unpack_tuple(b, vectors)):
        simd_ir.store(b, value, b.add(address, b.mul(stride, ir.Constant(simd_ir.I64, i))))
