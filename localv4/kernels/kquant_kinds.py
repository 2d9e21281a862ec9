"""From codes, scales and activations to whole numbers: the kinds of blocks with integer scales.

A block is 32 columns of sixteen rows in one or two parts. The codes of a part are multiplied with
activations and added up; then a kind makes whole numbers of these sums which, times the scale of
the activations, are to be added up over a superblock: at most 2^24, exact as float32. All codes are
unsigned and below 128, so both kinds of byte product take them as they are; what a code means
beside its size is put right with the sum of the activations.
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass

from llvmlite import ir

from localv4.kernels.isa import Isa
from localv4.kernels.simd_dots import CHAINS, VECTORS, add_dot
from localv4.kernels.simd_ir import (
    I16,
    I32,
    INTS,
    LANES,
    SHORTS,
    Builder,
    Value,
    call,
    filled,
    join,
    load,
    offset,
    part,
    splat,
    vector,
)

LOW_SUM, HIGH_SUM = 8, 12
"""Where the buffer b of `kernels.activations` has the sums of columns 0 ... 15 and 16 ... 31."""

_LEVELS = 127  # of an activation


@dataclass(frozen=True)
class Kind(ABC):
    """Blocks of `parts` parts, whose codes are at most `largest` and stand for code - middle.

    `numbers` is how many whole numbers a block gives for each row: the sum of scale * weight and,
    where there are two, the sum of least values. `factors` is how many vectors of scales and least
    values it has.
    """

    parts: int
    largest: int
    middle: int = 0
    numbers: int = 1
    factors: int = 2

    @property
    def part_lines(self) -> int:
        """Vectors of codes of a part."""
        return VECTORS // self.parts

    def totals(self, b: Builder, sums: Value) -> list[Value]:
        """Return the sums of the activations of each part, from their entry of the buffer b."""
        low, high = (load(b, I32, offset(b, sums, at)) for at in (LOW_SUM, HIGH_SUM))
        return [low, high] if self.parts == 2 else [b.add(low, high)]

    def starts(self, b: Builder, totals: list[Value]) -> list[Value]:
        """Return what the sums of products of each part start from."""
        if self.middle == 0:
            return [filled(INTS, 0)] * self.parts
        return [splat(b, b.mul(total, ir.Constant(I32, -self.middle))) for total in totals]

    @abstractmethod
    def whole(
        self, b: Builder, isa: Isa, dots: list[Value], factors: list[Value], totals: list[Value]
    ) -> list[Value]:
        """Return the whole numbers of a block from the sums of products of its parts."""


class Scaled(Kind):
    """Each part has a scale."""

    def whole(
        self, b: Builder, isa: Isa, dots: list[Value], factors: list[Value], totals: list[Value]
    ) -> list[Value]:
        """Return sum of scale * sum."""
        scaled = [b.mul(dot, scale) for dot, scale in zip(dots, factors, strict=True)]
        return [b.add(*scaled) if len(scaled) == 2 else scaled[0]]


class ScaledWithLeast(Kind):
    """One part with a scale and a least value."""

    def whole(
        self, b: Builder, isa: Isa, dots: list[Value], factors: list[Value], totals: list[Value]
    ) -> list[Value]:
        """Return scale * sum, and least * total."""
        least = small_product(b, isa, factors[1], splat(b, totals[0]))
        return [b.mul(dots[0], factors[0]), least]


class Pairs(Kind):
    """Two parts with scales and least values: both of a kind in the halves of an int32.

    A sum of products fits 16 bits.
    """

    def whole(
        self, b: Builder, isa: Isa, dots: list[Value], factors: list[Value], totals: list[Value]
    ) -> list[Value]:
        """Return sum of scale * sum, and of least * total."""
        if isa.family == "x86":
            scaled = pair_product(b, isa, halves(b, *dots), factors[0])
            return [scaled, pair_product(b, isa, splat(b, halves(b, *totals)), factors[1])]
        wide = [splat(b, total) for total in totals]
        return [
            b.add(*(b.mul(x, y) for x, y in zip(values, _split(b, pair), strict=True)))
            for values, pair in ((dots, factors[0]), (wide, factors[1]))
        ]


def _split(b: Builder, pair: Value) -> list[Value]:
    return [b.and_(pair, filled(INTS, 0xFFFF)), b.lshr(pair, filled(INTS, 16))]


# --- integer arithmetic ---


def add_dots(
    b: Builder,
    isa: Isa,
    acc: Value,
    codes: list[Value],
    columns: list[Value],
    largest: int,
    chains: int = CHAINS,
) -> Value:
    """Add the products of vectors of codes, none above `largest`, with activations to acc.

    More than four are added up in so many chains of instructions that wait for each other.
    """
    if isa.level == "avx2":
        return _add_short_dots(b, acc, codes, columns, largest)
    sums = [acc] + [filled(INTS, 0)] * (chains - 1 if len(codes) > 4 else 0)
    for i, (code, column) in enumerate(zip(codes, columns, strict=True)):
        sums[i % len(sums)] = add_dot(b, isa, sums[i % len(sums)], code, column)
    for other in sums[1:]:
        sums[0] = b.add(sums[0], other)
    return sums[0]


def _add_short_dots(
    b: Builder, acc: Value, codes: list[Value], columns: list[Value], largest: int
) -> Value:
    """AVX2: add up in 16 bits as many products of two as fit, then widen."""
    at_once, results = 32767 // (2 * largest * _LEVELS), []
    shorts, name = vector(I16, 16), "llvm.x86.avx2.pmadd.ub.sw"
    ones = filled(shorts, 1)
    for i in range(2):
        result = part(b, acc, i, 8)
        for first in range(0, len(codes), at_once):
            pairs = [
                call(b, name, shorts, part(b, code, i, 32), part(b, column, i, 32))
                for code, column in zip(
                    codes[first : first + at_once], columns[first : first + at_once], strict=True
                )
            ]
            total = pairs[0]
            for pair in pairs[1:]:
                total = b.add(total, pair)
            wide = call(b, "llvm.x86.avx2.pmadd.wd", vector(I32, 8), total, ones)
            result = b.add(result, wide)
        results.append(result)
    return join(b, results)


def halves(b: Builder, low: Value, high: Value) -> Value:
    """Put the low 16 bits of two int32, or vectors of them, into one."""
    kind = low.type
    if kind is I32:
        mask, places = ir.Constant(I32, 0xFFFF), ir.Constant(I32, 16)
    else:
        mask, places = filled(kind, 0xFFFF), filled(kind, 16)
    return b.or_(b.and_(low, mask), b.shl(high, places))


def pair_product(b: Builder, isa: Isa, x: Value, y: Value) -> Value:
    """x86: add the two products of the int16 in each lane."""
    if isa.level == "avx512-vnni":
        operands = [b.bitcast(value, SHORTS) for value in (x, y)]
        return call(b, "llvm.x86.avx512.pmaddw.d.512", INTS, *operands)
    if isa.level == "generic":
        name, width = "llvm.x86.sse2.pmadd.wd", 4
    else:
        name, width = "llvm.x86.avx2.pmadd.wd", 8
    kind, parts = vector(I16, 2 * width), []
    for i in range(LANES // width):
        operands = [b.bitcast(part(b, value, i, width), kind) for value in (x, y)]
        parts.append(call(b, name, vector(I32, width), *operands))
    return join(b, parts)


def small_product(b: Builder, isa: Isa, x: Value, y: Value) -> Value:
    """x * y for 0 <= x < 2^15 and y that fits int16; a full product takes x86 twice as long."""
    return pair_product(b, isa, x, y) if isa.family == "x86" else b.mul(x, y)
