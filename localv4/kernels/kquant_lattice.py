"""Decoding of the format IQ2 of `kernels.packed_kquants`, as LLVM IR.

A byte of a block names a point of the lattice: the magnitudes of eight columns, two bits each. They
are looked up in two tables of 256 bytes, one for the first four columns and one for the others, and
mixed with four signs so that six bits at a time are two columns. These are looked up again, as
value + MIDDLE.

| level       | table of 256 bytes                                 | table of signed magnitudes |
|-------------|----------------------------------------------------|----------------------------|
| avx512-vnni | 2 vpermi2b and a blend, or as avx2                 | vpermb, or as avx2         |
| avx-vnni    | 16 vpshufb, joined by the upper bits of the number | vpshufb                    |
| avx2        | the same                                           | vpshufb                    |
| neon-dotprod| tbl and three tbx, 64 bytes each                   | tbl                        |
| generic     | a load for each byte                               | arithmetic                 |

Vector j of the codes of a block is column 8 * i + j in byte 4 * lane + i: the activations have to
be `turned` the same way.
"""

from collections.abc import Sequence

from llvmlite import ir

from localv4.kernels.iquants import GRID_WORDS
from localv4.kernels.isa import Isa
from localv4.kernels.simd_dots import add_dot
from localv4.kernels.simd_ir import (
    BYTES,
    I8,
    I32,
    I64,
    INTS,
    SHORTS,
    Builder,
    Value,
    call,
    constant,
    filled,
    join,
    load,
    part,
    store,
    undefined,
    vector,
)

MAGNITUDES = (8, 25, 43, 43)
MIDDLE = 43

# Where the bits of a column are, of four: two of its magnitude, from the lowest, and its sign. In a
# looked-up byte (mixed with one of signs) bits 0-5 are the first two columns, bits 2-7 the others.
_PLACES = ((0, 1, 2), (3, 4, 5), (2, 5, 3), (6, 7, 4))
_FIRST, _LAST = 0x1B, 0xE4  # the bits of magnitudes of the two halves


def _table(words: list[int]) -> list[int]:
    """Move the four two-bit digits of each word to their places."""
    return [
        sum(
            (word >> (2 * column + bit) & 1) << places[bit]
            for column, places in enumerate(_PLACES)
            for bit in range(2)
        )
        for word in words
    ]


_WORDS = [int(word, 16) for word in GRID_WORDS.split()]
_HALVES = (_table([word & 255 for word in _WORDS]), _table([word >> 8 for word in _WORDS]))


def lattice_codes(b: Builder, isa: Isa, points: Value, signs: Value) -> list[Value]:
    """Return the eight vectors of codes of a block."""
    codes = []
    own_signs = (signs, _last_signs(b, isa, signs))
    for digits, own in zip(lookup(b, isa, points, _HALVES), own_signs, strict=True):
        first = _mixed(b, digits, own, _FIRST)
        last = shifted(b, _mixed(b, digits, own, _LAST), 2)
        for column, places in enumerate(_PLACES):
            if column < 2:
                codes.append(_code(b, isa, first, places))
            else:
                codes.append(_code(b, isa, last, tuple(bit - 2 for bit in places)))
    return codes


def _mixed(b: Builder, digits: Value, signs: Value, mask: int) -> Value:
    kept = b.and_(digits, filled(BYTES, mask))
    return b.or_(kept, b.and_(signs, filled(BYTES, mask ^ 0xFF)))


def _last_signs(b: Builder, isa: Isa, signs: Value) -> Value:
    """Move the signs of the last four columns to the places of the first four; add the seventh."""
    if isa.bytes_permute:
        name = "llvm.x86.avx512.vpermi2var.qi.512"
        table = [_moved_signs(number) for number in range(128)]
        return call(b, name, BYTES, constant(BYTES, table[:64]), signs, constant(BYTES, table[64:]))
    moved = b.or_(
        b.and_(shifted(b, signs, 4), filled(BYTES, 0x04)),
        b.and_(
            b.bitcast(b.shl(b.bitcast(signs, SHORTS), filled(SHORTS, 4)), BYTES),
            filled(BYTES, 0x30),
        ),
    )
    return b.or_(moved, _odd(b, isa, signs))


