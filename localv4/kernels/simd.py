"""Vector values and operations for kernels: what Python code needs to stay in vector registers.

A kernel holds `i32x16` and `f32x16` values in ordinary variables and calls the functions of this
module; each becomes one or a few machine instructions. Memory is named by integer addresses in
bytes, which may be unaligned; the owner of the memory must outlive the call.
Without the compiler (NUMBA_DISABLE_JIT=1) the module can be imported, but nothing here runs.
"""

import inspect
from collections.abc import Callable
from typing import Any, TypeAlias

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic, models, register_model

from localv4.kernels import simd_dots, simd_ir
from localv4.kernels.isa import ISA
from localv4.kernels.simd_ir import F32, FLOATS, I8, I16, I32, INTS, LANES, Builder, Value
from localv4.kernels.vectors import f32x16

Vector: TypeAlias = Any  # a value in vector registers

_ELEMENTS = {"i8": I8, "i32": I32}


class _Lanes(types.Type):
    def __init__(self, element: str, count: int) -> None:
        self.element, self.count = element, count
        super().__init__(name=f"{element}x{count}")


@register_model(_Lanes)
class _LanesModel(models.PrimitiveModel):
    def __init__(self, manager: Any, frontend_type: Any) -> None:
        kind = ir.VectorType(_ELEMENTS[frontend_type.element], frontend_type.count)
        super().__init__(manager, frontend_type, kind)


i8x64, i32x16 = _Lanes("i8", 64), _Lanes("i32", 16)
block = types.UniTuple(i8x64, simd_dots.VECTORS)
_address, _int, _float = types.int64, types.int32, types.float32


