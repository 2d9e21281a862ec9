"""What this machine can do at best: the roofs that a benchmark compares the kernels with."""

import numpy as np
from numba import types
from numba.core import cgutils

from localv4.kernels import simd_dots, simd_ir
from localv4.kernels.compiler import entry
from localv4.kernels.device import device
from localv4.kernels.isa import ISA
from localv4.kernels.operation import take_chunk, word
from localv4.kernels.readers import prefetch_lines
from localv4.kernels.simd import (
    add_i32,
    i32x16,
    load_i32,
    operation,
    sum_i32,
    write_i64,
    zeros_i32,
)
from localv4.kernels.simd_ir import BYTES, INTS, Builder, Value

PROBES = "probes"
"""The family of these operations."""

# Independent sums, as many as the registers hold: enough to hide the latency of a dot product.
_SUMS = 12 if ISA.level in ("avx512-vnni", "neon-dotprod") else 6
_WEIGHTS = 16  # lines
DOT_ROOF_BYTES = 64 * (_WEIGHTS + _SUMS)
DOT_OPERATIONS = 128  # sixteen lanes, four multiplications and four additions each


@device
def read_lines(address: int, nbytes: int) -> np.int32:
    """Read `nbytes` (a multiple of 512) as the kernels do, with as little else as possible."""
    a, b, c, d = zeros_i32(), zeros_i32(), zeros_i32(), zeros_i32()
    half = nbytes // 2
    for _ in range(half // 256):
        for at in (address, address + half):
            prefetch_lines(at, 4)
            a, b = add_i32(a, load_i32(at)), add_i32(b, load_i32(at + 64))
            c, d = add_i32(c, load_i32(at + 128)), add_i32(d, load_i32(at + 192))
        address += 256
    total: np.int32 = sum_i32(add_i32(add_i32(a, b), add_i32(c, d)))
    return total


@operation(types.UniTuple(i32x16, _SUMS))
def _no_sums(b: Builder) -> list[Value]:
    """Return sums of nothing."""
    return [simd_ir.filled(INTS, 0)] * _SUMS


@operation(types.UniTuple(i32x16, _SUMS), types.UniTuple(i32x16, _SUMS), types.int64, types.int64)
def _add_dots(b: Builder, sums: Value, weight: Value, columns: Value) -> list[Value]:
    """Add the products of a line with _SUMS lines of columns."""
    line, totals = simd_ir.load(b, BYTES, weight), cgutils.unpack_tuple(b, sums)
    others = [simd_ir.load(b, BYTES, simd_ir.offset(b, columns, 64 * i)) for i in range(_SUMS)]
    pairs = zip(totals, others, strict=True)
    return [simd_dots.add_dot(b, ISA, total, line, column) for total, column in pairs]


@entry(PROBES)
def read_roof(operation: int, member: int, members: int) -> None:
    """Read pieces of memory once.

    Words: address, bytes of a piece (a multiple of 512), pieces; sums (i64, a cache line for each
    member) get something of all that was read, so that the reads are not left out.
    """
    address, nbytes, pieces = word(operation, 1), word(operation, 2), word(operation, 3)
    sums = word(operation, 4) + 64 * member
    taken = take_chunk(operation)
    while taken < pieces:
        total = np.int64(read_lines(address + taken * nbytes, nbytes))
        write_i64(sums, word(sums, 0) + total)
        taken = take_chunk(operation)


@entry(PROBES)
def dot_roof(operation: int, member: int, members: int) -> None:
    """Let each member do `dot_roof_operations(rounds)` byte operations on DOT_ROOF_BYTES.

    Each round multiplies another line of weights, lest a compiler takes the product out of the
    loop. At level avx2 the products must fit 16 bits: bytes below 64 will do.
    Words: address, rounds, sums as in `read_roof`.
    """
    address, rounds = word(operation, 1), word(operation, 2)
    sums = _no_sums()
    for i in range(rounds):
        sums = _add_dots(sums, address + 64 * (i % _WEIGHTS), address + 64 * _WEIGHTS)
    total = sums[0]
    for i in range(1, _SUMS):
        total = add_i32(total, sums[i])
    write_i64(word(operation, 3) + 64 * member, np.int64(sum_i32(total)))


def dot_roof_operations(rounds: int) -> int:
    """Return the multiplications and additions of one call of `dot_roof`."""
    return rounds * _SUMS * DOT_OPERATIONS