def _moved_signs(number: int) -> int:
    """Return `_last_signs` of a byte without its uppermost bit."""
    return number >> 4 & 0x04 | number << 4 & 0x30 | (number.bit_count() & 1) << 3


def _odd(b: Builder, isa: Isa, signs: Value) -> Value:
    """Return 8 where the number of minus signs in bits 0 ... 6 is odd, else 0."""
    folded = b.and_(signs, filled(BYTES, 127))
    folded = b.xor(folded, shifted(b, folded, 4))
    if isa.level != "generic":
        table = [(number.bit_count() & 1) << 3 for number in range(16)]
        return small_lookup(b, isa, table, b.and_(folded, filled(BYTES, 15)))
    folded = b.xor(folded, shifted(b, folded, 2))
    folded = b.xor(folded, shifted(b, folded, 1))
    return b.shl(b.and_(folded, filled(BYTES, 1)), filled(BYTES, 3))


def _code(b: Builder, isa: Isa, mixed: Value, places: tuple[int, ...]) -> Value:
    """Return MIDDLE +- magnitude; places: of the bits of a column in the lowest six bits."""
    if isa.bytes_permute:
        table = constant(BYTES, [_code_of(number, places) for number in range(64)])
        return call(b, "llvm.x86.avx512.permvar.qi.512", BYTES, table, mixed)
    if isa.level != "generic":
        shift = max(places) - 3 if max(places) > 3 else 0
        numbers = b.and_(shifted(b, mixed, shift), filled(BYTES, 15))
        return small_lookup(b, isa, [_code_of(n << shift, places) for n in range(16)], numbers)
    low, high, sign = (b.and_(shifted(b, mixed, at), filled(BYTES, 1)) for at in places)
    # 8, 25, 43: 17 for the lower bit, 35 for the higher one
    size = b.add(b.mul(low, filled(BYTES, 17)), b.mul(high, filled(BYTES, 35)))
    size = b.add(size, filled(BYTES, MAGNITUDES[0]))
    minus, middle = b.icmp_unsigned("!=", sign, filled(BYTES, 0)), filled(BYTES, MIDDLE)
    return b.select(minus, b.sub(middle, size), b.add(middle, size))


def _code_of(number: int, places: tuple[int, ...]) -> int:
    low, high, minus = (number >> place & 1 for place in places)
    magnitude = MAGNITUDES[2 * high + low]
    return MIDDLE - magnitude if minus else MIDDLE + magnitude


def lattice_scale(b: Builder, isa: Isa, signs: Value) -> Value:
    """Return 2 * scale + 1 as int32."""
    bits = b.and_(shifted(b, signs, 7), filled(BYTES, 1))
    return add_dot(b, isa, filled(INTS, 1), bits, constant(BYTES, [2, 4, 8, 16] * 16))


