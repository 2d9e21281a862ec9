"""Files by offset and address, as each operating system reads them with least effort.

A raw file reads what the system gives at one go, which may be less than was asked for; whatever
follows from that is in `record_file`.
"""

import ctypes
import errno
import os
import sys
from pathlib import Path
from typing import Literal, Protocol

Io = Literal["direct", "buffered"]

ALIGNMENT = 4096
"""What offsets, lengths and addresses are multiples of in a direct read: enough for any disk."""

MOST_AT_ONCE = 1 << 30
"""Bytes of one read; systems end one somewhere below 2 GiB."""

_F_RDAHEAD = 45  # sys/fcntl.h of macOS; the module fcntl lacks it


class RawFile(Protocol):
    """An open file; `io` and `alignment` (1 where nothing has to be aligned) say how it is read."""

    io: Io
    alignment: int

    def read_some(self, address: int, offset: int, nbytes: int) -> int:
        """Read up to `nbytes` to an address; return how many there were, 0 at the end."""

    def stat(self) -> os.stat_result:
        """Return what the system knows of the open file, whatever its name leads to now."""

    def close(self) -> None:
        """Close the file. No read may be under way."""


def open_raw(path: Path, io: Io) -> RawFile:
    """Open a file to be read past the page cache, or through it. Raises OSError."""
    return WindowsFile(path, io) if sys.platform == "win32" else PosixFile(path, io)


def memory(address: int, nbytes: int) -> memoryview:
    """Return writable memory as an object; nothing checks that it exists."""
    view: memoryview = _view(address, nbytes, _WRITABLE)
    return view


_WRITABLE = 0x200  # PyBUF_WRITE
_view = ctypes.pythonapi.PyMemoryView_FromMemory
_view.restype = ctypes.py_object
_view.argtypes = [ctypes.c_void_p, ctypes.c_ssize_t, ctypes.c_int]


class PosixFile:
    """A descriptor and `preadv`, which writes to where the bytes belong and lets others compute.

    Past the page cache means O_DIRECT, or F_NOCACHE on macOS. Through it means that pages are
    dropped behind each read: the arena holds them, and twice is once too often.
    """

    def __init__(self, path: Path, io: Io) -> None:
        self.io: Io = io
        self.alignment = ALIGNMENT if io == "direct" else 1
        flags = os.O_RDONLY | os.O_CLOEXEC
        if io == "direct":
            flags |= getattr(os, "O_DIRECT", 0)
        self._descriptor = os.open(path, flags)
        try:
            self._prepare()
        except BaseException:
            os.close(self._descriptor)
            raise

    def read_some(self, address: int, offset: int, nbytes: int) -> int:
        """Read up to `nbytes` to an address; return how many there were, 0 at the end."""
        target = memory(address, min(nbytes, MOST_AT_ONCE))
        if hasattr(os, "preadv"):
            done = os.preadv(self._descriptor, [target], offset)
        else:
            data = os.pread(self._descriptor, len(target), offset)
            done = len(data)
            target[:done] = data
        if self.io == "buffered" and hasattr(os, "posix_fadvise"):
            os.posix_fadvise(self._descriptor, offset, done, os.POSIX_FADV_DONTNEED)
        return done

    def stat(self) -> os.stat_result:
        """Return what the system knows of the open file, whatever its name leads to now."""
        return os.fstat(self._descriptor)

    def close(self) -> None:
        """Close the file. No read may be under way."""
        os.close(self._descriptor)

    def _prepare(self) -> None:
        if self.io == "buffered":
            if hasattr(os, "posix_fadvise"):  # nothing is read beyond a record
                os.posix_fadvise(self._descriptor, 0, 0, os.POSIX_FADV_RANDOM)
        elif sys.platform == "darwin":
            bypass_cache(self._descriptor)
        elif not hasattr(os, "O_DIRECT"):
            raise OSError(errno.EINVAL, "this system has no direct reads")


def bypass_cache(descriptor: int) -> None:
    """Let what is read and written here not stay in the page cache, where a call does that: macOS.

    What is in the cache already is read from there all the same.
    """
    if sys.platform == "darwin":
        import fcntl

        fcntl.fcntl(descriptor, fcntl.F_NOCACHE, 1)
        fcntl.fcntl(descriptor, _F_RDAHEAD, 0)


class _Overlapped(ctypes.Structure):
    """OVERLAPPED: where a read begins, and the event that tells its end."""

    _fields_ = (
        ("internal", ctypes.c_size_t),
        ("internal_high", ctypes.c_size_t),
        ("offset_low", ctypes.c_uint32),
        ("offset_high", ctypes.c_uint32),
        ("event", ctypes.c_void_p),
    )


