"""The decorator of every kernel that other kernels call."""

from collections.abc import Callable
from typing import Any, TypeVar, cast

from numba import njit

Function = TypeVar("Function", bound=Callable[..., Any])


def device(function: Function) -> Function:
    """Compile `function` together with its caller; it is never cached or timed on its own."""
    return cast(Function, njit(nogil=True, error_model="numpy")(function))
