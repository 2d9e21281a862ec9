"""Sixteen float32 lanes as one value, so that a dot product has one summation order everywhere.

LLVM may not reorder float additions, and letting it (`fastmath`) would make a result depend on
how a loop happened to be unrolled. With explicit lanes the order is part of the program: a token
gets the same bits whether it is computed alone or in a batch, on AVX2, AVX-512 or NEON (LLVM
splits the logical vector into native registers).
"""

from typing import Any

import numpy as np
from llvmlite import ir
from numba import config, types
from numba.core import cgutils
from numba.extending import intrinsic, models, register_model

LANES = 16

_F32 = ir.FloatType()
_VECTOR = ir.VectorType(_F32, LANES)
_I32 = ir.IntType(32)


class _Lanes(types.Type):
    def __init__(self) -> None:
        super().__init__(name="f32x16")


f32x16 = _Lanes()


@register_model(_Lanes)
class _LanesModel(models.PrimitiveModel):
    def __init__(self, manager: Any, frontend_type: Any) -> None:
        super().__init__(manager, frontend_type, _VECTOR)


@intrinsic
def _zeros(typing_context: Any) -> Any:
    def emit(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return ir.Constant(_VECTOR, [0.0] * LANES)

    return f32x16(), emit


@intrinsic
def _load(typing_context: Any, array: Any, start: Any) -> Any:
    def emit(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        view = context.make_array(signature.args[0])(context, builder, value=arguments[0])
        pointer = cgutils.gep(builder, view.data, arguments[1])
        return builder.load(builder.bitcast(pointer, _VECTOR.as_pointer()), align=4)

    return f32x16(array, types.intp), emit


def _load_from_bytes(context: Any, builder: Any, signature: Any, arguments: Any, kind: Any) -> Any:
    """Load sixteen elements of LLVM type `kind` from a byte array at an element index."""
    view = context.make_array(signature.args[0])(context, builder, value=arguments[0])
    elements = builder.bitcast(view.data, kind.as_pointer())
    pointer = cgutils.gep(builder, elements, arguments[1])
    lanes = ir.VectorType(kind, LANES)
    return builder.load(builder.bitcast(pointer, lanes.as_pointer()), align=1)


@intrinsic
def _load_f32_bytes(typing_context: Any, raw: Any, start: Any) -> Any:
    def emit(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return _load_from_bytes(context, builder, signature, arguments, _F32)

    return f32x16(raw, types.intp), emit


@intrinsic
def _load_bf16_bytes(typing_context: Any, raw: Any, start: Any) -> Any:
    def emit(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        halves = _load_from_bytes(context, builder, signature, arguments, ir.IntType(16))
        words = ir.VectorType(_I32, LANES)
        wide = builder.shl(builder.zext(halves, words), ir.Constant(words, [16] * LANES))
        return builder.bitcast(wide, _VECTOR)

    return f32x16(raw, types.intp), emit


@intrinsic
def _multiply_add(typing_context: Any, a: Any, b: Any, c: Any) -> Any:
    def emit(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        # fmuladd fuses where the target can; llvm.fma would call a library elsewhere
        kind = ir.FunctionType(_VECTOR, [_VECTOR] * 3)
        function = cgutils.get_or_insert_function(builder.module, kind, "llvm.fmuladd.v16f32")
        return builder.call(function, arguments)

    return f32x16(f32x16, f32x16, f32x16), emit


@intrinsic
def _total(typing_context: Any, vector: Any) -> Any:
    def emit(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        value, width = arguments[0], LANES
        while width > 1:
            width //= 2
            low = ir.Constant(ir.VectorType(_I32, width), list(range(width)))
            high = ir.Constant(ir.VectorType(_I32, width), list(range(width, 2 * width)))
            undefined = ir.Constant(value.type, ir.Undefined)
            value = builder.fadd(
                builder.shuffle_vector(value, undefined, low),
                builder.shuffle_vector(value, undefined, high),
            )
        return builder.extract_element(value, ir.Constant(_I32, 0))

    return types.float32(f32x16), emit


def _zeros_python() -> Any:
    return np.zeros(LANES, np.float32)


def _load_python(array: Any, start: int) -> Any:
    return array[start : start + LANES].copy()


def _load_f32_bytes_python(raw: Any, start: int) -> Any:
    return raw[4 * start : 4 * (start + LANES)].copy().view(np.float32)


def _load_bf16_bytes_python(raw: Any, start: int) -> Any:
    halves = raw[2 * start : 2 * (start + LANES)].copy().view(np.uint16)
    return (halves.astype(np.uint32) << np.uint32(16)).view(np.float32)


def _multiply_add_python(a: Any, b: Any, c: Any) -> Any:
    return a * b + c


def _total_python(vector: Any) -> Any:
    while vector.shape[0] > 1:
        half = vector.shape[0] // 2
        vector = vector[:half] + vector[half:]
    return vector[0]


if config.DISABLE_JIT:
    zeros, load, multiply_add, total = (
        _zeros_python,
        _load_python,
        _multiply_add_python,
        _total_python,
    )
    load_f32_bytes, load_bf16_bytes = _load_f32_bytes_python, _load_bf16_bytes_python
else:
    zeros, load, multiply_add, total = _zeros, _load, _multiply_add, _total
    load_f32_bytes, load_bf16_bytes = _load_f32_bytes, _load_bf16_bytes
