"""Small buffers on the stack of a thread, for values that live as long as one call."""

from typing import Any

from llvmlite import ir
from numba import types

from localv4.kernels import simd_ir
from localv4.kernels.simd import operation
from localv4.kernels.simd_ir import F32, I64, Builder, Value

_LINE = 64  # bytes


def stack_floats(count: int) -> Any:
    """Return a function of kernels: () -> address of `count` float32, gone when its caller returns.

    They start on a cache line; what they hold at first is undefined.
    """

    @operation(types.int64)
    def floats(b: Builder) -> Value:
        # not `cgutils.alloca_once`, which writes zeros, one by one
        with b.goto_entry_block():
            start = b.alloca(ir.ArrayType(F32, count + _LINE // 4))
        last = simd_ir.offset(b, b.ptrtoint(start, I64), _LINE - 1)
        return b.and_(last, ir.Constant(I64, -_LINE))

    return floats
