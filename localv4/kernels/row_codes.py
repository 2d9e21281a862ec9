"""Sixteen numbers of a row in fewer bytes: bfloat16, FP8 (E4M3) and FP4 (E2M1), there and back.

Codes are made of numbers that are scaled already, rounded to the nearest, ties to even. They are
read as halves, without their scale: a code that is shifted to its place in a half is its value
times a power of two, exactly, subnormals included.
"""

from llvmlite import ir
from numba import types

from localv4.kernels import simd_ir
from localv4.kernels.isa import ISA
from localv4.kernels.simd import i32x16, operation
from localv4.kernels.simd_ir import FLOATS, I8, I16, INTS, LANES, Builder, Value, filled
from localv4.kernels.vectors import f32x16

E4M3_UNIT = 8
"""Codes of E4M3 are read as their value times 2^-8."""

E2M1_UNIT = 14
"""Codes of E2M1 are read as their value times 2^-14."""

_BYTES, _SHORTS = simd_ir.vector(I8, LANES), simd_ir.vector(I16, LANES)
_address = types.int64


@operation(f32x16, _address)
def load_bf16(b: Builder, address: Value) -> Value:
    """Read sixteen bfloat16 as float32."""
    words = b.zext(simd_ir.load(b, _SHORTS, address), INTS)
    return b.bitcast(b.shl(words, filled(INTS, 16)), FLOATS)


@operation(types.void, _address, f32x16)
def store_bf16(b: Builder, address: Value, value: Value) -> None:
    """Round to bfloat16 and write; NaN stays one."""
    bits = _round_bits(b, b.bitcast(value, INTS), 16)
    is_nan = b.fcmp_unordered("uno", value, value)
    bits = b.select(is_nan, filled(INTS, 0x7FC0), bits)
    simd_ir.store(b, b.trunc(bits, _SHORTS), address)


@operation(i32x16, f32x16)
def e4m3_codes(b: Builder, value: Value) -> Value:
    """Round numbers of at most 448 to codes of E4M3."""
    return _codes(b, value, mantissa=3, bias=7, sign=7)


@operation(f32x16, _address)
def load_e4m3(b: Builder, address: Value) -> Value:
    """Read sixteen codes of E4M3 as float32, times 2^-E4M3_UNIT."""
    shifted = b.shl(b.sext(simd_ir.load(b, _BYTES, address), _SHORTS), filled(_SHORTS, 7))
    return simd_ir.halves_to_floats(b, ISA.fast_half, b.and_(shifted, filled(_SHORTS, 0xBFFF)))


@operation(types.void, _address, f32x16, f32x16)
def store_e2m1(b: Builder, address: Value, low: Value, high: Value) -> None:
    """Round 32 numbers of at most 6 to codes of E2M1 and write 16 bytes: `low` in low nibbles."""
    first, second = (_codes(b, value, mantissa=1, bias=1, sign=3) for value in (low, high))
    pairs = b.or_(first, b.shl(second, filled(INTS, 4)))
    simd_ir.store(b, b.trunc(pairs, _BYTES), address)


@operation(f32x16, _address, types.int64)
def load_e2m1(b: Builder, address: Value, shift: Value) -> Value:
    """Read the codes of E2M1 at bit `shift` (0 or 4) of 16 bytes, times 2^-E2M1_UNIT."""
    pairs = b.zext(simd_ir.load(b, _BYTES, address), _SHORTS)
    codes = b.lshr(pairs, simd_ir.splat(b, b.trunc(shift, I16)))
    size = b.shl(b.and_(codes, filled(_SHORTS, 7)), filled(_SHORTS, 9))
    sign = b.shl(b.and_(codes, filled(_SHORTS, 8)), filled(_SHORTS, 12))
    return simd_ir.halves_to_floats(b, ISA.fast_half, b.or_(size, sign))


@operation(f32x16, types.int64)
def splat_power(b: Builder, exponent: Value) -> Value:
    """2^(exponent - 127) in all lanes, for 0 < exponent < 255; infinity for 255."""
    bits = b.shl(b.trunc(exponent, simd_ir.I32), ir.Constant(simd_ir.I32, 23))
    return simd_ir.splat(b, b.bitcast(bits, simd_ir.F32))


def _round_bits(b: Builder, bits: Value, dropped: int) -> Value:
    """Return the bits of floats without the lowest `dropped` ones, rounded to the nearest even."""
    odd = b.and_(b.lshr(bits, filled(INTS, dropped)), filled(INTS, 1))
    half = filled(INTS, (1 << (dropped - 1)) - 1)
    return b.lshr(b.add(b.add(bits, half), odd), filled(INTS, dropped))


def _codes(b: Builder, value: Value, mantissa: int, bias: int, sign: int) -> Value:
    """Return the codes of a small float with `sign` bits below its sign."""
    bits = b.bitcast(value, INTS)
    size = b.and_(bits, filled(INTS, 0x7FFFFFFF))
    normal = b.sub(_round_bits(b, size, 23 - mantissa), filled(INTS, (127 - bias) << mantissa))
    # below the smallest normal number codes are whole multiples of the smallest one
    steps = b.fmul(b.bitcast(size, FLOATS), filled(FLOATS, 2.0 ** (bias - 1 + mantissa)))
    limit = filled(FLOATS, 2.0**mantissa)
    is_small = b.fcmp_ordered("<", steps, limit)
    steps = b.select(is_small, steps, filled(FLOATS, 0.0))
    small = b.fptosi(simd_ir.call(b, "llvm.rint.v16f32", FLOATS, steps), INTS)
    code = b.and_(b.select(is_small, small, normal), filled(INTS, (1 << sign) - 1))
    negative = b.lshr(bits, filled(INTS, 31))
    return b.or_(code, b.shl(negative, filled(INTS, sign)))
