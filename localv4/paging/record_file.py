"""One file of records, read to addresses, past the page cache where the system can."""

import ctypes
import errno
import stat
import threading
from dataclasses import dataclass
from pathlib import Path
from typing import Self

import numpy as np
from numpy.typing import NDArray

from localv4.errors import BadFileError, LocalV4Error, NotFoundError
from localv4.paging.raw_file import ALIGNMENT, Io, RawFile, open_raw

_BOUNCE_BYTES = 1 << 20
"""What is not aligned is read in pieces of this size and copied; a multiple of ALIGNMENT."""

_REFUSALS = {errno.EINVAL, errno.EOPNOTSUPP, errno.ENOTSUP, errno.ENOSYS}
"""How systems say that a file system has no direct reads."""


@dataclass(frozen=True, slots=True)
class _Mark:
    """What tells that an open file is still what it was."""

    device: int
    inode: int
    size: int
    mtime_ns: int


class RecordFile:
    """An open file; any number of threads may read it at once.

    `io` says how it is read, `refusal` why that is not what was asked for. Reads whose offset and
    address leave the same rest when divided by `alignment` reach memory without being copied, but
    for a few bytes at their ends. `raw` is the file as the system reads it.
    """

    def __init__(self, path: Path, raw: RawFile, refusal: str | None = None) -> None:
        self.path = path
        self.io: Io = raw.io
        self.alignment = raw.alignment
        self.refusal = refusal
        self.raw = raw
        self._mark = _mark(raw)
        self.size = self._mark.size

    @classmethod
    def open(cls, path: Path, io: Io) -> Self:
        """Open a regular file. Where "direct" is refused (tmpfs, some overlays) it is "buffered".

        Raises NotFoundError, LocalV4Error if the system refuses, BadFileError for what is no file.
        """
        try:
            if not stat.S_ISREG(path.stat().st_mode):  # a pipe could wait for ever
                raise BadFileError(path, "is not a regular file")
            if io == "direct":
                try:
                    return cls(path, _tried(open_raw(path, "direct")))
                except OSError as error:
                    if error.errno not in _REFUSALS:
                        raise
                    refusal = f"{path} cannot be read past the page cache: {error.strerror}"
                    return cls(path, open_raw(path, "buffered"), refusal)
            return cls(path, open_raw(path, "buffered"))
        except (FileNotFoundError, NotADirectoryError) as error:
            raise NotFoundError(f"no {path.name} in {path.parent}") from error
        except OSError as error:
            raise LocalV4Error(f"cannot read {path}: {error.strerror or error}") from error

    def read(self, address: int, offset: int, nbytes: int) -> None:
        """Read exactly `nbytes` at `offset` to an address.

        Raises OSError as the system does, EOFError if the file ends before.
        """
        end = offset + nbytes
        while offset < end:
            done = self._read_some(address, offset, end - offset)
            if done == 0:
                raise EOFError(f"{self.path} ends at {offset}, {end - offset} bytes too early")
            address, offset = address + done, offset + done

    def check_unchanged(self) -> None:
        """Raise BadFileError when the open file was written to or cut since it was opened."""
        try:
            now = _mark(self.raw)
        except OSError as error:
            raise LocalV4Error(f"cannot read {self.path}: {error.strerror or error}") from error
        if now.size != self.size:
            detail = f"the file changed while in use: it had {self.size} bytes, now {now.size}"
            raise BadFileError(self.path, detail)
        if now != self._mark:
            raise BadFileError(self.path, "the file changed while in use: it was written to")

    def close(self) -> None:
        """Close the file. No read may be under way."""
        self.raw.close()

    def _read_some(self, address: int, offset: int, nbytes: int) -> int:
        """Read once, straight to where it belongs if both places are aligned."""
        past = offset % self.alignment
        if (address - offset) % self.alignment:
            return self._read_copied(address, offset, min(nbytes, _BOUNCE_BYTES - past))
        if past or nbytes < self.alignment:
            return self._read_copied(address, offset, min(nbytes, self.alignment - past))
        return self.raw.read_some(address, offset, nbytes - nbytes % self.alignment)

    def _read_copied(self, address: int, offset: int, nbytes: int) -> int:
        """Read whole blocks that hold the bytes to a buffer of this thread; copy what was meant."""
        past = offset % self.alignment
        whole = -(-(past + nbytes) // self.alignment) * self.alignment
        buffer = _bounce_buffer()
        done = self.raw.read_some(buffer, offset - past, whole)
        wanted = max(0, min(done - past, nbytes))
        ctypes.memmove(address, buffer + past, wanted)
        return wanted


_bounce = threading.local()


def _bounce_buffer() -> int:
    """Return the address of _BOUNCE_BYTES that this thread alone uses, for all files."""
    if not hasattr(_bounce, "memory"):
        _bounce.memory = _aligned(_BOUNCE_BYTES)
    address: int = _bounce.memory.ctypes.data
    return address


def _tried(raw: RawFile) -> RawFile:
    """Return a file that was read once: some systems open what they then refuse to read."""
    block = _aligned(ALIGNMENT)
    try:
        raw.read_some(block.ctypes.data, 0, ALIGNMENT)
    except BaseException:
        raw.close()
        raise
    return raw


def _aligned(nbytes: int) -> NDArray[np.uint8]:
    memory = np.empty(nbytes + ALIGNMENT, np.uint8)
    start = -memory.ctypes.data % ALIGNMENT
    return memory[start : start + nbytes]


def _mark(raw: RawFile) -> _Mark:
    now = raw.stat()
    return _Mark(now.st_dev, now.st_ino, now.st_size, now.st_mtime_ns)
