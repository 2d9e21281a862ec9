"""Decoding of packed weights and byte dot products: the code that differs between machines.

A block is 32 columns of sixteen rows, held as eight vectors of 64 bytes: byte 4 * lane + i of
vector j belongs to row `lane` and column 4 * j + i. So an int32 lane is one operand of a dot
product of four, rows never mix, and there are no horizontal sums.

| level       | lookup by nibble              | four products into an int32             |
|-------------|-------------------------------|-----------------------------------------|
| avx512-vnni | vpermb, or vpshufb (512 bits) | vpdpbusd (512 bits)                     |
| avx-vnni    | 2 vpshufb                     | 2 vpdpbusd                              |
| avx2        | 2 vpshufb                     | vpmaddubsw, summed in 16 bits, vpmaddwd |
| neon-dotprod| 4 tbl                         | 4 sdot                                  |
| generic     | arithmetic                    | widen, multiply, add                    |

The x86 instructions take an unsigned first operand: weights are decoded to value + bias there
(`Isa.code_bias`, `Isa.byte_bias`), and the sum starts from -bias * (sum of the activations).
"""

from collections.abc import Callable

from llvmlite import ir

from localv4.kernels.isa import Isa
from localv4.kernels.simd_ir import (
    BYTES,
    FLOATS,
    I8,
    I16,
    I32,
    INTS,
    LANES,
    SHORTS,
    Builder,
    Value,
    call,
    constant,
    filled,
    halves_to_floats,
    join,
    load,
    offset,
    part,
    splat,
    undefined,
    vector,
)

VECTORS = 8  # of a block
# Twice the value of each E2M1 code (so they are whole), and the value of each code of Q4.
E2M1_DOUBLED = (0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12)
OFFSET_8 = tuple(range(-8, 8))
# Independent sums per block: shortens the chain of dependent dot products.
CHAINS = 2


def mx4_codes(b: Builder, isa: Isa, address: Value) -> list[Value]:
    """Decode the 256 bytes of an MX4 block to twice the values, biased."""
    return _four_bit_codes(b, isa, address, E2M1_DOUBLED, _doubled_e2m1)


def q4_codes(b: Builder, isa: Isa, address: Value) -> list[Value]:
    """Decode the 256 bytes of a Q4 block to values, biased."""
    return _four_bit_codes(b, isa, address, OFFSET_8, _minus_8)


def q8_bytes(b: Builder, isa: Isa, address: Value) -> list[Value]:
    """Load the 512 bytes of a Q8 block, biased."""
    lines = [load(b, BYTES, offset(b, address, 64 * j)) for j in range(VECTORS)]
    return [b.xor(line, filled(BYTES, 128)) for line in lines] if isa.byte_bias else lines


def activations(b: Builder, address: Value) -> list[Value]:
    """Load 32 int8, four to a vector that repeats them in each lane."""
    words = [load(b, I32, offset(b, address, 4 * j)) for j in range(VECTORS)]
    return [b.bitcast(splat(b, word), BYTES) for word in words]


def add_code_dots(
    b: Builder, isa: Isa, acc: Value, weights: list[Value], columns: list[Value]
) -> Value:
    """Add the products of a block of 4-bit weights with its activations to acc."""
    if isa.level == "avx2":
        return _add_narrow_dots(b, acc, weights, columns)
    return _add_chained(b, isa, acc, weights, columns)


def add_byte_dots(
    b: Builder, isa: Isa, acc: Value, weights: list[Value], columns: list[Value]
) -> Value:
    """Add the products of a block of 8-bit weights with its activations to acc."""
    if isa.level != "avx2":
        return _add_chained(b, isa, acc, weights, columns)
    return add_byte_lines(b, isa, acc, weights, columns)


def add_byte_dot(b: Builder, isa: Isa, acc: Value, weight: Value, column: Value) -> Value:
    """The same as `add_dot` for any 8-bit weight: biased by 128, or signed where there is none."""
    if isa.level == "avx2":
        return _add_signed_dot(b, acc, weight, column)
    return add_dot(b, isa, acc, weight, column)


def add_code_lines(
    b: Builder, isa: Isa, acc: Value, weights: list[Value], columns: list[Value]
) -> Value:
    """Add the products of some vectors of 4-bit weights in one chain: for many sums at a time."""
    if isa.level == "avx2":
        return _add_narrow_dots(b, acc, weights, columns)
    return add_lines(b, isa, acc, weights, columns)


