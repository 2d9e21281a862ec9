"""Small buffers on the stack of a thread, for values that live as long as one call."""

from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils

from localv4.kernels.simd import operation
from localv4.kernels.simd_ir import F32, I64, Builder, Value


def stack_floats(count: int) -> Any:
    """Return a function of kernels: () -> address of `count` float32, gone when its caller returns.

    What they hold at first is undefined.
    """

    @operation(types.int64)
    def floats(b: Builder) -> Value:
        return b.ptrtoint(cgutils.alloca_once(b, ir.ArrayType(F32, count)), I64)

    return floats
