"""One read-only file: sized and read first, mapped once its header is known to be good."""

import mmap
import os
import stat
import weakref
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from localv4.errors import BadFileError, LocalV4Error, NotFoundError


@dataclass(frozen=True, slots=True)
class _FileMark:
    """What tells that an open file is still what it was."""

    size: int
    mtime_ns: int
    inode: int


class MappedFile:
    """A regular file, read in order and then mapped; raises LocalV4Error for anything else.

    The file stays open, so one that is renamed, replaced by another or deleted is still readable.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        descriptor = _open_regular(path)
        # A finalizer, because a file object that is not closed by hand warns when it is collected.
        self._close_descriptor = weakref.finalize(self, os.close, descriptor)
        self._descriptor = descriptor
        self._mark = self._stat()
        self.size = self._mark.size
        if self.size == 0:
            self._close_descriptor()
            raise BadFileError(path, "the file is empty")
        self.position = 0
        self._reader = open(descriptor, "rb", closefd=False)  # noqa: SIM115
        self._map: mmap.mmap | None = None
        self._view: NDArray[np.uint8] | None = None

    def read(self, count: int, what: str) -> bytes:
        """Return the next `count` bytes; `what` names them when the file ends before."""
        left = self.size - self.position
        if count > left:
            raise BadFileError(
                self.path, f"{what}: needs {count} bytes, but the file has {left} left"
            )
        with plain_errors(self.path):
            data = self._reader.read(count)
        if len(data) != count:
            raise BadFileError(self.path, "the file became shorter while it was being read")
        self.position += count
        return data

    def map(self) -> None:
        """Map the whole file read-only."""
        self._reader.close()
        self.check_unchanged()
        with plain_errors(self.path):
            self._map = mmap.mmap(self._descriptor, self.size, access=mmap.ACCESS_READ)
        self._view = np.frombuffer(self._map, dtype=np.uint8)

    def bytes(self, offset: int, nbytes: int) -> NDArray[np.uint8]:
        """Return `nbytes` bytes from `offset` on as a read-only view into the map."""
        if self._view is None:
            raise ValueError(f"{self.path} is not mapped")
        return self._view[offset : offset + nbytes]

    @property
    def address(self) -> int:
        """Where the map begins."""
        if self._view is None:
            raise ValueError(f"{self.path} is not mapped")
        address: int = self._view.ctypes.data
        return address

    def prefer_large_pages(self, offset: int, nbytes: int) -> None:
        """Ask for large pages for a range of the map that is read as a whole, before its first use.

        Where the system has them for files (Linux 6.16 and later on ext4, XFS, Btrfs, tmpfs), one
        fault brings in 2 MiB, and reading needs no walk through small pages.
        """
        advice = getattr(mmap, "MADV_HUGEPAGE", None)
        start = offset // mmap.PAGESIZE * mmap.PAGESIZE
        if self._map is not None and advice is not None:
            with suppress(OSError):  # a kernel without large pages
                self._map.madvise(advice, start, offset + nbytes - start)

    def drop_pages(self, offset: int = 0, nbytes: int | None = None) -> None:
        """Take the pages that were read out of this process; the next look brings them back.

        Of a range of the file those that are wholly inside.
        """
        advice = getattr(mmap, "MADV_DONTNEED", None)
        end = self.size if nbytes is None else (offset + nbytes) // mmap.PAGESIZE * mmap.PAGESIZE
        start = -(-offset // mmap.PAGESIZE) * mmap.PAGESIZE
        if self._map is not None and advice is not None and start < end:
            self._map.madvise(advice, start, end - start)

    def check_unchanged(self) -> None:
        """Raise BadFileError when the file was written to or cut since it was opened.

        Reading a mapped page beyond the new end of a cut file would kill the process.
        """
        now = self._stat()
        if now.size != self.size:
            raise BadFileError(
                self.path,
                f"the file changed while in use: it had {self.size} bytes, now {now.size}",
            )
        if now != self._mark:
            raise BadFileError(self.path, "the file changed while in use: it was written to")

    def close(self) -> None:
        """Give the file back; views that are still held stay readable."""
        self._reader.close()
        self._view = None
        if self._map is not None:
            with suppress(BufferError):  # a view is still held; the map goes with the last of them
                self._map.close()
            self._map = None
        self._close_descriptor()

    def _stat(self) -> _FileMark:
        if not self._close_descriptor.alive:
            raise ValueError(f"{self.path} is closed")
        with plain_errors(self.path):
            status = os.fstat(self._descriptor)
        return _FileMark(status.st_size, status.st_mtime_ns, status.st_ino)


@contextmanager
def plain_errors(path: Path) -> Iterator[None]:
    """Turn errors of the operating system about `path` into one clear line."""
    try:
        yield
    except (FileNotFoundError, NotADirectoryError) as error:
        raise NotFoundError(f"there is no file {path}", hint="check the path") from error
    except OSError as error:
        hint = "check its permissions" if isinstance(error, PermissionError) else None
        raise LocalV4Error(f"cannot read {path}: {error.strerror or error}", hint=hint) from error


def _open_regular(path: Path) -> int:
    """Open a regular file for reading and return its descriptor."""
    if "\0" in str(path):
        raise NotFoundError(f"there is no file {str(path)!r}: a path holds no NUL")
    with plain_errors(path):
        # Looked at before it is opened: opening a named pipe would wait for a writer.
        mode = path.stat().st_mode
        if stat.S_ISDIR(mode):
            raise LocalV4Error(f"cannot read {path}: it is a folder, not a file")
        if not stat.S_ISREG(mode):
            raise LocalV4Error(f"cannot read {path}: it is not a regular file")
        return os.open(path, os.O_RDONLY | getattr(os, "O_BINARY", 0))
