"""Programs of the fast engine as launches on a GPU."""

from collections.abc import Sequence
from itertools import accumulate

import numpy as np
from numpy.typing import NDArray

from localv4.cuda.fused import Group, Operation, fused
from localv4.cuda.gpu import Gpu, GpuError, Launch, Step
from localv4.cuda.merged import merge
from localv4.cuda.mirrors import Mirrors
from localv4.cuda.series import as_series
from localv4.cuda.twin import BESIDE, SCRATCH, Twin
from localv4.cuda.twins import TWINS
from localv4.kernels.compiler import Entry
from localv4.kernels.operation import WORDS
from localv4.model.program import Program, Scratch

LINE = 256
"""Scratch memory of kernels starts on such a line."""


def name_of(entry: Entry) -> str:
    """Return the name of an operation in the tables of twins."""
    module, function = entry.function.__module__, entry.function.__name__
    return f"{module.removeprefix('localv4.kernels.')}.{function}"


def twin_of(entry: Entry) -> Twin:
    """Return the twin of an operation; raises GpuError if there is none."""
    name = name_of(entry)
    if name not in TWINS:
        raise GpuError(f"the GPU has no kernel for {name}")
    return TWINS[name]


class GpuProgram(Program):
    """A list of operations that is being built for a GPU; the words are those for the CPU."""

    def __init__(self, scratch: Scratch) -> None:
        super().__init__(scratch)
        self._twins: list[Twin] = []

    def add(self, entry: Entry, *words: int) -> None:
        """Append an operation."""
        self.add_twin(twin_of(entry), *words)

    def add_twin(self, twin: Twin, *words: int) -> None:
        """Append what only a GPU does."""
        self._twins.append(twin)
        self._operations.append([0, *words, *[0] * (WORDS - 1 - len(words))])

    def finish(self) -> NDArray[np.int64]:
        """Raise: the CPU has no use for it."""
        raise TypeError("a program for the GPU has no form for the CPU")

    def groups(self) -> list[Group]:
        """Return the operations (twin, words) in groups that may run at the same time."""
        groups: list[list[Operation]] = [[]]
        pairs = zip(self._twins, self._operations, strict=True)
        for number, (twin, words) in enumerate(pairs):
            groups[-1].append((twin, words))
            if number not in self._alongside:
                groups.append([])
        return [group for group in groups if group]


def _launches(
    twin: Twin, words: Sequence[int], device: tuple[int, ...], beside: int
) -> list[Launch]:
    """Return the launches of an operation, `beside` products being one launch if it is not 0."""
    given = list(words)
    given[BESIDE] = beside
    return [
        Launch(kernel, blocks, kernel.shared(given), device)
        for kernel in twin.kernels
        if (blocks := kernel.blocks(given)) > 0
    ]


def place_rests(groups: Sequence[Group]) -> list[Group]:
    """Put the rests of operations beside the largest of the products that follow, else behind them.

    They are needed by what comes after the last group of several before another rest.
    """
    result: list[Group] = []
    ends = [i for i, group in enumerate(groups) if any(twin.rest for twin, _ in group)]
    result += groups[: ends[0]] if ends else groups
    for start, end in zip(ends, [*ends[1:], len(groups)], strict=False):
        part = list(groups[start:end])
        rests = [(twin.rest, words) for twin, words in part[0] if twin.rest is not None]
        sizes = [_weights(group) if i and len(group) > 1 else -1 for i, group in enumerate(part)]
        largest = sizes.index(max(sizes))
        if sizes[largest] >= 0:
            part[largest] = [*part[largest], *rests]
        else:
            part.insert(1, rests)
        result += part
    return result


def _weights(group: Group) -> int:
    return sum(twin.weights(words) for twin, words in group)


class Translator:
    """Turns programs into launches.

    Scratch memory of kernels is shared by operations that do not run at the same time; what a
    recorded launch uses is never given back.
    """

    def __init__(self, gpu: Gpu, mirrors: Mirrors) -> None:
        self._gpu, self._mirrors = gpu, mirrors
        self._scratch, self._scratch_bytes = 0, 0
        self._kept: list[int] = []
        self._owned: dict[tuple[int, int], int] = {}
        self.nbytes = 0

    def steps(self, program: GpuProgram, *, merges: bool = False) -> list[Step]:
        """Return the launches of a program; `merges`: those that can be one launch are one."""
        groups: Sequence[Group] = program.groups()
        groups = place_rests(fused(groups) if merges else groups)
        groups = [as_series(group, self._is_steady) for group in groups]
        return [step for group in groups if (step := self._step(group, merges=merges))]

    def _is_steady(self, start: int, distance: int, count: int) -> bool:
        """Say whether addresses that are so far apart are as far apart on the GPU."""
        last = distance * (count - 1)
        return self._mirrors.address(start + last) == self._mirrors.address(start) + last

    def _step(self, group: Sequence[Operation], *, merges: bool) -> Step:
        needed = [
            (twin.scratch(words), words[twin.owner] if twin.owner else 0) for twin, words in group
        ]
        branches, joining = [], []
        products = sum(twin.weights(words) > 0 for twin, words in group)
        for (twin, words), place in zip(group, self._places(needed), strict=True):
            device = self._translated(twin, words, place)
            together = _launches(twin, words, device, products) if merges else []
            if len(together) == 1 and together[0].kernel.joins:
                joining += together
            elif launches := _launches(twin, words, device, 0):
                branches.append(launches)
        return [[launch] for launch in merge(joining)] + branches

    def _translated(self, twin: Twin, words: Sequence[int], scratch: int) -> tuple[int, ...]:
        device = list(words)
        for index, kind in enumerate(twin.kinds, start=1):
            if kind in "atc":
                try:
                    device[index] = self._mirrors.address(words[index])
                except KeyError as error:
                    names = ", ".join(kernel.name for kernel in twin.kernels)
                    raise KeyError(f"word {index} of {names}: {error.args[0]}") from None
        if len(twin.kinds) < SCRATCH:  # else an array that is named stands there
            device[SCRATCH] = scratch
        return tuple(device)

    def _places(self, needed: Sequence[tuple[int, int]]) -> list[int]:
        """Return scratch memory for operations that run at the same time: bytes, owner or 0."""
        shared = self._shared_places([0 if owner else size for size, owner in needed])
        return [
            self._owned_place(size, owner) if owner else place
            for (size, owner), place in zip(needed, shared, strict=True)
        ]

    def _owned_place(self, size: int, owner: int) -> int:
        """Return the scratch memory of that size that belongs to an array of the host."""
        if size and (owner, size) not in self._owned:
            self._owned[owner, size] = self._gpu.allocate(size)
            self.nbytes += size
        return self._owned.get((owner, size), 0)

    def _shared_places(self, sizes: Sequence[int]) -> list[int]:
        """Return scratch memory that anybody may use afterwards."""
        rounded = [-(-size // LINE) * LINE for size in sizes]
        total = sum(rounded)
        if total > self._scratch_bytes:
            if self._scratch:
                self._kept.append(self._scratch)
            self._scratch = self._gpu.allocate(total)
            self._scratch_bytes = total
            self.nbytes += total
        ends = accumulate(rounded, initial=0)
        return [self._scratch + end if size else 0 for size, end in zip(sizes, ends, strict=False)]
