"""What the cases of `kernel_cases_*` share: operations with operands at the dimensions of Flash.

A case is its name, the operation, what gives its operands, the bytes that it has to read, and its
floating-point operations. Each call for operands takes memory of its own, so that a GPU whose cache
would hold a whole matrix can be given several in turn. A chain is a name and what gives operations
with their operands: they run one after another as in a program, since the later ones need what the
earlier ones leave.
"""

from collections.abc import Callable, Sequence
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from localv4.kernels.activations import row_bytes
from localv4.kernels.compiler import Entry
from localv4.kernels.operation import float_bits
from localv4.kernels.packed import F8, FORMATS
from localv4.kernels.packed_kquants import KQUANTS
from localv4.kernels.packing_floats import B16, F32R

HIDDEN, INNER, EXPERTS, CHOSEN = 4096, 2048, 256, 6
ROUTER = (EXPERTS, HIDDEN)
LIMIT, EPS = float_bits(10.0), float_bits(1e-6)

INTEGERS = {fmt.name: fmt for fmt in (*FORMATS, *KQUANTS) if fmt is not F8}
FLOATS = {"F8": F8, "B16": B16, "F32R": F32R}


class Memory(Protocol):
    """Memory of the device that the cases run on."""

    def random(self, nbytes: int) -> int:
        """Return the address of so many random bytes."""

    def array(self, values: NDArray[np.generic]) -> int:
        """Return the address of a copy."""


Operands = Callable[[Memory], Sequence[int]]
Case = tuple[str, Entry, Operands, int, int]
Chain = tuple[str, Callable[[Memory], Sequence[tuple[Entry, Sequence[int]]]], int, int]


def floats(memory: Memory, count: int) -> int:
    """Return the address of random numbers."""
    values = np.random.default_rng(count).standard_normal(min(count, 1 << 20), np.float32)
    return memory.array(np.resize(values, count))


def rounded(memory: Memory, count: int, cols: int) -> list[int]:
    """Return buffers of rounded rows."""
    return [memory.random(count * size) for size in row_bytes(cols)]


def rounded_bytes(count: int, cols: int) -> int:
    """Return the bytes of rounded rows."""
    return count * sum(row_bytes(cols))
