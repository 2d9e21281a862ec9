"""Programs: lists of operations on memory addresses that a team of threads runs together.

A program is an array (operations, WORDS) of i64. Word 0 is the address of the compiled function
(`compiler.Entry`), words 1, 2, ... are its operands, which its docstring lists: integers,
addresses, or the bits of a float32. A *cell* is the address of an i64 that holds an address, for
memory that may move between two runs of a program.

All members of the team call the function of each operation, and none begins the next before all
have finished, except after an operation whose word ALONGSIDE is 1: it shares inputs with the next
one at most, and both may run at the same time. Members take chunks of work as they come, by the
counter in the last word, so a slow core holds nobody up; each output is computed by one member in
one order, so who took it changes nothing.
"""

import numpy as np

from localv4.kernels.device import device
from localv4.kernels.memory import atomic_add, atomic_load
from localv4.kernels.simd import read_u32

WORDS = 24
"""Words of an operation: three cache lines, with the counter in the last one."""

ALONGSIDE, COUNTER = 22, 23

LARGEST_CHUNK = 16
"""Row groups that a member takes at once: enough for the prefetchers to get going."""

SMALLER = 4
"""The last pieces of a matrix are smaller than its chunks by this factor."""


@device
def word(operation: int, index: int) -> int:
    """Return a word of an operation, or any i64 of an array at an address."""
    value: int = atomic_load(operation + 8 * index)
    return value


@device
def float_at(address: int) -> np.float32:
    """Return the f32 at an address."""
    value: np.float32 = np.uint32(read_u32(address)).view(np.float32)
    return value


@device
def float_word(operation: int, index: int) -> np.float32:
    """Return the operand whose word holds the bits of an f32."""
    value: np.float32 = float_at(operation + 8 * index)
    return value


@device
def take_chunk(operation: int) -> int:
    """Return the number of a chunk that nobody else has taken."""
    taken: int = atomic_add(operation + 8 * COUNTER, 1)
    return taken


@device
def chunk_groups(groups: int, members: int) -> int:
    """Return how many row groups make a chunk: at least four chunks for each member."""
    return max(1, min(LARGEST_CHUNK, groups // (4 * members)))


@device
def piece(number: int, groups: int, members: int) -> tuple[int, int]:
    """Return which row groups piece `number` of a matrix has: (first, end); none: first >= groups.

    Pieces are chunks, and toward the end smaller ones: members wait for the last piece of all.
    """
    chunk = chunk_groups(groups, members)
    small = max(min(2, chunk), chunk // SMALLER)  # kernels read two groups at a time
    whole = max(0, groups // chunk - 2 * members)
    if number < whole:
        return number * chunk, (number + 1) * chunk
    first = whole * chunk + (number - whole) * small
    return first, min(first + small, groups)


def float_bits(value: float) -> int:
    """Return the bits of a number as f32, as an operand of a program."""
    return int(np.array([value], np.float32).view(np.uint32)[0])
