"""Small operations for tests of the team."""

from localv4.kernels.compiler import entry
from localv4.kernels.memory import atomic_add, atomic_store
from localv4.kernels.operation import word


@entry("test")
def append(operation: int, member: int, members: int) -> None:
    """Append a number to a log, and count the visits of each member.

    Words: the log, which begins with its length; the number; a counter for each member.
    """
    log = word(operation, 1)
    length = atomic_add(log, 1) + 1
    atomic_store(log + 8 * length, word(operation, 2))
    atomic_add(word(operation, 3) + 8 * member, 1)


@entry("test")
def halt_when(operation: int, member: int, members: int) -> None:
    """Add one to a counter; whoever makes it the limit halts the program.

    Words: the counter, the limit, where to write to halt.
    """
    if atomic_add(word(operation, 1), 1) + 1 == word(operation, 2):
        atomic_store(word(operation, 3), 1)
