"""Memory for compressed rows of the context, which only grow: addresses first, pages as they come.

An array has addresses for as many rows as the model can ever have, so it never moves; pages of it
exist where rows were written. Rows that every token reads are in memory. Those of which a token
reads a chosen few may lie in a file (`paging.row_file`), of which as much stays in memory as there
is room for.
"""

import mmap
import weakref
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from localv4.errors import DoesNotFitError
from localv4.paging import address_space
from localv4.paging.address_space import AddressSpace
from localv4.paging.row_file import Piece, RowFile

KEYS_BYTES = 256 << 20
"""What stays in memory of rows in files when nobody says how much may."""

LEAST_KEYS_BYTES = 16 << 20
"""With less room for them tokens would wait for the disk only."""

LARGE_BYTES = 32 << 20
"""Arrays of this size ask for large pages; smaller ones would fill a good part of one with air."""

PAGE = mmap.PAGESIZE

_STEP = 256 << 10
_SPARE = 8  # an eighth of the room is made free at a time


@dataclass(frozen=True, slots=True)
class Wanted:
    """An array to make: its bytes at most, and whether a token reads a few of its rows only."""

    nbytes: int
    is_sparse: bool


class RowArray(Protocol):
    """Memory for one array at a fixed address."""

    address: int
    nbytes: int

    def commit(self, end: int) -> None:
        """Make the first `end` bytes usable. Raises MemoryError or DoesNotFitError."""

    @property
    def resident(self) -> int:
        """Bytes of physical memory that the array takes, as far as is known."""


class InMemory:
    """An array in anonymous memory."""

    def __init__(self, nbytes: int) -> None:
        self._space: AddressSpace = address_space.reserve(nbytes, huge=False, step=_STEP)
        weakref.finalize(self, self._space.close).atexit = False  # threads may still run then
        self.address, self.nbytes = self._space.base, nbytes
        self.resident = 0

    def commit(self, end: int) -> None:
        """Make the first `end` bytes usable. Raises MemoryError."""
        self._space.commit(end)
        if self.resident < LARGE_BYTES <= end:
            self._space.prefer_large_pages(self.nbytes)
        self.resident = max(self.resident, end)


class RowMemory:
    """Where the arrays of all decoder states of a network are.

    `folder` is for files, None for none; `cap` bounds the memory for rows (bytes): without it only
    those in files are bounded. They are not bounded where the system cannot be told to.
    """

    def __init__(self, folder: Path | None = None, cap: int | None = None) -> None:
        self._folder, self._cap = folder, cap
        self._arrays: weakref.WeakSet[InMemory] = weakref.WeakSet()
        self._files: weakref.WeakSet[RowFile] = weakref.WeakSet()
        self._came = 0  # bytes that may have come into memory since all of it was looked at

    def make(self, wanted: Sequence[Wanted]) -> list[RowArray]:
        """Return the arrays of one state. Raises MemoryError, or DoesNotFitError for a file."""
        sparse = [each.nbytes for each in wanted if each.is_sparse]
        pieces: Iterator[Piece] = iter(())
        if self._folder is not None and sparse:
            file = RowFile(self._folder, sparse)
            self._files.add(file)
            pieces = iter(file.pieces(sparse))
        arrays: list[RowArray] = []
        for each in wanted:
            if each.is_sparse and self._folder is not None:
                arrays.append(next(pieces))
            else:
                array = InMemory(each.nbytes)
                self._arrays.add(array)
                arrays.append(array)
        return arrays

    @property
    def room(self) -> int | None:
        """Bytes that rows in files may have in memory; None if nothing bounds them."""
        if not self._files:
            return None
        return KEYS_BYTES if self._cap is None else max(LEAST_KEYS_BYTES, self._cap - self._always)

    @property
    def _always(self) -> int:
        """Bytes of the rows that must stay in memory."""
        return sum(array.resident for array in self._arrays)

    def check(self) -> None:
        """Raise DoesNotFitError when rows that must stay leave too little for the others."""
        if not self._files or self._cap is None or self._cap - self._always >= LEAST_KEYS_BYTES:
            return
        raise DoesNotFitError(
            f"the rows that every token reads take {self._always >> 20} MiB by now, "
            f"--kv-ram is {self._cap >> 20} MiB",
            hint=f"use --kv-ram {(self._always + 4 * LEAST_KEYS_BYTES) >> 20}MiB or more",
        )

    def make_way(self, coming: int) -> None:
        """Take rows out of memory until there is room for `coming` bytes more of those in files.

        That is the most that may come before the next call, so the bound holds at any moment. What
        is more than the room itself will exceed it.
        """
        room = self.room
        if room is None or coming == 0:
            return
        files = list(self._files)
        self._came += coming
        if sum(file.resident for file in files) + self._came <= room:
            return  # whatever of it has come, it cannot be too much
        excess = sum(file.look() for file in files) + coming - room
        self._came = coming
        if excess <= 0:
            return
        excess += room // _SPARE
        for file in sorted(files, key=lambda file: -file.resident):
            excess -= file.evict(excess)


class _Owner:
    """What NumPy takes for the owner of an array: it keeps the memory as long as the array."""

    def __init__(self, memory: RowArray, shape: tuple[int, int], kind: np.dtype[Any]) -> None:
        self.memory = memory
        self.__array_interface__ = {
            "data": (memory.address, False),
            "shape": shape,
            "typestr": kind.str,
            "version": 3,
        }


def view(memory: RowArray, rows: int, width: int, kind: np.dtype[Any]) -> NDArray[Any]:
    """Return the first `rows` rows of `width` elements; they must be usable."""
    return np.asarray(_Owner(memory, (rows, width), kind))