def operation(result: Any, *operands: Any) -> Callable[[Callable[..., Value]], Any]:
    """Turn an emitter of LLVM IR into a function of kernels, with the types that it names.

    The emitter takes the IR builder and one value for each operand. It returns the result: a
    value, a list of values where the result is a tuple, or None where it is void.
    """
    names = [f"operand{i}" for i in range(len(operands))]
    kind = inspect.Parameter.POSITIONAL_OR_KEYWORD
    parameters = [inspect.Parameter(name, kind) for name in ["typing_context", *names]]

    def wrap(emit: Callable[..., Value]) -> Any:
        def lower(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
            value = emit(builder, *arguments)
            if isinstance(value, list):
                return cgutils.pack_array(builder, value)
            return context.get_dummy_value() if value is None else value

        def define(*_: Any) -> Any:
            return result(*operands), lower

        define.__name__ = emit.__name__
        define.__doc__ = emit.__doc__
        define.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
        return intrinsic(define)

    return wrap


# --- memory ---


@operation(i32x16, _address)
def load_i32(b: Builder, address: Value) -> Value:
    """Read sixteen int32."""
    return simd_ir.load(b, INTS, address)


@operation(f32x16, _address)
def load_f32(b: Builder, address: Value) -> Value:
    """Read sixteen float32."""
    return simd_ir.load(b, FLOATS, address)


@operation(f32x16, _address)
def load_f16(b: Builder, address: Value) -> Value:
    """Read sixteen halves as float32."""
    return simd_dots.load_f16(b, ISA, address)


@operation(f32x16, _address)
def load_e8m0(b: Builder, address: Value) -> Value:
    """Read sixteen UE8M0 scales as float32; code 0 (2^-127) reads as 0, 255 as infinity."""
    return simd_dots.load_e8m0(b, address)


@operation(i32x16, _address)
def broadcast_i32(b: Builder, address: Value) -> Value:
    """Read one int32 into all lanes."""
    return simd_ir.splat(b, simd_ir.load(b, I32, address))


@operation(f32x16, _address)
def broadcast_f32(b: Builder, address: Value) -> Value:
    """Read one float32 into all lanes."""
    return simd_ir.splat(b, simd_ir.load(b, F32, address))


@operation(types.void, _address, f32x16)
def store_f32(b: Builder, address: Value, value: Value) -> None:
    """Write sixteen float32."""
    simd_ir.store(b, value, address)


@operation(types.void, _address, i32x16)
def store_i8(b: Builder, address: Value, value: Value) -> None:
    """Write the low bytes of sixteen int32."""
    simd_ir.store(b, b.trunc(value, simd_ir.vector(I8, LANES)), address)


@operation(types.uint8, _address)
def read_u8(b: Builder, address: Value) -> Value:
    """Read one byte."""
    return simd_ir.load(b, I8, address)


@operation(types.uint16, _address)
def read_u16(b: Builder, address: Value) -> Value:
    """Read two bytes, low byte first."""
    return simd_ir.load(b, I16, address)


@operation(types.uint32, _address)
def read_u32(b: Builder, address: Value) -> Value:
    """Read four bytes, low byte first."""
    return simd_ir.load(b, I32, address)


@operation(types.void, _address, types.uint8)
def write_u8(b: Builder, address: Value, value: Value) -> None:
    """Write one byte."""
    simd_ir.store(b, value, address)


@operation(types.void, _address, types.uint16)
def write_u16(b: Builder, address: Value, value: Value) -> None:
    """Write two bytes, low byte first."""
    simd_ir.store(b, value, address)


@operation(types.void, _address, types.uint32)
def write_u32(b: Builder, address: Value, value: Value) -> None:
    """Write four bytes, low byte first."""
    simd_ir.store(b, value, address)


@operation(types.void, _address, _int)
def write_i32(b: Builder, address: Value, value: Value) -> None:
    """Write an int32."""
    simd_ir.store(b, value, address)


@operation(types.void, _address, _float)
def write_f32(b: Builder, address: Value, value: Value) -> None:
    """Write a float32."""
    simd_ir.store(b, value, address)


@operation(types.void, _address)
def prefetch(b: Builder, address: Value) -> None:
    """Ask for a cache line to be read soon; any address is harmless."""
    simd_dots.prefetch(b, address)


# --- arithmetic ---


@operation(f32x16)
def zeros_f32(b: Builder) -> Value:
    """Return sixteen 0.0."""
    return simd_ir.filled(FLOATS, 0.0)


@operation(i32x16)
def zeros_i32(b: Builder) -> Value:
    """Return sixteen 0."""
    return simd_ir.filled(INTS, 0)


@operation(f32x16, _float)
def splat_f32(b: Builder, value: Value) -> Value:
    """Put one float32 in all lanes."""
    return simd_ir.splat(b, value)


@operation(i32x16, i32x16, i32x16)
def add_i32(b: Builder, x: Value, y: Value) -> Value:
    """x + y"""
    return b.add(x, y)


@operation(f32x16, f32x16, f32x16)
def add(b: Builder, x: Value, y: Value) -> Value:
    """x + y"""
    return b.fadd(x, y)


@operation(f32x16, f32x16, f32x16)
def multiply(b: Builder, x: Value, y: Value) -> Value:
    """x * y"""
    return b.fmul(x, y)


@operation(f32x16, f32x16, f32x16)
def divide(b: Builder, x: Value, y: Value) -> Value:
    """x / y"""
    return b.fdiv(x, y)


@operation(f32x16, f32x16, f32x16, f32x16)
def multiply_add(b: Builder, x: Value, y: Value, z: Value) -> Value:
    """x * y + z, rounded once where the machine can"""
    return simd_ir.multiply_add(b, x, y, z)


@operation(f32x16, f32x16)
def negative(b: Builder, x: Value) -> Value:
    """-x"""
    return b.fneg(x)


@operation(f32x16, f32x16, f32x16)
def at_most(b: Builder, x: Value, bound: Value) -> Value:
    """min(x, bound); NaN stays NaN"""
    return b.select(b.fcmp_ordered("<", bound, x), bound, x)


@operation(f32x16, f32x16, f32x16)
def at_least(b: Builder, x: Value, bound: Value) -> Value:
    """max(x, bound); NaN stays NaN"""
    return b.select(b.fcmp_ordered(">", bound, x), bound, x)


@operation(f32x16, i32x16)
def to_f32(b: Builder, x: Value) -> Value:
    """Convert int32 to float32."""
    return b.sitofp(x, FLOATS)


@operation(i32x16, f32x16)
def round_i32(b: Builder, x: Value) -> Value:
    """Round to the nearest int32, ties to even; NaN becomes 0, too large ones the largest."""
    rounded = simd_ir.call(b, "llvm.rint.v16f32", FLOATS, x)
    return simd_ir.call(b, "llvm.fptosi.sat.v16i32.v16f32", INTS, rounded)


@operation(f32x16, i32x16)
def power_of_two(b: Builder, exponent: Value) -> Value:
    """2^exponent for exponents -126 ... 127"""
    biased = b.add(exponent, simd_ir.filled(INTS, 127))
    return b.bitcast(b.shl(biased, simd_ir.filled(INTS, 23)), FLOATS)


@operation(_float, f32x16)
def sum_f32(b: Builder, x: Value) -> Value:
    """Add all lanes, the lower half to the upper half first."""
    return simd_ir.fold(b, x, b.fadd)


@operation(_int, i32x16)
def sum_i32(b: Builder, x: Value) -> Value:
    """Add all lanes."""
    return simd_ir.fold(b, x, b.add)


@operation(_float, f32x16)
def largest_size(b: Builder, x: Value) -> Value:
    """Return the largest absolute value; NaN if there is one."""
    # As integers the sizes have the order of the floats, with NaN above infinity.
    sizes = b.and_(b.bitcast(x, INTS), simd_ir.filled(INTS, 0x7FFFFFFF))
    largest = simd_ir.fold(
        b, sizes, lambda low, high: b.select(b.icmp_unsigned(">", low, high), low, high)
    )
    return b.bitcast(largest, F32)


# --- packed weights ---


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


@operation(f32x16, f32x16, _address, _address)
def add_f8_dots(b: Builder, acc: Value, address: Value, x: Value) -> Value:
    """acc + 2^-8 * products of four columns of E4M3 codes with four float32 at address x"""
    return simd_dots.add_f8_dots(b, ISA, acc, address, x)
