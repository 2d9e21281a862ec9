"""Rows in a file without a name: on the disk all of them, in memory those that were read of late.

The file is mapped, so kernels read it by addresses. It is sparse, and gets its blocks on the disk
before they are written: a full disk is an error here and not a signal later. It has no name, so
nothing of it is left when the process ends, however it ends.

Every difference between operating systems is here. Linux can be told which pages to drop and tells
which there are; elsewhere the system decides alone. Windows has no sparse files by itself: there
the file has its full size at once.
"""

import contextlib
import ctypes
import errno
import mmap
import os
import sys
import tempfile
import weakref
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from localv4.errors import DoesNotFitError, LocalV4Error

CHUNK = 1 << 20
"""Bytes that come to the disk, and leave memory, together."""

_is_told = sys.platform.startswith("linux")


class RowFile:
    """The arrays of some sizes in one file of `folder`. Raises DoesNotFitError or LocalV4Error."""

    def __init__(self, folder: Path, sizes: Sequence[int]) -> None:
        self._folder = folder
        counts = [-(-size // CHUNK) for size in sizes]
        total = sum(counts)
        try:
            folder.mkdir(parents=True, exist_ok=True)
            self._file = tempfile.TemporaryFile(dir=folder, buffering=0)  # noqa: SIM115 - it stays
            self._file.truncate(total * CHUNK)
            self._map = mmap.mmap(self._file.fileno(), total * CHUNK)
        except OSError as error:
            raise self._failure(error, total * CHUNK) from error
        self._base = ctypes.addressof(ctypes.c_char.from_buffer(self._map))
        # What a token reads are single rows: what lies around them is not worth reading.
        _advise(self._map, "MADV_RANDOM")
        _advise(self._map, "MADV_DONTFORK")
        self._resident = np.zeros(total, np.int64)
        self._is_new = np.ones(total, np.bool_)  # not known to be on the disk
        self._hand = 0
        numbers = [number for count in counts for number in range(count)]
        # the oldest rows of all arrays first
        self._order = np.argsort(numbers, kind="stable").tolist()
        weakref.finalize(self, self._file.close)

    def pieces(self, sizes: Sequence[int]) -> "list[Piece]":
        """Return the arrays, whose sizes are those that the file was made for."""
        found, start = [], 0
        for size in sizes:
            found.append(Piece(self, start, size))
            start += -(-size // CHUNK) * CHUNK
        return found

    @property
    def base(self) -> int:
        """The address of the first byte."""
        return self._base

    @property
    def resident(self) -> int:
        """Bytes in memory, as far as is known."""
        return int(self._resident.sum())

    def resident_of(self, start: int, end: int) -> int:
        """Return the bytes in memory of a part of the file."""
        return int(self._resident[start // CHUNK : -(-end // CHUNK)].sum())

    def commit(self, start: int, end: int) -> None:
        """Give whole chunks their place on the disk. Raises DoesNotFitError."""
        try:
            _allocate(self._file.fileno(), start, end - start)
        except OSError as error:
            raise self._failure(error, end - start) from error
        self._resident[start // CHUNK : end // CHUNK] = CHUNK

    def look(self) -> int:
        """See what is in memory of all chunks; return the bytes."""
        self._look_at(0, len(self._resident))
        return self.resident

    def evict(self, nbytes: int) -> int:
        """Take about so many bytes out of memory, those first that were in it for longest.

        Returns how many it were, fewer if there are no more.
        """
        gone = 0
        for _ in range(len(self._order) if _is_told else 0):
            if gone >= nbytes:
                break
            chunk = self._order[self._hand]
            self._hand = (self._hand + 1) % len(self._order)
            if self._resident[chunk]:
                gone += int(self._resident[chunk])
                self._drop(chunk)
                gone -= int(self._resident[chunk])
        return gone

    def _look_at(self, first: int, end: int) -> None:
        """See what is in memory of chunks first ... end - 1, where the system tells."""
        found = _pages_in_memory(self._base + first * CHUNK, (end - first) * CHUNK)
        if found is not None:
            counts = found.reshape(end - first, -1).sum(1, dtype=np.int64)
            self._resident[first:end] = counts * mmap.PAGESIZE

    def _drop(self, chunk: int) -> None:
        """Let go of the pages of a chunk, which is written to the disk before the first time.

        Pages that were written to after that stay unless they are written once more.
        """
        if self._is_new[chunk]:
            self._write(chunk)
        self._page_out(chunk)
        if self._resident[chunk]:
            self._write(chunk)
            self._page_out(chunk)

    def _write(self, chunk: int) -> None:
        try:
            self._map.flush(chunk * CHUNK, CHUNK)
        except OSError as error:
            raise self._failure(error, CHUNK) from error
        self._is_new[chunk] = False

    def _page_out(self, chunk: int) -> None:
        start = chunk * CHUNK
        # MADV_PAGEOUT would leave those that another processor has touched a moment ago
        self._map.madvise(mmap.MADV_DONTNEED, start, CHUNK)
        os.posix_fadvise(self._file.fileno(), start, CHUNK, os.POSIX_FADV_DONTNEED)
        self._look_at(chunk, chunk + 1)

    def _failure(self, error: OSError, nbytes: int) -> LocalV4Error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            return DoesNotFitError(
                f"no space for {nbytes >> 20} MiB more of the context in {self._folder}",
                hint="free some there, or name another folder with --kv-dir",
            )
        return LocalV4Error(f"cannot keep rows in {self._folder}: {error.strerror or error}")


class Piece:
    """One array in a `RowFile`."""

    def __init__(self, file: RowFile, start: int, nbytes: int) -> None:
        self._file, self._start, self._end = file, start, start
        self.address, self.nbytes = file.base + start, nbytes

    def commit(self, end: int) -> None:
        """Make the first `end` bytes usable. Raises DoesNotFitError."""
        target = self._start + -(-end // CHUNK) * CHUNK
        if target > self._end:
            self._file.commit(self._end, target)
            self._end = target

    @property
    def resident(self) -> int:
        """Bytes in memory, as far as is known."""
        return self._file.resident_of(self._start, self._end)


def _advise(mapped: mmap.mmap, name: str) -> None:
    advice = getattr(mmap, name, None)
    if advice is not None:
        with contextlib.suppress(OSError):
            mapped.madvise(advice)


def _allocate(file: int, start: int, nbytes: int) -> None:
    """Give a part of a file its place on the disk."""
    if hasattr(os, "posix_fallocate"):
        os.posix_fallocate(file, start, nbytes)
    elif hasattr(os, "pwrite"):
        for at in range(start, start + nbytes, CHUNK):
            os.pwrite(file, bytes(CHUNK), at)


def _pages_in_memory(address: int, nbytes: int) -> NDArray[np.uint8] | None:
    """Return 1 for each mapped page that is in memory, 0 for others; None if nobody knows."""
    if not _is_told:
        return None
    pages = np.empty(nbytes // mmap.PAGESIZE, np.uint8)
    where = ctypes.c_void_p(pages.ctypes.data)
    if _mincore()(ctypes.c_void_p(address), ctypes.c_size_t(nbytes), where) != 0:
        return None
    pages &= 1
    return pages


@cache
def _mincore() -> Callable[..., int]:
    return ctypes.CDLL(None).mincore
