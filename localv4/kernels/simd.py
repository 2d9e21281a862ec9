"""Vector values and operations for kernels: what Python code needs to stay in vector registers.

A kernel holds `i32x16` and `f32x16` values in ordinary variables and calls the functions of this
module; each becomes one or a few machine instructions. Memory is named by integer addresses in
bytes, which may be unaligned; the owner of the memory must outlive the call.
Without the compiler (NUMBA_DISABLE_JIT=1) the module can be imported, but nothing here runs.
"""

import inspect
import math
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
def store_i32(b: Builder, address: Value, value: Value) -> None:
    """Write sixteen int32."""
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


@operation(_address, _address)
def read_i64(b: Builder, address: Value) -> Value:
    """Read an int64."""
    return simd_ir.load(b, simd_ir.I64, address)


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


@operation(types.void, _address, _address)
def write_i64(b: Builder, address: Value, value: Value) -> None:
    """Write an int64."""
    simd_ir.store(b, value, address)


@operation(types.void, _address, _float)
def write_f32(b: Builder, address: Value, value: Value) -> None:
    """Write a float32."""
    simd_ir.store(b, value, address)


@operation(types.void, _address)
def prefetch(b: Builder, address: Value) -> None:
    """Ask for a cache line to be in the first cache soon; any address is harmless."""
    simd_dots.prefetch(b, address, 3)


@operation(types.void, _address)
def prefetch_far(b: Builder, address: Value) -> None:
    """Ask for a cache line to be in the second cache soon; any address is harmless."""
    simd_dots.prefetch(b, address, 2)


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


@operation(i32x16, _int)
def splat_i32(b: Builder, value: Value) -> Value:
    """Put one int32 in all lanes."""
    return simd_ir.splat(b, value)


@operation(i32x16, i32x16, i32x16)
def add_i32(b: Builder, x: Value, y: Value) -> Value:
    """x + y"""
    return b.add(x, y)


@operation(i32x16, i32x16, i32x16)
def largest_i32(b: Builder, x: Value, y: Value) -> Value:
    """max(x, y)"""
    return b.select(b.icmp_signed(">", x, y), x, y)


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
    """Round to the nearest int32, ties to even; beyond +-2^30 that number, and 2^30 for NaN."""
    rounded = simd_ir.call(b, "llvm.rint.v16f32", FLOATS, x)
    # The conversion is undefined for what int32 cannot hold. Written as comparisons, each bound is
    # one instruction; LLVM's saturating conversion becomes scalar code.
    high, low = simd_ir.filled(FLOATS, 2.0**30), simd_ir.filled(FLOATS, -(2.0**30))
    rounded = b.select(b.fcmp_ordered("<", rounded, high), rounded, high)
    rounded = b.select(b.fcmp_ordered(">", rounded, low), rounded, low)
    return b.fptosi(rounded, INTS)


@operation(f32x16, i32x16)
def power_of_two(b: Builder, exponent: Value) -> Value:
    """2^exponent for exponents -126 ... 127"""
    biased = b.add(exponent, simd_ir.filled(INTS, 127))
    return b.bitcast(b.shl(biased, simd_ir.filled(INTS, 23)), FLOATS)


@operation(_float, _float)
def power_of_two_above(b: Builder, x: Value) -> Value:
    """Return the least power of two that is not less than x > 0; infinity and NaN as they are."""
    bits = b.add(b.bitcast(x, I32), ir.Constant(I32, 0x7FFFFF))
    above = b.bitcast(b.and_(bits, ir.Constant(I32, 0xFF800000)), F32)
    return b.select(b.fcmp_ordered("<", x, ir.Constant(F32, math.inf)), above, x)


@operation(_float, f32x16)
def sum_f32(b: Builder, x: Value) -> Value:
    """Add all lanes, the lower half to the upper half first."""
    return simd_ir.fold(b, x, b.fadd)


@operation(_int, i32x16)
def sum_i32(b: Builder, x: Value) -> Value:
    """Add all lanes."""
    return simd_ir.fold(b, x, b.add)


@operation(_int, i32x16)
def highest_i32(b: Builder, x: Value) -> Value:
    """Return the largest lane."""
    return simd_ir.fold(b, x, lambda low, high: b.select(b.icmp_signed(">", low, high), low, high))


@operation(_float, f32x16)
def highest_f32(b: Builder, x: Value) -> Value:
    """Return the largest lane; of no use if one is NaN."""
    return simd_ir.fold(b, x, lambda low, high: b.select(b.fcmp_ordered(">", low, high), low, high))


@operation(i32x16, f32x16)
def magnitudes(b: Builder, x: Value) -> Value:
    """Return the bits of the absolute values: they have the order of the floats, NaN on top."""
    return b.and_(b.bitcast(x, INTS), simd_ir.filled(INTS, 0x7FFFFFFF))


@operation(_float, i32x16)
def largest_magnitude(b: Builder, bits: Value) -> Value:
    """Return the largest of sixteen absolute values, given as bits; NaN if there is one."""
    largest = simd_ir.fold(
        b, bits, lambda low, high: b.select(b.icmp_signed(">", low, high), low, high)
    )
    return b.bitcast(largest, F32)
