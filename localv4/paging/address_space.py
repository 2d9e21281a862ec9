"""Anonymous memory by address: reserved as a whole, filled as it is used, given back in parts.

Every difference between operating systems that the arena would have to know is here.
"""

import contextlib
import ctypes
import mmap
import sys

HUGE_BYTES = 2 << 20
"""A large page. Smaller parts of one stay with the process when the system is given the rest."""

_COMMIT_STEP = 64 << 20

# winnt.h
_MEM_COMMIT, _MEM_RESERVE, _MEM_DECOMMIT, _MEM_RELEASE = 0x1000, 0x2000, 0x4000, 0x8000
_PAGE_READWRITE = 4

_MAP_FIXED = 0x10  # the same on Linux, macOS and the BSDs; the module mmap lacks it


class PosixSpace:
    """Private pages of zeros that appear when they are written; large ones where there are any.

    `base` is their first address, a multiple of HUGE_BYTES. Raises MemoryError if the system does
    not let the process have so many.
    """

    def __init__(self, nbytes: int, *, huge: bool) -> None:
        flags = mmap.MAP_PRIVATE | mmap.MAP_ANON | getattr(mmap, "MAP_NORESERVE", 0)
        try:
            self._map = mmap.mmap(-1, nbytes + HUGE_BYTES, flags=flags)
        except (OSError, ValueError, OverflowError) as error:
            raise MemoryError(f"no {nbytes} bytes of addresses: {error}") from error
        first = ctypes.addressof(ctypes.c_char.from_buffer(self._map))
        self._offset = -first % HUGE_BYTES
        self.base = first + self._offset
        # Whole large pages only: one that reached beyond the end could be filled by one access.
        self._advise("MADV_HUGEPAGE", nbytes // HUGE_BYTES * HUGE_BYTES if huge else 0)
        # A device that writes into pages which a fork has just shared can miss its target.
        self._advise("MADV_DONTFORK", nbytes)

    def commit(self, end: int) -> None:
        """Make the first `end` bytes usable: they are, from the start."""

    def prefer_large_pages(self, nbytes: int) -> None:
        """Ask for large pages for the first `nbytes`, now that most of each will be used."""
        self._advise("MADV_HUGEPAGE", nbytes // HUGE_BYTES * HUGE_BYTES)

    def release(self, start: int, end: int) -> None:
        """Give bytes from `start` to `end` back to the system; they read as zeros after that."""
        if start >= end:
            return
        if sys.platform.startswith("linux"):
            self._map.madvise(mmap.MADV_DONTNEED, self._offset + start, end - start)
        else:
            _map_anew(self.base + start, end - start)  # DONTNEED is a mere hint there

    def close(self) -> None:
        """Give everything back; no address is valid after that."""
        self._map.close()

    def _advise(self, name: str, nbytes: int) -> None:
        advice = getattr(mmap, name, None)
        if advice is not None and nbytes:
            with contextlib.suppress(OSError):  # a kernel that does not know it
                self._map.madvise(advice, self._offset, nbytes)


def _map_anew(address: int, nbytes: int) -> None:
    """Put fresh pages of zeros in the place of mapped ones, which gives those back at once."""
    system = ctypes.CDLL(None, use_errno=True).mmap
    system.restype = ctypes.c_void_p
    system.argtypes = [ctypes.c_void_p, ctypes.c_size_t, *[ctypes.c_int] * 3, ctypes.c_int64]
    protection = mmap.PROT_READ | mmap.PROT_WRITE
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANON | _MAP_FIXED
    if system(address, nbytes, protection, flags, -1, 0) != address:
        raise OSError(ctypes.get_errno(), "memory cannot be given back")


class WindowsSpace:
    """As `PosixSpace`, of VirtualAlloc: reserved pages cannot even be read before `commit`."""

    def __init__(self, nbytes: int, step: int) -> None:
        kernel32 = ctypes.WinDLL("kernel32", use_last_error=True)  # type: ignore[attr-defined]
        self._allocate, self._free = kernel32.VirtualAlloc, kernel32.VirtualFree
        pointer, size, flags = ctypes.c_void_p, ctypes.c_size_t, ctypes.c_ulong
        self._allocate.restype, self._allocate.argtypes = pointer, [pointer, size, flags, flags]
        self._free.argtypes = [pointer, size, flags]
        self._nbytes, self._step = nbytes, step
        self._committed = 0
        self._first = self._allocate(None, nbytes + HUGE_BYTES, _MEM_RESERVE, _PAGE_READWRITE)
        if not self._first:
            raise MemoryError(f"no {nbytes} bytes of addresses")
        self.base = -(-self._first // HUGE_BYTES) * HUGE_BYTES

    def commit(self, end: int) -> None:
        """Make the first `end` bytes usable; raises MemoryError if the system has no more."""
        if end <= self._committed:
            return
        target = min(-(-end // self._step) * self._step, self._nbytes)
        start, nbytes = self.base + self._committed, target - self._committed
        if not self._allocate(start, nbytes, _MEM_COMMIT, _PAGE_READWRITE):
            raise MemoryError(f"the system has no {nbytes} more bytes of memory")
        self._committed = target

    def prefer_large_pages(self, nbytes: int) -> None:
        """Do nothing: Windows gives them to administrators only."""

    def release(self, start: int, end: int) -> None:
        """Give bytes from `start` on back to the system, those up to `end` and beyond."""
        if start < self._committed:
            self._free(self.base + start, self._committed - start, _MEM_DECOMMIT)
            self._committed = start

    def close(self) -> None:
        """Give everything back; no address is valid after that."""
        if self._first:
            self._free(self._first, 0, _MEM_RELEASE)
            self._first = 0


AddressSpace = PosixSpace | WindowsSpace


def reserve(nbytes: int, *, huge: bool, step: int = _COMMIT_STEP) -> AddressSpace:
    """Reserve `nbytes` of addresses in the way of this system. Raises MemoryError.

    `huge` asks for large pages. Windows gives them to administrators only. It lets have memory by
    `step` bytes.
    """
    return WindowsSpace(nbytes, step) if sys.platform == "win32" else PosixSpace(nbytes, huge=huge)
