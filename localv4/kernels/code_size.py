"""How much code a kernel is made of, which tells well enough how long its compilation takes."""

from collections.abc import Callable, Iterator
from types import ModuleType
from typing import Any

Function = Callable[..., Any]


def code_size(function: Function, known: dict[Function, int]) -> int:
    """Return the bytes of bytecode of a function and of the compiled functions that it calls.

    What is called twice is compiled twice. `known` keeps the sizes between calls.
    """
    if function not in known:
        known[function] = 0  # one that calls itself
        callees = {v.py_func for v in _named(function) if hasattr(v, "py_func")}
        own = len(function.__code__.co_code)
        known[function] = own + sum(code_size(callee, known) for callee in callees)
    return known[function]


def _named(function: Any) -> Iterator[Any]:
    """Yield what a function finds by a name: globals, attributes of modules, closure."""
    spaces = [function.__globals__]
    for name in function.__code__.co_names:
        for space in spaces:
            if name in space:
                yield space[name]
        value = function.__globals__.get(name)
        if isinstance(value, ModuleType):
            spaces.append(vars(value))
    for cell in function.__closure__ or ():
        yield cell.cell_contents
