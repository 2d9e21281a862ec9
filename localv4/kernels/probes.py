"""What this machine can do at best: the roofs that a benchmark compares the kernels with."""

import numpy as np
from numba import types
from numba.core import cgutils

from localv4.kernels import simd_dots, simd_ir
from localv4.kernels.compiler import kernel
from localv4.kernels.device import device
from localv4.kernels.isa import ISA
from localv4.kernels.readers import prefetch_lines
from localv4.kernels.simd import add_i32, i32x16, load_i32, operation, sum_i32, zeros_i32
from localv4.kernels.simd_ir import BYTES, INTS, Builder, Value

# Independent sums, as many as the registers hold: enough to hide the latency of a dot product.
_SUMS = 12 if ISA.level in ("avx512-vnni", "neon-dotprod") else 6
DOT_OPERATIONS = 128  # sixteen lanes, four multiplications and four additions each


@device
def read_lines(address: int, nbytes: int) -> np.int32:
    """Read `nbytes` (a multiple of 256) as the kernels do, with as little else as possible."""
    a, b, c, d = zeros_i32(), zeros_i32(), zeros_i32(), zeros_i32()
    for _ in range(nbytes // 256):
        prefetch_lines(address, 4)
        a, b = add_i32(a, load_i32(address)), add_i32(b, load_i32(address + 64))
        c, d = add_i32(c, load_i32(address + 128)), add_i32(d, load_i32(address + 192))
        address += 256
    total: np.int32 = sum_i32(add_i32(add_i32(a, b), add_i32(c, d)))
    return total


@operation(i32x16, types.int64, types.int64)
def _repeat_dots(b: Builder, address: Value, rounds: Value) -> Value:
    """Multiply the two lines at an address, `rounds` * _SUMS times."""
    weight, column = (simd_ir.load(b, BYTES, simd_ir.offset(b, address, 64 * i)) for i in range(2))
    sums = [cgutils.alloca_once_value(b, simd_ir.filled(INTS, 0)) for _ in range(_SUMS)]
    with cgutils.for_range(b, rounds):
        for one in sums:
            b.store(simd_dots.add_dot(b, ISA, b.load(one), weight, column), one)
    total = b.load(sums[0])
    for one in sums[1:]:
        total = b.add(total, b.load(one))
    return total


@kernel("i4(i8, i8)")
def read_roof(address: int, nbytes: int) -> np.int32:
    """Read `nbytes` (a multiple of 256) once; their sum, so that the reads are not left out."""
    return read_lines(address, nbytes)


@kernel("i4(i8, i8)")
def dot_roof(address: int, rounds: int) -> np.int32:
    """Do `dot_roof_operations(rounds)` byte operations on the two lines at an address."""
    total: np.int32 = sum_i32(_repeat_dots(address, rounds))
    return total


def dot_roof_operations(rounds: int) -> int:
    """Return the multiplications and additions of one call of `dot_roof`."""
    return rounds * _SUMS * DOT_OPERATIONS
