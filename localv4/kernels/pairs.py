"""Activations as bfloat16 for tiles of AMX: what int8 and scales that are powers of two stand for.

[block of 32 columns][row][32 bfloat16], blocks `distance` bytes apart. The columns of a block are
in ORDER, in which neighbours are those of the two halves of a 16-bit word of packed 4-bit weights.
"""

from numba import types

from localv4.kernels import simd_ir
from localv4.kernels.packed import BLOCK
from localv4.kernels.simd import operation
from localv4.kernels.simd_ir import FLOATS, I8, INTS, LANES, SHORTS, Builder, Value

ORDER = tuple(8 * eight + i for eight in range(4) for i in (0, 2, 4, 6, 1, 3, 5, 7))
"""The columns of a block, as they lie here."""

PAIRS_ROW = 2 * BLOCK
"""Bytes of a row of a block."""


SPARE_ROWS = 31
"""Rows that may be read behind the last one."""

_address = types.int64


@operation(types.void, _address, _address, _address)
def store_pairs(b: Builder, address: Value, q: Value, d: Value) -> None:
    """Write the row of a block of which q has the int8, d the scale."""
    factor = simd_ir.splat(b, simd_ir.load(b, simd_ir.F32, d))
    values = []
    for half in range(0, BLOCK, LANES):
        codes = simd_ir.load(b, simd_ir.vector(I8, LANES), simd_ir.offset(b, q, half))
        values.append(b.fmul(b.sitofp(b.sext(codes, INTS), FLOATS), factor))
    upper = simd_ir.constant(simd_ir.vector(simd_ir.I32, BLOCK), [2 * c + 1 for c in ORDER])
    halves = [b.bitcast(value, SHORTS) for value in values]
    simd_ir.store(b, b.shuffle_vector(*halves, upper), address)
