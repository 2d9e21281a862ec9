"""Brings mapped records into memory before they are needed, in a thread, without haste."""

import ctypes
import mmap
import sys
import threading
from collections.abc import Iterable

PIECE_BYTES = 64 << 20
"""What is brought in at a time; between two pieces the thread can be stopped."""

_POPULATE_READ, _WILLNEED = 22, 3  # of Linux 5.14 and later; of every POSIX system


class Populator:
    """Goes through ranges of mapped memory (address, bytes) once.

    A page that a token needs before comes in by itself. Nothing is done on systems without the
    call; an error, such as a file that was cut, ends it: whoever reads there will meet the same.
    """

    def __init__(self, ranges: Iterable[tuple[int, int]]) -> None:
        self._ranges = list(ranges)
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="populate", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Stop soon."""
        self._stop.set()

    def wait(self) -> None:
        """Wait until everything is in memory, or nothing more will be."""
        self._thread.join()

    def _run(self) -> None:
        try:
            madvise = ctypes.CDLL(None, use_errno=True).madvise
        except (AttributeError, OSError, TypeError):
            return  # Windows
        madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
        advice = _POPULATE_READ if sys.platform == "linux" else _WILLNEED
        for address, nbytes in self._ranges:
            start = address // mmap.PAGESIZE * mmap.PAGESIZE
            for at in range(start, address + nbytes, PIECE_BYTES):
                length = min(PIECE_BYTES, address + nbytes - at)
                if self._stop.is_set():
                    return
                if madvise(at, length, advice) and madvise(at, length, _WILLNEED) != 0:
                    return
