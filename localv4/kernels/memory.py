"""Words and arrays in memory by address: what threads need to share work without a lock.

Without the compiler (NUMBA_DISABLE_JIT) there are no threads in kernels and none of this is used.
"""

from typing import Any

import llvmlite.binding as llvm
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

_I64 = ir.IntType(64)


@intrinsic
def atomic_load(typing_context: Any, address: Any) -> Any:
    """atomic_load(address) -> i64; later reads are not moved before it."""

    def emit(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        pointer = builder.inttoptr(arguments[0], _I64.as_pointer())
        return builder.load_atomic(pointer, "acquire", 8)

    return types.int64(types.int64), emit


@intrinsic
def atomic_store(typing_context: Any, address: Any, value: Any) -> Any:
    """atomic_store(address, i64); earlier writes are not moved behind it."""

    def emit(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        pointer = builder.inttoptr(arguments[0], _I64.as_pointer())
        builder.store_atomic(arguments[1], pointer, "release", 8)
        return context.get_dummy_value()

    return types.void(types.int64, types.int64), emit


@intrinsic
def atomic_add(typing_context: Any, address: Any, value: Any) -> Any:
    """atomic_add(address, i64) -> the value before; a full barrier."""

    def emit(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        pointer = builder.inttoptr(arguments[0], _I64.as_pointer())
        return builder.atomic_rmw("add", pointer, arguments[1], "seq_cst")

    return types.int64(types.int64, types.int64), emit


@intrinsic
def pointer_to(typing_context: Any, address: Any) -> Any:
    """pointer_to(address) -> a pointer that `numba.carray` makes an array of."""

    def emit(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.inttoptr(arguments[0], ir.IntType(8).as_pointer())

    return types.voidptr(types.int64), emit


@intrinsic
def pause(typing_context: Any) -> Any:
    """pause() tells the core that this is a waiting loop, where there is an instruction for it."""

    def emit(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        machine = llvm.get_default_triple().split("-")[0]
        void = ir.VoidType()
        if machine in ("x86_64", "amd64"):
            kind = ir.FunctionType(void, [])
            name, values = "llvm.x86.sse2.pause", []
        elif machine in ("aarch64", "arm64"):
            kind = ir.FunctionType(void, [ir.IntType(32)])
            name, values = "llvm.aarch64.hint", [ir.Constant(ir.IntType(32), 1)]
        else:
            return context.get_dummy_value()
        builder.call(cgutils.get_or_insert_function(builder.module, kind, name), values)
        return context.get_dummy_value()

    return types.void(), emit


@intrinsic
def call_address(typing_context: Any, address: Any) -> Any:
    """call_address(address) calls a C function without arguments; nothing happens for address 0."""

    def emit(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        nowhere = ir.Constant(_I64, 0)
        with builder.if_then(builder.icmp_unsigned("!=", arguments[0], nowhere)):
            kind = ir.FunctionType(ir.IntType(32), [])
            builder.call(builder.inttoptr(arguments[0], kind.as_pointer()), [])
        return context.get_dummy_value()

    return types.void(types.int64), emit


@intrinsic
def call_operation(
    typing_context: Any, entry: Any, operation: Any, member: Any, members: Any
) -> Any:
    """call_operation(entry, operation, member, members) runs a compiled `compiler.Entry`."""

    def emit(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        kind = ir.FunctionType(ir.VoidType(), [_I64] * 3)
        function = builder.inttoptr(arguments[0], kind.as_pointer())
        builder.call(function, arguments[1:])
        return context.get_dummy_value()

    return types.void(*[types.int64] * 4), emit
