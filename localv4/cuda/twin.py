"""The CUDA form of an operation: which kernel computes it, and with how many threads.

A *twin* takes the words of the CPU's operation (`kernels.operation`), all addresses being those of
device memory, and leaves the same results: the same bits where the weights are integers, so that
it does not matter which device has computed an expert.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

Words = Sequence[int]
"""The words of an operation; word 0, the address of the CPU's function, is not used."""

SCRATCH = 21
"""The word in which a kernel finds the address of scratch memory of its own, if it asked for it."""

BESIDE = 22
"""The word that says, while launches are chosen, how many operations are to be one with it; then
the first block of threads that is the operation's, and the next one the end of its blocks."""

MERGED_THREADS = 256
"""Threads of a block of operations that are one launch (`cuda.merged`)."""


def nothing(words: Words) -> int:
    """Return that no memory is needed."""
    return 0


@dataclass(frozen=True, slots=True)
class Kernel:
    """One launch: `name` in the file `source`, `blocks` of `threads`, by the operation's words.

    `shared` are the bytes of dynamic shared memory of a block, `scratch` those of device memory
    that the launches of an operation use together. No blocks: nothing is launched.

    `joins`: it can be one launch with others, its blocks having MERGED_THREADS threads then; so
    many blocks run on a multiprocessor at a time. 0: it cannot.
    """

    source: str
    name: str
    threads: int
    blocks: Callable[[Words], int]
    shared: Callable[[Words], int] = nothing
    scratch: Callable[[Words], int] = nothing
    joins: int = 0


@dataclass(frozen=True, slots=True)
class Twin:
    """What stands for an operation: `kinds` of its words from the first on, and its launches.

    Words behind those are for the CPU alone.

    There are none where the operation before has done the work. `owner`: the word of an array that
    scratch memory belongs to; operations that name the same array, and take as much, find there
    what the one before has left. 0: it is anybody's, and holds nothing at first.

    `series`: the word behind those in which one operation that stands for several has their number,
    before the distances in bytes of their arrays (`cuda.series`); 0: there is no such thing.

    `weights`: bytes of the matrices that it reads. `rest`: a part of the work, with the same words,
    of which nothing is needed before the next operation with a rest, the last single operations
    before that left out (`program.place_rests`), or before the program ends.

    Kinds: `a` the address of an array or 0, `t` that of a table of addresses (i64), `c` a cell (the
    address of one address), `i` an integer, `f` the bits of a float32.
    """

    kinds: str
    kernels: tuple[Kernel, ...]
    owner: int = 0
    series: int = 0
    weights: Callable[[Words], int] = nothing
    rest: "Twin | None" = None

    def scratch(self, words: Words) -> int:
        """Return the bytes of scratch memory of an operation."""
        return max((kernel.scratch(words) for kernel in self.kernels), default=0)