def turned(b: Builder, target: Value, source: Value) -> None:
    """Write 32 activations in the order 0 8 16 24, 1 9 17 25, ..."""
    kind = vector(I8, 32)
    order = constant(vector(I32, 32), [8 * (i % 4) + i // 4 for i in range(32)])
    store(b, b.shuffle_vector(load(b, kind, source), undefined(kind), order), target)


def shifted(b: Builder, line: Value, shift: int) -> Value:
    """Shift to the right, with bits of the neighbour coming in from above."""
    if not shift:
        return line
    return b.bitcast(b.lshr(b.bitcast(line, SHORTS), filled(SHORTS, shift)), BYTES)


# --- tables ---


def lookup(b: Builder, isa: Isa, numbers: Value, tables: Sequence[Sequence[int]]) -> list[Value]:
    """Replace each byte by table[byte], for tables of 256."""
    if isa.bytes_permute:
        return [_two_permutes(b, numbers, table) for table in tables]
    if isa.level == "generic":
        return _loads(b, numbers, tables)
    if isa.level == "neon-dotprod":
        return [_four_tables(b, numbers, table) for table in tables]
    return _sixteen_shuffles(b, isa, numbers, tables)


def small_lookup(b: Builder, isa: Isa, table: Sequence[int], numbers: Value) -> Value:
    """Replace each byte by table[low half of byte]; with bit 7 set the result is 0 on x86."""
    name, width = {
        "avx512-vnni": ("llvm.x86.avx512.pshuf.b.512", 64),
        "avx-vnni": ("llvm.x86.avx2.pshuf.b", 32),
        "avx2": ("llvm.x86.avx2.pshuf.b", 32),
        "neon-dotprod": ("llvm.aarch64.neon.tbl1.v16i8", 16),
    }[isa.level]
    kind = vector(I8, width)
    repeated = constant(kind, list(table) * (width // 16))
    parts = [part(b, numbers, i, width) for i in range(64 // width)]
    return join(b, [call(b, name, kind, repeated, indices) for indices in parts])


def _two_permutes(b: Builder, numbers: Value, table: Sequence[int]) -> Value:
    name, results = "llvm.x86.avx512.vpermi2var.qi.512", []
    for start in (0, 128):
        low, high = (constant(BYTES, table[at : at + 64]) for at in (start, start + 64))
        results.append(call(b, name, BYTES, low, numbers, high))
    upper = b.icmp_signed("<", numbers, filled(BYTES, 0))
    return b.select(upper, results[1], results[0])


def _sixteen_shuffles(
    b: Builder, isa: Isa, numbers: Value, tables: Sequence[Sequence[int]]
) -> list[Value]:
    """Look up each run of sixteen; bit 7 of a number makes one of two lookups 0."""
    first = b.and_(numbers, filled(BYTES, 0x8F))
    second = b.xor(first, filled(BYTES, 0x80))
    places = b.bitcast(numbers, SHORTS)
    bits = [
        b.icmp_signed("<", b.bitcast(b.shl(places, filled(SHORTS, k)), BYTES), filled(BYTES, 0))
        for k in (3, 2, 1)
    ]
    results = []
    for table in tables:
        runs = []
        for h in range(8):
            low = small_lookup(b, isa, table[16 * h : 16 * h + 16], first)
            high = small_lookup(b, isa, table[16 * h + 128 : 16 * h + 144], second)
            runs.append(b.or_(low, high))
        for bit in bits:
            pairs = zip(runs[::2], runs[1::2], strict=True)
            runs = [b.select(bit, high, low) for low, high in pairs]
        results.append(runs[0])
    return results


def _four_tables(b: Builder, numbers: Value, table: Sequence[int]) -> Value:
    """NEON: numbers outside of a table of 64 leave what is there."""
    kind, parts = vector(I8, 16), []
    for quarter in range(4):
        indices, result = part(b, numbers, quarter, 16), None
        for start in range(0, 256, 64):
            runs = [constant(kind, table[at : at + 16]) for at in range(start, start + 64, 16)]
            own = b.sub(indices, filled(kind, start)) if start else indices
            if result is None:
                result = call(b, "llvm.aarch64.neon.tbl4.v16i8", kind, *runs, own)
            else:
                result = call(b, "llvm.aarch64.neon.tbx4.v16i8", kind, result, *runs, own)
        parts.append(result)
    return join(b, parts)


def _loads(b: Builder, numbers: Value, tables: Sequence[Sequence[int]]) -> list[Value]:
    results = [undefined(BYTES)] * len(tables)
    places = [_table_address(b, table) for table in tables]
    for lane in range(64):
        at = ir.Constant(I32, lane)
        number = b.zext(b.extract_element(numbers, at), I64)
        for i, place in enumerate(places):
            results[i] = b.insert_element(results[i], load(b, I8, b.add(place, number)), at)
    return results


def _table_address(b: Builder, table: Sequence[int]) -> Value:
    """Return the address of a table that is part of the module."""
    kind = ir.ArrayType(I8, len(table))
    name = f"kquant_table_{sum(i * value for i, value in enumerate(table))}"
    variable = b.module.globals.get(name)
    if variable is None:
        variable = ir.GlobalVariable(b.module, kind, name)
        variable.linkage, variable.global_constant = "internal", True
        variable.initializer = ir.Constant(kind, list(table))
    return b.ptrtoint(variable, I64)