def add_lines(
    b: Builder, isa: Isa, acc: Value, weights: list[Value], columns: list[Value]
) -> Value:
    """The same for weights that `add_dot` takes."""
    for weight, column in zip(weights, columns, strict=True):
        acc = add_dot(b, isa, acc, weight, column)
    return acc


def add_byte_lines(
    b: Builder, isa: Isa, acc: Value, weights: list[Value], columns: list[Value]
) -> Value:
    """The same for 8-bit weights."""
    for weight, column in zip(weights, columns, strict=True):
        acc = add_byte_dot(b, isa, acc, weight, column)
    return acc


def add_dot(b: Builder, isa: Isa, acc: Value, weight: Value, column: Value) -> Value:
    """acc[lane] += sum of four products of weight (biased) and column (int8).

    At level avx2 two adjacent weights must not exceed 258 together, lest their sum saturates.
    """
    if isa.level == "avx512-vnni":
        # The operand types of older LLVM on purpose: newer ones upgrade them when they parse.
        words = [b.bitcast(value, INTS) for value in (weight, column)]
        return call(b, "llvm.x86.avx512.vpdpbusd.512", INTS, acc, *words)
    if isa.level == "avx-vnni":
        words = [b.bitcast(value, INTS) for value in (weight, column)]
        operands = [[part(b, value, i, 8) for value in (acc, *words)] for i in range(2)]
        name = "llvm.x86.avx512.vpdpbusd.256"
        return join(b, [call(b, name, vector(I32, 8), *three) for three in operands])
    if isa.level == "avx2":
        return _add_narrow_dots(b, acc, [weight], [column])
    if isa.level == "neon-dotprod":
        name = "llvm.aarch64.neon.sdot.v4i32.v16i8"
        quarters = [
            (part(b, acc, i, 4), part(b, weight, i, 16), part(b, column, i, 16)) for i in range(4)
        ]
        return join(b, [call(b, name, vector(I32, 4), *three) for three in quarters])
    return _add_wide_dot(b, acc, weight, column)


def f8_columns(b: Builder, isa: Isa, address: Value) -> list[Value]:
    """Read four columns of sixteen E4M3 codes as float32, times 2^-8.

    A code shifted into a half is its value times 2^-8, exactly, subnormals included: the
    conversion to float32 then costs no assist of the processor.
    """
    columns = []
    for half in range(2):
        codes = load(b, vector(I8, 32), offset(b, address, 32 * half))
        shifted = b.shl(b.sext(codes, SHORTS), filled(SHORTS, 7))
        bits = b.and_(shifted, filled(SHORTS, 0xBFFF))
        columns += [halves_to_floats(b, isa.fast_half, part(b, bits, i, LANES)) for i in range(2)]
    return columns


def load_e8m0(b: Builder, address: Value) -> Value:
    """Read sixteen UE8M0 scales as float32; code 0 (2^-127) reads as 0, 255 as infinity."""
    codes = b.zext(load(b, vector(I8, LANES), address), INTS)
    return b.bitcast(b.shl(codes, filled(INTS, 23)), FLOATS)


def load_f16(b: Builder, isa: Isa, address: Value) -> Value:
    """Read sixteen halves as float32."""
    return halves_to_floats(b, isa.fast_half, load(b, vector(I16, LANES), address))


