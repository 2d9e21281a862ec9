"""Vector operations of the searches, beside those of `kernels.simd`."""

from collections.abc import Sequence
from itertools import pairwise

from localv4.kernels import simd_ir
from localv4.kernels.quants import IQ4_LEVELS
from localv4.kernels.simd import operation
from localv4.kernels.simd_ir import FLOATS, INTS, Builder, Value, filled
from localv4.kernels.vectors import f32x16

LINE = 64
"""Bytes of one vector."""

E2M1_LEVELS = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)

_LARGEST_HALF = 65504.0
_LEAST_NORMAL_HALF = 2.0**-14


@operation(f32x16, f32x16, f32x16)
def subtract(b: Builder, x: Value, y: Value) -> Value:
    """x - y"""
    return b.fsub(x, y)


@operation(f32x16, f32x16)
def magnitude(b: Builder, x: Value) -> Value:
    """|x|"""
    return _magnitude(b, x)


@operation(f32x16, f32x16)
def rounded(b: Builder, x: Value) -> Value:
    """Round to the nearest whole number, ties to even."""
    return simd_ir.call(b, "llvm.rint.v16f32", FLOATS, x)


@operation(f32x16, f32x16, f32x16, f32x16, f32x16)
def where_less(b: Builder, x: Value, y: Value, first: Value, second: Value) -> Value:
    """Return first where x < y, else second."""
    return b.select(b.fcmp_ordered("<", x, y), first, second)


@operation(f32x16, f32x16)
def nearest_half(b: Builder, x: Value) -> Value:
    """Round to what an IEEE half holds, ties to even; only 0 becomes 0, and 65504 is the largest.

    A scale that became 0 would wipe out a block of small values; with the smallest half in its
    place the search can still choose.
    """
    bits = b.bitcast(x, INTS)
    odd = b.and_(b.lshr(bits, filled(INTS, 13)), filled(INTS, 1))
    raised = b.add(b.add(bits, filled(INTS, 0xFFF)), odd)
    normal = _magnitude(b, b.bitcast(b.and_(raised, filled(INTS, -0x2000)), FLOATS))
    size = _magnitude(b, x)
    grains = simd_ir.call(b, "llvm.rint.v16f32", FLOATS, b.fmul(size, filled(FLOATS, 2.0**24)))
    one, zero = filled(FLOATS, 1.0), filled(FLOATS, 0.0)
    grains = b.select(b.fcmp_ordered("<", grains, one), one, grains)
    small = b.fmul(grains, filled(FLOATS, 2.0**-24))
    half = b.select(b.fcmp_ordered("<", size, filled(FLOATS, _LEAST_NORMAL_HALF)), small, normal)
    largest = filled(FLOATS, _LARGEST_HALF)
    half = b.select(b.fcmp_ordered("<", half, largest), half, largest)
    half = b.select(b.fcmp_ordered("<", x, zero), b.fneg(half), half)
    return b.select(b.fcmp_ordered(">", size, zero), half, zero)


@operation(f32x16, f32x16)
def inverse(b: Builder, x: Value) -> Value:
    """1 / x, and 0 for what has no finite inverse."""
    tiny = b.fcmp_ordered("<", _magnitude(b, x), filled(FLOATS, 2.0**-126))
    return b.select(tiny, filled(FLOATS, 0.0), b.fdiv(filled(FLOATS, 1.0), x))


@operation(f32x16, f32x16)
def iq4_level(b: Builder, x: Value) -> Value:
    """Return the nearest of the sixteen levels of IQ4_NL and IQ4_XS."""
    value = filled(FLOATS, float(IQ4_LEVELS[0]))
    for bound, level in zip(_bounds(IQ4_LEVELS), IQ4_LEVELS[1:], strict=True):
        beyond = b.fcmp_ordered(">", x, filled(FLOATS, bound))
        value = b.select(beyond, filled(FLOATS, float(level)), value)
    return value


@operation(f32x16, f32x16)
def e2m1_code(b: Builder, x: Value) -> Value:
    """Return the number 0 ... 7 of the nearest magnitude of E2M1, with the sign of x."""
    code = filled(FLOATS, 0.0)
    for number, bound in enumerate(_bounds(E2M1_LEVELS), 1):
        code = _beyond(b, x, bound, float(number), code)
    return _signed_as(b, x, code)


@operation(f32x16, f32x16)
def e2m1_level(b: Builder, x: Value) -> Value:
    """Return the nearest value of E2M1."""
    level = filled(FLOATS, 0.0)
    for bound, value in zip(_bounds(E2M1_LEVELS), E2M1_LEVELS[1:], strict=True):
        level = _beyond(b, x, bound, value, level)
    return _signed_as(b, x, level)


@operation(f32x16, f32x16)
def power_below(b: Builder, x: Value) -> Value:
    """Return the largest power of two that is no more than |x|; 0 for subnormal numbers."""
    return b.bitcast(b.and_(b.bitcast(x, INTS), filled(INTS, 0x7F800000)), FLOATS)


def _magnitude(b: Builder, x: Value) -> Value:
    return simd_ir.call(b, "llvm.fabs.v16f32", FLOATS, x)


def _bounds(levels: Sequence[float]) -> list[float]:
    """Return the middles between levels."""
    return [(low + high) / 2 for low, high in pairwise(levels)]


def _beyond(b: Builder, x: Value, bound: float, number: float, otherwise: Value) -> Value:
    """Return a number where |x| is beyond a bound."""
    beyond = b.fcmp_ordered(">", _magnitude(b, x), filled(FLOATS, bound))
    return b.select(beyond, filled(FLOATS, number), otherwise)


def _signed_as(b: Builder, x: Value, size: Value) -> Value:
    """Return a size with the sign of x."""
    return b.select(b.fcmp_ordered("<", x, filled(FLOATS, 0.0)), b.fneg(size), size)
