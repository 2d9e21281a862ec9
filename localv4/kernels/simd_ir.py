"""Small pieces of LLVM IR for kernels that work on sixteen rows at a time.

Everything is written for one logical width: 64 bytes, sixteen int32 or sixteen float32. LLVM
splits such a vector into the registers of the machine: one of AVX-512, two of AVX2, four of NEON.
Addresses are 64-bit integers in bytes.
"""

from collections.abc import Iterable
from typing import Any, TypeAlias

from llvmlite import ir
from numba.core import cgutils

Builder: TypeAlias = Any
Value: TypeAlias = Any  # an LLVM value

LANES = 16

I8, I16, I32, I64 = (ir.IntType(bits) for bits in (8, 16, 32, 64))
F16, F32, VOID = ir.HalfType(), ir.FloatType(), ir.VoidType()
BYTES = ir.VectorType(I8, 4 * LANES)
SHORTS = ir.VectorType(I16, 2 * LANES)
INTS = ir.VectorType(I32, LANES)
FLOATS = ir.VectorType(F32, LANES)


def vector(element: Any, count: int) -> Any:
    """Return the type of `count` elements."""
    return ir.VectorType(element, count)


def constant(kind: Any, values: Iterable[int]) -> Value:
    """Return a vector constant with a value for each lane."""
    return ir.Constant(kind, list(values))


def filled(kind: Any, value: float) -> Value:
    """Return a vector constant with the same value in each lane."""
    return ir.Constant(kind, [value] * kind.count)


def offset(b: Builder, address: Value, distance: int) -> Value:
    """Return an address `distance` bytes further on."""
    return b.add(address, ir.Constant(I64, distance))


def call(b: Builder, name: str, result: Any, *arguments: Value) -> Value:
    """Call an LLVM intrinsic."""
    kind = ir.FunctionType(result, [argument.type for argument in arguments])
    return b.call(cgutils.get_or_insert_function(b.module, kind, name), arguments)


def load(b: Builder, kind: Any, address: Value, align: int = 1) -> Value:
    """Read a value; unaligned by default, which costs nothing where the address is aligned."""
    return b.load(b.inttoptr(address, kind.as_pointer()), align=align)


def store(b: Builder, value: Value, address: Value, align: int = 1) -> None:
    """Write a value."""
    b.store(value, b.inttoptr(address, value.type.as_pointer()), align=align)


def undefined(kind: Any) -> Value:
    """Return a value of which nothing is read."""
    return ir.Constant(kind, ir.Undefined)


def splat(b: Builder, scalar: Value, count: int = LANES) -> Value:
    """Put a scalar in each lane."""
    kind = vector(scalar.type, count)
    first = b.insert_element(undefined(kind), scalar, ir.Constant(I32, 0))
    return b.shuffle_vector(first, undefined(kind), filled(vector(I32, count), 0))


def part(b: Builder, value: Value, index: int, count: int) -> Value:
    """Return lanes index * count ... (index + 1) * count - 1."""
    if count == value.type.count:
        return value
    lanes = range(index * count, (index + 1) * count)
    return b.shuffle_vector(value, undefined(value.type), constant(vector(I32, count), lanes))


def join(b: Builder, parts: list[Value]) -> Value:
    """Concatenate a power of two of equal vectors."""
    while len(parts) > 1:
        lanes = constant(vector(I32, 2 * parts[0].type.count), range(2 * parts[0].type.count))
        pairs = zip(parts[::2], parts[1::2], strict=True)
        parts = [b.shuffle_vector(low, high, lanes) for low, high in pairs]
    return parts[0]


def fold(b: Builder, value: Value, operation: Any) -> Value:
    """Combine all lanes: the lower half with the upper half, until one is left."""
    count = value.type.count
    while count > 1:
        count //= 2
        value = operation(part(b, value, 0, count), part(b, value, 1, count))
    return b.extract_element(value, ir.Constant(I32, 0))


def multiply_add(b: Builder, x: Value, y: Value, z: Value) -> Value:
    """Return x * y + z, fused where the machine can; llvm.fma would call a library elsewhere."""
    return call(b, "llvm.fmuladd.v16f32", FLOATS, x, y, z)


def halves_to_floats(b: Builder, fast: bool, halves: Value) -> Value:
    """Convert sixteen halves, given as int16 bits, to float32; exact, infinities and NaN too."""
    if fast:
        return b.fpext(b.bitcast(halves, vector(F16, LANES)), FLOATS)
    # Without the instruction LLVM would call a library function that may be missing.
    bits = b.zext(halves, INTS)
    magnitude = b.shl(b.and_(bits, filled(INTS, 0x7FFF)), filled(INTS, 13))
    scaled = b.bitcast(b.fmul(b.bitcast(magnitude, FLOATS), filled(FLOATS, 2.0**112)), INTS)
    special = b.icmp_unsigned(">=", magnitude, filled(INTS, 0x7C00 << 13))
    scaled = b.select(special, b.or_(magnitude, filled(INTS, 0x7F800000)), scaled)
    sign = b.shl(b.and_(bits, filled(INTS, 0x8000)), filled(INTS, 16))
    return b.bitcast(b.or_(scaled, sign), FLOATS)