def _four_bit_codes(
    b: Builder,
    isa: Isa,
    address: Value,
    table: tuple[int, ...],
    compute: Callable[[Builder, Value], Value],
) -> list[Value]:
    values = [value + isa.code_bias for value in table]
    weights = []
    for line in range(VECTORS // 2):
        low = load(b, BYTES, offset(b, address, 64 * line))
        high = b.bitcast(b.lshr(b.bitcast(low, SHORTS), filled(SHORTS, 4)), BYTES)
        for codes in (low, high):
            if isa.level == "generic":
                weights.append(compute(b, b.and_(codes, filled(BYTES, 15))))
            else:
                weights.append(_lookup(b, isa, values, codes))
    return weights


def _lookup(b: Builder, isa: Isa, table: list[int], codes: Value) -> Value:
    """Replace each byte by table[its low nibble]."""
    if isa.bytes_permute:  # reads six bits of an index: a table repeated four times needs no mask
        repeated = constant(BYTES, [value & 255 for value in table] * 4)
        return call(b, "llvm.x86.avx512.permvar.qi.512", BYTES, repeated, codes)
    repeated = constant(BYTES, [value & 255 for value in table] * 4)
    return look_up(b, isa, repeated, b.and_(codes, filled(BYTES, 15)))


def look_up(b: Builder, isa: Isa, tables: Value, codes: Value) -> Value:
    """Replace each byte below 16 by that entry of its own sixteen bytes of tables."""
    name, width = {
        "avx512-vnni": ("llvm.x86.avx512.pshuf.b.512", 64),
        "avx-vnni": ("llvm.x86.avx2.pshuf.b", 32),
        "avx2": ("llvm.x86.avx2.pshuf.b", 32),
        "neon-dotprod": ("llvm.aarch64.neon.tbl1.v16i8", 16),
    }[isa.level]
    pairs = [(part(b, tables, i, width), part(b, codes, i, width)) for i in range(64 // width)]
    return join(b, [call(b, name, vector(I8, width), *pair) for pair in pairs])


def _doubled_e2m1(b: Builder, codes: Value) -> Value:
    """Compute E2M1_DOUBLED: 4 ... 7 add the excess over 4, and 7 two more."""
    size = b.and_(codes, filled(BYTES, 7))
    over = b.select(
        b.icmp_unsigned(">", size, filled(BYTES, 4)),
        b.sub(size, filled(BYTES, 4)),
        filled(BYTES, 0),
    )
    last = b.icmp_unsigned("==", size, filled(BYTES, 7))
    size = b.add(b.add(size, over), b.select(last, filled(BYTES, 2), filled(BYTES, 0)))
    return b.select(b.icmp_unsigned(">", codes, filled(BYTES, 7)), b.neg(size), size)


def _minus_8(b: Builder, codes: Value) -> Value:
    return b.sub(codes, filled(BYTES, 8))


def _add_chained(
    b: Builder, isa: Isa, acc: Value, weights: list[Value], columns: list[Value]
) -> Value:
    sums = [acc] + [filled(INTS, 0)] * (CHAINS - 1)
    for i, (weight, column) in enumerate(zip(weights, columns, strict=True)):
        sums[i % CHAINS] = add_dot(b, isa, sums[i % CHAINS], weight, column)
    acc = sums[0]
    for other in sums[1:]:
        acc = b.add(acc, other)
    return acc


def _add_narrow_dots(b: Builder, acc: Value, weights: list[Value], columns: list[Value]) -> Value:
    """AVX2: sum up to four products of pairs in 16 bits (4 * 2 * 24 * 127 fits), then widen."""
    results = []
    for i in range(2):
        result = part(b, acc, i, 8)
        for first in range(0, len(weights), 4):
            pairs = [
                call(
                    b,
                    "llvm.x86.avx2.pmadd.ub.sw",
                    vector(I16, 16),
                    part(b, weight, i, 32),
                    part(b, column, i, 32),
                )
                for weight, column in zip(
                    weights[first : first + 4], columns[first : first + 4], strict=True
                )
            ]
            total = pairs[0]
            for pair in pairs[1:]:
                total = b.add(total, pair)
            result = b.add(result, _widen_pairs(b, total))
        results.append(result)
    return join(b, results)


def _add_signed_dot(b: Builder, acc: Value, weight: Value, column: Value) -> Value:
    """AVX2 with signed 8-bit weights: |weight| * (column with the sign of the weight)."""
    kind, results = vector(I8, 32), []
    for i in range(2):
        half = part(b, weight, i, 32)
        size = call(b, "llvm.x86.avx2.psign.b", kind, half, half)
        signed = call(b, "llvm.x86.avx2.psign.b", kind, part(b, column, i, 32), half)
        pairs = call(b, "llvm.x86.avx2.pmadd.ub.sw", vector(I16, 16), size, signed)
        results.append(b.add(part(b, acc, i, 8), _widen_pairs(b, pairs)))
    return join(b, results)


def _widen_pairs(b: Builder, shorts: Value) -> Value:
    ones = filled(vector(I16, 16), 1)
    return call(b, "llvm.x86.avx2.pmadd.wd", vector(I32, 8), shorts, ones)


def _add_wide_dot(b: Builder, acc: Value, weight: Value, column: Value) -> Value:
    wide = vector(I32, 64)
    products = b.mul(b.sext(weight, wide), b.sext(column, wide))
    for k in range(4):
        lanes = constant(INTS, range(k, 64, 4))
        acc = b.add(acc, b.shuffle_vector(products, undefined(wide), lanes))
    return acc


def prefetch(b: Builder, address: Value, locality: int) -> None:
    """Ask for a cache line to be read soon; any address is harmless. Locality 3: L1, 2: L2."""
    pointer = b.inttoptr(address, I8.as_pointer())
    read, keep, data = (ir.Constant(I32, value) for value in (0, locality, 1))
    call(b, "llvm.prefetch.p0", ir.VoidType(), pointer, read, keep, data)
