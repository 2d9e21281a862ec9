"""The decorator of every kernel that other kernels call."""

from collections import Counter
from collections.abc import Callable
from typing import Any, TypeVar, cast

import llvmlite.binding as llvm
from numba import njit

Function = TypeVar("Function", bound=Callable[..., Any])

OPTIONS: dict[str, Any] = {"nogil": True, "error_model": "numpy"}
"""How they are compiled; what Python needs to call them takes a quarter of that time."""

_made: Counter[tuple[str, str]] = Counter()

if llvm.llvm_version_info[0] in (20, 21, 22):
    # An address that is a sum of two integers is compiled before its callers are known. LLVM may
    # then take either of them for the pointer; when that one turns out to be a small constant
    # later, it takes the access for one to address 0 and deletes the code.
    llvm.set_option("", "-addr-sink-using-gep=false")


def device(function: Function) -> Function:
    """Compile `function` together with its caller; it is never cached or timed on its own."""
    return cast(Function, njit(**OPTIONS)(_distinct(function)))


def inlined(function: Function) -> Function:
    """Compile `function` into each of its callers: for what is called for a vector or two."""
    return cast(Function, njit(**OPTIONS, forceinline=True)(_distinct(function)))


def _distinct(function: Function) -> Function:
    """Give a function a name of its own."""
    # Symbols in the cache are told apart by name and by a number that each process counts for
    # itself: functions that a factory makes, all of one name, would be mistaken for one another
    # when machine code of several processes meets.
    key = (function.__module__, function.__qualname__)
    _made[key] += 1
    if _made[key] > 1:
        function.__qualname__ += f"_{_made[key]}"
    return function
