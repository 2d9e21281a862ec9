"""Write a long file past the page cache, from two blocks of memory that are used in turn.

A conversion writes more than memory holds. In the page cache each page would have to be found and
filled, which costs more processor time than all else but the digest, and what others have there
would be pushed out.
"""

import errno
import mmap
import os
from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType

import numpy as np
from numpy.typing import NDArray

Bytes = NDArray[np.uint8]

BLOCK_BYTES = 1 << 22
"""What is written at a time; a whole number of the pages and sectors of any disk."""


class DirectWriter:
    """Writes an open file from its start; one block is on its way while the next is filled.

    The last block, which may be no whole number of sectors, and files of a system or a disk that
    has no direct writes go through the page cache.
    """

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor
        self._blocks = (_pages(BLOCK_BYTES), _pages(BLOCK_BYTES))
        self._turn = 0
        self._filled = 0
        self._pending: Future[None] | None = None
        self._thread = ThreadPoolExecutor(1, "writing")

    def __enter__(self) -> "DirectWriter":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Write what is left unless an error has come before."""
        try:
            if kind is None:
                self._wait()
                _set_direct(self._descriptor, False)
                _write_all(self._descriptor, self._blocks[self._turn][: self._filled])
        finally:
            self._thread.shutdown()

    def write(self, piece: Bytes) -> None:
        """Take bytes over. Raises OSError, also for those of earlier calls."""
        while len(piece):
            taken = min(len(piece), BLOCK_BYTES - self._filled)
            block = self._blocks[self._turn]
            block[self._filled : self._filled + taken] = piece[:taken]
            self._filled += taken
            piece = piece[taken:]
            if self._filled == BLOCK_BYTES:
                self._send()

    def _send(self) -> None:
        """Have the full block written; the other one is free when the write before is done."""
        if self._pending is None:
            _set_direct(self._descriptor, True)
        self._wait()
        block = self._blocks[self._turn]
        self._pending = self._thread.submit(_write_all, self._descriptor, block)
        self._turn, self._filled = 1 - self._turn, 0

    def _wait(self) -> None:
        if self._pending is not None:
            self._pending.result()


def _pages(nbytes: int) -> Bytes:
    """Return memory that starts on a page, which direct writes ask for."""
    return np.frombuffer(mmap.mmap(-1, nbytes), np.uint8)


def _write_all(descriptor: int, block: Bytes) -> None:
    left = block.data
    while left:
        try:
            left = left[os.write(descriptor, left) :]
        except OSError as error:
            # A file system may take the flag and refuse the write.
            if error.errno != errno.EINVAL or not _set_direct(descriptor, False):
                raise


def _set_direct(descriptor: int, direct: bool) -> bool:
    """Turn direct writes on, where the system has them, or off; tell whether that is a change."""
    flag = getattr(os, "O_DIRECT", 0)
    if not flag:
        return False
    import fcntl

    flags = fcntl.fcntl(descriptor, fcntl.F_GETFL)
    if bool(flags & flag) == direct:
        return False
    try:
        fcntl.fcntl(descriptor, fcntl.F_SETFL, flags ^ flag)
    except OSError as error:
        if error.errno != errno.EINVAL:
            raise
        return False
    return True
