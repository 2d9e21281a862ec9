"""Sixteen numbers of a row in fewer bytes: bfloat16, FP8 (E4M3) and FP4 (E2M1), there and back.

Codes are made of numbers that are scaled already, rounded to the nearest, ties to even. They are
read as halves, without their scale: a code that is shifted to its place in a half is its value
times a power of two, exactly, subnormals included.

*Words* are 32 numbers as bfloat16 in one vector: the operands of tiles (`kernels.attend_tiles`).
"""

from llvmlite import ir
from numba import types

from localv4.kernels import simd_ir
from localv4.kernels.isa import ISA
from localv4.kernels.simd import i32x16, operation
from localv4.kernels.simd_ir import (
    FLOATS,
    I8,
    I16,
    INTS,
    LANES,
    SHORTS,
    Builder,
    Value,
    filled,
    vector,
)
from localv4.kernels.vectors import f32x16

E4M3_UNIT = 8
"""Codes of E4M3 are read as their value times 2^-8."""

SMALLEST_WORD_SCALE = 127 + E4M3_UNIT - 120
"""The scale with which a code of E4M3 that is shifted to its place in a bfloat16 needs no other."""

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
    bits = b.lshr(_rounded(b, value), filled(INTS, 16))
    simd_ir.store(b, b.trunc(bits, _SHORTS), address)


@operation(i32x16, f32x16, f32x16)
def rounded_words(b: Builder, low: Value, high: Value) -> Value:
    """Return words of 32 numbers, rounded; NaN stays one."""
    return _upper_halves(b, _rounded(b, low), _rounded(b, high))


@operation(i32x16, f32x16, f32x16)
def exact_words(b: Builder, low: Value, high: Value) -> Value:
    """Return words of 32 numbers that bfloat16 holds as they are."""
    return _upper_halves(b, low, high)


@operation(i32x16, f32x16, f32x16)
def paired_words(b: Builder, first: Value, second: Value) -> Value:
    """Return words of both vectors in turn, rounded: lane by lane the first's and the second's."""
    return pair_words(b, first, second)


def pair_words(b: Builder, first: Value, second: Value) -> Value:
    """Emit `paired_words`."""
    low = b.lshr(_rounded(b, first), filled(INTS, 16))
    return b.or_(low, b.and_(_rounded(b, second), filled(INTS, 0xFFFF0000)))


@operation(i32x16, f32x16)
def e4m3_codes(b: Builder, value: Value) -> Value:
    """Round numbers of at most 448 to codes of E4M3."""
    return _codes(b, value, mantissa=3, bias=7, sign=7)


@operation(f32x16, _address)
def load_e4m3(b: Builder, address: Value) -> Value:
    """Read sixteen codes of E4M3 as float32, times 2^-E4M3_UNIT."""
    shifted = b.shl(b.sext(simd_ir.load(b, _BYTES, address), _SHORTS), filled(_SHORTS, 7))
    return simd_ir.halves_to_floats(b, ISA.fast_half, b.and_(shifted, filled(_SHORTS, 0xBFFF)))


@operation(i32x16, _address, types.int64)
def e4m3_words(b: Builder, address: Value, scale: Value) -> Value:
    """Return words of 32 codes of E4M3, times 2^(scale - 127 - E4M3_UNIT).

    scale: SMALLEST_WORD_SCALE ... 254. Subnormal codes become zero: they are below 2^-14 of the
    largest code.
    """
    codes = b.sext(simd_ir.load(b, vector(I8, 2 * LANES), address), SHORTS)
    bits = b.and_(b.shl(codes, filled(SHORTS, 4)), filled(SHORTS, 0x87F0))
    is_normal = b.icmp_signed("!=", b.and_(bits, filled(SHORTS, 0x0780)), filled(SHORTS, 0))
    raised = b.shl(
        b.sub(b.trunc(scale, I16), ir.Constant(I16, SMALLEST_WORD_SCALE)), ir.Constant(I16, 7)
    )
    scaled = b.add(bits, simd_ir.splat(b, raised, 2 * LANES))
    return b.bitcast(b.select(is_normal, scaled, filled(SHORTS, 0)), INTS)


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


def _rounded(b: Builder, value: Value) -> Value:
    """Return bits whose upper halves are sixteen numbers as bfloat16; NaN stays one."""
    bits = _raise_half(b, b.bitcast(value, INTS), 16)
    is_nan = b.fcmp_unordered("uno", value, value)
    return b.select(is_nan, filled(INTS, 0x7FC00000), bits)


def _upper_halves(b: Builder, low: Value, high: Value) -> Value:
    """Return the upper halves of two times sixteen lanes, in order."""
    upper = simd_ir.constant(vector(simd_ir.I32, 2 * LANES), range(1, 4 * LANES, 2))
    parts = [b.bitcast(value, SHORTS) for value in (low, high)]
    return b.bitcast(b.shuffle_vector(*parts, upper), INTS)


def _round_bits(b: Builder, bits: Value, dropped: int) -> Value:
    """Return the bits of floats without the lowest `dropped` ones, rounded to the nearest even."""
    return b.lshr(_raise_half(b, bits, dropped), filled(INTS, dropped))


def _raise_half(b: Builder, bits: Value, dropped: int) -> Value:
    """Return bits that are the nearest without the lowest `dropped` ones, of two the even one."""
    odd = b.and_(b.lshr(bits, filled(INTS, dropped)), filled(INTS, 1))
    half = filled(INTS, (1 << (dropped - 1)) - 1)
    return b.add(b.add(bits, half), odd)


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
