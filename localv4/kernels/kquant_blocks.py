"""Decoding and products of the formats of `kernels.packed_kquants`, as LLVM IR.

A block is 32 columns of sixteen rows. Its codes become eight vectors as in `kernels.simd_dots`:
byte 4 * lane + i of vector j is column 4 * j + i of row `lane`. All of them are unsigned bytes
below 128, so both kinds of byte product take them as they are; an offset of a format is put right
with the sum of the activations.

`products` of a block gives whole numbers which, times the scale of the activations, are to be
added up over a superblock: at most 2^24, exact as float32.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass

from llvmlite import ir

from localv4.kernels.isa import Isa
from localv4.kernels.kquant_lattice import MIDDLE, lattice_codes, lattice_scale
from localv4.kernels.readers import FAR_BYTES, NEAR_BYTES
from localv4.kernels.simd_dots import activations, add_dot, prefetch
from localv4.kernels.simd_ir import (
    BYTES,
    I8,
    I16,
    I32,
    I64,
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


class Block(ABC):
    """A decoded block."""

    @abstractmethod
    def products(self, b: Builder, isa: Isa, q: Value, sums: Value) -> list[Value]:
        """Multiply with 32 int8 at q, whose entry of the buffer b is at `sums`.

        Returns int32 for each row: sum of scale * weight, and that of least values if there are
        any.
        """


@dataclass
class WholeBlock(Block):
    """Eight vectors of codes with one scale and one least value."""

    codes: list[Value]
    scale: Value
    least: Value
    largest: int

    def products(self, b: Builder, isa: Isa, q: Value, sums: Value) -> list[Value]:
        """Return sum of scale * code, and of `least`."""
        dots = add_dots(b, isa, filled(INTS, 0), self.codes, activations(b, q), self.largest)
        low, high = (load(b, I32, offset(b, sums, at)) for at in (LOW_SUM, HIGH_SUM))
        total = splat(b, b.add(low, high))
        return [b.mul(dots, self.scale), small_product(b, isa, self.least, total)]


@dataclass
class PartsBlock(Block):
    """One or two parts of codes, a scale for each; a code stands for code - middle."""

    parts: list[list[Value]]
    scales: list[Value]
    middle: int
    largest: int

    def products(self, b: Builder, isa: Isa, q: Value, sums: Value) -> list[Value]:
        """Return sum of scale * (code - middle)."""
        columns, scaled = activations(b, q), []
        totals = [load(b, I32, offset(b, sums, at)) for at in (LOW_SUM, HIGH_SUM)]
        if len(self.parts) == 1:
            totals = [b.add(*totals)]
        for codes, scale, total in zip(self.parts, self.scales, totals, strict=True):
            start = splat(b, b.mul(total, ir.Constant(I32, -self.middle)))
            own, columns = columns[: len(codes)], columns[len(codes) :]
            dots = add_dots(b, isa, start, codes, own, self.largest)
            scaled.append(b.mul(dots, scale))
        return [b.add(*scaled) if len(scaled) == 2 else scaled[0]]


@dataclass
class PairBlock(Block):
    """Two parts of four vectors of codes; scales and least values of both in the halves of i32."""

    codes: list[Value]
    scales: Value
    least: Value
    largest: int

    def products(self, b: Builder, isa: Isa, q: Value, sums: Value) -> list[Value]:
        """Return sum of scale * code, and of least values."""
        columns, dots = activations(b, q), []
        for own in (slice(0, 4), slice(4, 8)):
            start = filled(INTS, 0)
            dots.append(add_dots(b, isa, start, self.codes[own], columns[own], self.largest))
        totals = [load(b, I32, offset(b, sums, at)) for at in (LOW_SUM, HIGH_SUM)]
        if isa.family == "x86":  # sums of sixteen products of two bits fit 16 bits
            pairs = pair_product(b, isa, halves(b, *dots), self.scales)
            return [pairs, pair_product(b, isa, splat(b, halves(b, *totals)), self.least)]
        scales, least = (self._split(b, value) for value in (self.scales, self.least))
        return [
            b.add(b.mul(dots[0], scales[0]), b.mul(dots[1], scales[1])),
            b.add(b.mul(splat(b, totals[0]), least[0]), b.mul(splat(b, totals[1]), least[1])),
        ]

    @staticmethod
    def _split(b: Builder, pair: Value) -> list[Value]:
        return [b.and_(pair, filled(INTS, 0xFFFF)), b.lshr(pair, filled(INTS, 16))]


# --- integer arithmetic ---


def add_dots(
    b: Builder, isa: Isa, acc: Value, codes: list[Value], columns: list[Value], largest: int
) -> Value:
    """Add the products of vectors of codes, none above `largest`, with activations to acc."""
    if isa.level == "avx2":
        return _add_short_dots(b, acc, codes, columns, largest)
    chains = [acc]
    if len(codes) > 4:  # two shorter chains of instructions that wait for each other
        chains.append(filled(INTS, 0))
    for i, (code, column) in enumerate(zip(codes, columns, strict=True)):
        at = i % len(chains)
        chains[at] = add_dot(b, isa, chains[at], code, column)
    return chains[0] if len(chains) == 1 else b.add(*chains)


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


def field(b: Builder, line: Value, shift: int, bits: int) -> Value:
    """Return some bits of each byte of a line."""
    return moved_field(b, line, shift, (1 << bits) - 1)


def moved_field(b: Builder, line: Value, shift: int, mask: int) -> Value:
    """Shift each byte to the right and keep the bits of a mask, at most 8 - shift of them."""
    if shift:
        line = b.bitcast(b.lshr(b.bitcast(line, SHORTS), filled(SHORTS, shift)), BYTES)
    return b.and_(line, filled(BYTES, mask))


def number(b: Builder, words: Value, shift: int, bits: int) -> Value:
    """Return some bits of each int32."""
    if shift:
        words = b.lshr(words, filled(INTS, shift))
    return b.and_(words, filled(INTS, (1 << bits) - 1))


# --- formats ---


def place(b: Builder, w: Value, start: int, size: int, step: Value) -> Value:
    """Return the address of a step in an area of a superblock with `size` bytes for each."""
    return b.add(w, b.add(b.mul(step, ir.Constant(I64, size)), ir.Constant(I64, start)))


def load_lines(b: Builder, address: Value, count: int) -> list[Value]:
    """Read some lines, and ask for those some way behind them."""
    lines = []
    for i in range(count):
        prefetch_behind(b, offset(b, address, 64 * i))
        lines.append(load(b, BYTES, offset(b, address, 64 * i)))
    return lines


def prefetch_behind(b: Builder, address: Value) -> None:
    """Ask for a line some way behind an address."""
    prefetch(b, offset(b, address, NEAR_BYTES), 3)
    prefetch(b, offset(b, address, FAR_BYTES), 2)


def six_bit_numbers(b: Builder, w: Value, step: Value) -> list[Value]:
    """Read the four six-bit numbers of a step of Q4K or Q3."""
    low = load(b, vector(I16, LANES), place(b, w, 64, 32, step))
    high = load(b, vector(I8, LANES), place(b, w, 192, 16, step))
    low, high = b.zext(low, INTS), b.zext(high, INTS)
    upper = filled(INTS, 0x3C)
    third = b.and_(b.shl(high, filled(INTS, 2)), upper)
    fourth = b.and_(b.lshr(high, filled(INTS, 2)), upper)
    return [
        number(b, low, 0, 6),
        number(b, low, 8, 6),
        b.or_(number(b, low, 6, 2), third),
        b.or_(b.lshr(low, filled(INTS, 14)), fourth),
    ]


def q4k_step(b: Builder, isa: Isa, w: Value, step: Value) -> list[Block]:
    """Decode a step of Q4K."""
    numbers, blocks = six_bit_numbers(b, w, step), list[Block]()
    for i in range(2):
        codes = []
        for line in load_lines(b, place(b, w, 256 + 256 * i, 512, step), 4):
            codes += [field(b, line, 0, 4), field(b, line, 4, 4)]
        blocks.append(WholeBlock(codes, numbers[i], numbers[2 + i], 15))
    return blocks


def q6_step(b: Builder, isa: Isa, w: Value, step: Value) -> list[Block]:
    """Decode a step of Q6."""
    parts, scales = [], []
    for i in range(4):
        lines = load_lines(b, place(b, w, 320 + 192 * i, 768, step), 3)
        last = moved_field(b, lines[0], 6, 0x03)
        last = b.or_(last, moved_field(b, lines[1], 4, 0x0C))
        last = b.or_(last, moved_field(b, lines[2], 2, 0x30))
        parts.append([*(field(b, line, 0, 6) for line in lines), last])
        scale = load(b, vector(I8, LANES), place(b, w, 64 + 16 * i, 64, step))
        scales.append(b.sext(scale, INTS))
    return [PartsBlock(parts[i : i + 2], scales[i : i + 2], 32, 63) for i in (0, 2)]


def q3_step(b: Builder, isa: Isa, w: Value, step: Value) -> list[Block]:
    """Decode a step of Q3."""
    numbers, blocks = six_bit_numbers(b, w, step), list[Block]()
    scales = [b.sub(value, filled(INTS, 32)) for value in numbers]
    for i in range(2):
        lines, codes = load_lines(b, place(b, w, 256 + 192 * i, 384, step), 3), []
        for line in lines:
            codes += [field(b, line, 0, 3), field(b, line, 3, 3)]
        for j in range(2):
            highest = moved_field(b, lines[2], 4 + j, 0x04)
            codes.append(b.or_(moved_field(b, lines[j], 6, 0x03), highest))
        blocks.append(PartsBlock([codes[:4], codes[4:]], scales[2 * i : 2 * i + 2], 4, 7))
    return blocks


def q2_step(b: Builder, isa: Isa, w: Value, step: Value) -> list[Block]:
    """Decode a step of Q2."""
    numbers, blocks = load(b, INTS, place(b, w, 64, 64, step)), list[Block]()
    for i in range(2):
        codes = []
        for line in load_lines(b, place(b, w, 320 + 128 * i, 256, step), 2):
            codes += [field(b, line, 2 * j, 2) for j in range(4)]
        pairs = [b.lshr(numbers, filled(INTS, 4 * i + 8 * kind)) for kind in range(2)]
        scales, least = (b.and_(pair, filled(INTS, 0x000F000F)) for pair in pairs)
        blocks.append(PairBlock(codes, scales, least, 3))
    return blocks


def iq2_step(b: Builder, isa: Isa, w: Value, step: Value) -> list[Block]:
    """Decode a step of IQ2, for activations in the order of `kquant_lattice.turned`."""
    blocks = list[Block]()
    for i in range(2):
        points, signs = load_lines(b, place(b, w, 64 + 128 * i, 256, step), 2)
        codes, scale = lattice_codes(b, isa, points, signs), lattice_scale(b, isa, signs)
        blocks.append(PartsBlock([codes], [scale], MIDDLE, 2 * MIDDLE))
    return blocks


Step = Callable[[Builder, Isa, Value, Value], list[Block]]
