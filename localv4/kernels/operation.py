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

LAST_GROUPS = 4
"""Row groups of the last pieces of a matrix, for which members wait."""


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
def take_piece(operation: int, groups: int, members: int) -> tuple[int, int]:
    """Return row groups of a matrix that are free: (first, end), first >= groups if none is left.

    Where another operation follows at once, nobody waits for the last piece of this one.
    """
    number = take_chunk(operation)
    if word(operation, ALONGSIDE) != 0:
        size = share(groups, members)
        return number * size, min((number + 1) * size, groups)
    return piece(number, groups, members)


@device
def share(groups: int, members: int) -> int:
    """Return how many row groups each member takes at once; kernels read two at a time."""
    size = (groups + members - 1) // members
    return size + size % 2


@device
def piece(number: int, groups: int, members: int) -> tuple[int, int]:
    """Return which row groups piece `number` has when members wait for the last one.

    A new piece costs the time of an atomic addition, and of memory that begins to deliver. So each
    round of pieces, one for each member, has half of what is left, down to LAST_GROUPS each.
    """
    last = min(LAST_GROUPS, max(min(2, groups), groups // (8 * members)))
    first, size, left = 0, groups // (2 * members), number
    while size > last and left >= members:
        size -= size % 2  # kernels read two groups at a time
        first += members * size
        size, left = (groups - first) // (2 * members), left - members
    size = max(size - size % 2, last)
    first += left * size
    return first, min(first + size, groups)


def float_bits(value: float) -> int:
    """Return the bits of a number as f32, as an operand of a program."""
    return int(np.array([value], np.float32).view(np.uint32)[0])
