"""Decoding of the formats of `kernels.packed_kquants`, as LLVM IR.

The codes of a block become eight vectors as in `kernels.simd_dots`: byte 4 * lane + i of vector j
is column 4 * j + i of row `lane` (IQ2: see `kernels.kquant_lattice`).
"""

from collections.abc import Callable
from dataclasses import dataclass

from llvmlite import ir

from localv4.kernels.isa import Isa
from localv4.kernels.kquant_kinds import Kind, Pairs, Scaled, ScaledWithLeast, add_dots
from localv4.kernels.kquant_lattice import MIDDLE, lattice_codes, lattice_scale
from localv4.kernels.readers import PAIR_FAR_BYTES, PAIR_NEAR_BYTES
from localv4.kernels.simd_dots import activations, prefetch
from localv4.kernels.simd_ir import (
    BYTES,
    I8,
    I16,
    I64,
    INTS,
    LANES,
    SHORTS,
    Builder,
    Value,
    call,
    constant,
    filled,
    load,
    offset,
    vector,
)


@dataclass
class Block:
    """A decoded block: eight vectors of codes and the factors that its kind wants."""

    codes: list[Value]
    factors: list[Value]

    def products(self, b: Builder, isa: Isa, kind: Kind, q: Value, sums: Value) -> list[Value]:
        """Multiply with 32 int8 at q, whose entry of the buffer b is at `sums`."""
        columns, totals, dots = activations(b, q), kind.totals(b, sums), []
        for i, start in enumerate(kind.starts(b, totals)):
            own = slice(i * kind.part_lines, (i + 1) * kind.part_lines)
            dots.append(add_dots(b, isa, start, self.codes[own], columns[own], kind.largest))
        return kind.whole(b, isa, dots, self.factors, totals)


# --- bits ---


def field(b: Builder, line: Value, shift: int, bits: int) -> Value:
    """Return some bits of each byte of a line."""
    return moved_field(b, line, shift, (1 << bits) - 1)


def low_fields(b: Builder, isa: Isa, line: Value, bits: int) -> list[Value]:
    """Return the fields of some bits, 2 or 3, in the low six bits of each byte."""
    mask, places = (1 << bits) - 1, range(0, 6, bits)
    if not isa.bytes_permute:
        return [field(b, line, place, bits) for place in places]
    # an index of vpermb is six bits: with a table of the fields no shift and no mask is needed
    name = "llvm.x86.avx512.permvar.qi.512"
    tables = [constant(BYTES, [number >> place & mask for number in range(64)]) for place in places]
    return [call(b, name, BYTES, table, line) for table in tables]


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
    prefetch(b, offset(b, address, PAIR_NEAR_BYTES), 3)
    prefetch(b, offset(b, address, PAIR_FAR_BYTES), 2)


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
        blocks.append(Block(codes, [numbers[i], numbers[2 + i]]))
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
    return [Block(parts[i] + parts[i + 1], scales[i : i + 2]) for i in (0, 2)]


def q3_step(b: Builder, isa: Isa, w: Value, step: Value) -> list[Block]:
    """Decode a step of Q3."""
    numbers, blocks = six_bit_numbers(b, w, step), list[Block]()
    scales = [b.sub(value, filled(INTS, 32)) for value in numbers]
    for i in range(2):
        lines, codes = load_lines(b, place(b, w, 256 + 192 * i, 384, step), 3), []
        for line in lines:
            codes += low_fields(b, isa, line, 3)
        for j in range(2):
            highest = moved_field(b, lines[2], 4 + j, 0x04)
            codes.append(b.or_(moved_field(b, lines[j], 6, 0x03), highest))
        blocks.append(Block(codes, scales[2 * i : 2 * i + 2]))
    return blocks


def q2_step(b: Builder, isa: Isa, w: Value, step: Value) -> list[Block]:
    """Decode a step of Q2."""
    numbers, blocks = load(b, INTS, place(b, w, 64, 64, step)), list[Block]()
    for i in range(2):
        codes = []
        for line in load_lines(b, place(b, w, 320 + 128 * i, 256, step), 2):
            codes += [*low_fields(b, isa, line, 2), field(b, line, 6, 2)]
        pairs = [b.lshr(numbers, filled(INTS, 4 * i + 8 * kind)) for kind in range(2)]
        scales, least = (b.and_(pair, filled(INTS, 0x000F000F)) for pair in pairs)
        blocks.append(Block(codes, [scales, least]))
    return blocks


def iq2_step(b: Builder, isa: Isa, w: Value, step: Value) -> list[Block]:
    """Decode a step of IQ2, for activations in the order of `kquant_lattice.turned`."""
    blocks = list[Block]()
    for i in range(2):
        points, signs = load_lines(b, place(b, w, 64 + 128 * i, 256, step), 2)
        codes, scale = lattice_codes(b, isa, points, signs), lattice_scale(b, isa, signs)
        blocks.append(Block(codes, [scale]))
    return blocks


Step = Callable[[Builder, Isa, Value, Value], list[Block]]

Q4K_KIND = ScaledWithLeast(1, 15, numbers=2)
Q6_KIND = Scaled(2, 63, 32)
Q3_KIND = Scaled(2, 7, 4)
Q2_KIND = Pairs(2, 3, numbers=2)
IQ2_KIND = Scaled(1, 2 * MIDDLE, MIDDLE, factors=1)