def overlapped(offset: int, event: int | None) -> _Overlapped:
    """Return the structure for a read at a 64-bit offset."""
    return _Overlapped(0, 0, offset & 0xFFFFFFFF, offset >> 32, event)


class WindowsFile:
    """A handle whose reads do not wait for one another, as those of an ordinary handle do.

    Past the page cache means FILE_FLAG_NO_BUFFERING. Each read has an event of its own.
    """

    _GENERIC_READ = 0x80000000
    _SHARE_ALL = 0x1 | 0x2 | 0x4
    _OPEN_EXISTING = 3
    _NO_BUFFERING, _OVERLAPPED, _RANDOM_ACCESS = 0x20000000, 0x40000000, 0x10000000
    _HANDLE_EOF, _IO_PENDING = 38, 997

    def __init__(self, path: Path, io: Io) -> None:
        self.io: Io = io
        self.alignment = ALIGNMENT if io == "direct" else 1
        self._kernel32 = _windows_calls()
        mode = self._NO_BUFFERING if io == "direct" else self._RANDOM_ACCESS
        handle = self._kernel32.CreateFileW(
            str(path),
            self._GENERIC_READ,
            self._SHARE_ALL,
            None,
            self._OPEN_EXISTING,
            mode | self._OVERLAPPED,
            None,
        )
        if handle in (None, ctypes.c_void_p(-1).value):
            raise _windows_error(_last_error(), str(path))
        self._handle: int = handle
        import msvcrt

        # for fstat; closing the descriptor closes the handle
        self._descriptor = msvcrt.open_osfhandle(handle, os.O_RDONLY)  # type: ignore[attr-defined]

    def read_some(self, address: int, offset: int, nbytes: int) -> int:
        """Read up to `nbytes` to an address; return how many there were, 0 at the end."""
        event = self._kernel32.CreateEventW(None, True, False, None)
        if not event:
            raise _windows_error(_last_error())
        try:
            return self._wait_for(address, overlapped(offset, event), min(nbytes, MOST_AT_ONCE))
        finally:
            self._kernel32.CloseHandle(event)

    def _wait_for(self, address: int, where: _Overlapped, nbytes: int) -> int:
        """Begin a read and wait for its end: memory must not be written to once this returns."""
        done = ctypes.c_uint32(0)
        pointer = ctypes.byref(where)
        if not self._kernel32.ReadFile(self._handle, address, nbytes, None, pointer):
            failed = _last_error()
            if failed == self._HANDLE_EOF:
                return 0
            if failed != self._IO_PENDING:
                raise _windows_error(failed)
        if not self._kernel32.GetOverlappedResult(self._handle, pointer, ctypes.byref(done), True):
            failed = _last_error()
            if failed == self._HANDLE_EOF:
                return 0
            raise _windows_error(failed)
        return done.value

    def stat(self) -> os.stat_result:
        """Return what the system knows of the open file, whatever its name leads to now."""
        return os.fstat(self._descriptor)

    def close(self) -> None:
        """Close the file. No read may be under way."""
        os.close(self._descriptor)


def _windows_calls() -> ctypes.CDLL:
    """Return kernel32 with the types of the calls that are used: handles are 64 bits wide."""
    kernel32: ctypes.CDLL = ctypes.WinDLL("kernel32", use_last_error=True)  # type: ignore[attr-defined]
    pointer, number = ctypes.c_void_p, ctypes.c_uint32
    text, truth = ctypes.c_wchar_p, ctypes.c_int
    kernel32.CreateFileW.restype = pointer
    kernel32.CreateFileW.argtypes = [text, number, number, pointer, number, number, pointer]
    kernel32.CreateEventW.restype = pointer
    kernel32.CreateEventW.argtypes = [pointer, truth, truth, text]
    kernel32.ReadFile.argtypes = [pointer, pointer, number, pointer, pointer]
    kernel32.GetOverlappedResult.argtypes = [pointer, pointer, pointer, truth]
    kernel32.CloseHandle.argtypes = [pointer]
    return kernel32


def _last_error() -> int:
    code: int = ctypes.get_last_error()  # type: ignore[attr-defined]
    return code


def _windows_error(code: int, path: str | None = None) -> OSError:
    text: str = ctypes.FormatError(code)  # type: ignore[attr-defined]
    return OSError(0, text.strip(), path, code)
