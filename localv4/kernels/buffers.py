"""Memory for packed weights: starts on a cache line, may be read ahead of, large pages if any."""

import contextlib
import mmap

import numpy as np
from numpy.typing import NDArray

LINE_BYTES = 64
# Kernels ask for lines this far ahead of what they read; the slack keeps that inside the buffer.
SLACK_BYTES = 8192
# From this size on the operating system is asked for memory directly.
LARGE_BYTES = 1 << 20


def aligned_bytes(nbytes: int) -> NDArray[np.uint8]:
    """Return `nbytes` zero bytes that start on a cache line, with slack behind them.

    Raises MemoryError if there is no such memory.
    """
    if nbytes >= LARGE_BYTES:
        pages = _private_pages(nbytes + SLACK_BYTES)
        if pages is not None:
            return np.frombuffer(pages, np.uint8)[:nbytes]
    raw = np.zeros(nbytes + SLACK_BYTES + LINE_BYTES, np.uint8)
    start = -raw.ctypes.data % LINE_BYTES
    return raw[start : start + nbytes]


def _private_pages(nbytes: int) -> mmap.mmap | None:
    """Map private memory and ask for large pages; a shared map, the default, never gets them."""
    private = getattr(mmap, "MAP_PRIVATE", None)
    anonymous = getattr(mmap, "MAP_ANONYMOUS", None)
    if private is None or anonymous is None:
        return None
    try:
        pages = mmap.mmap(-1, nbytes, flags=private | anonymous)
    except OSError:
        return None  # NumPy's allocator tells in its own words if memory is short
    advice = getattr(mmap, "MADV_HUGEPAGE", None)
    if advice is not None:
        with contextlib.suppress(OSError):  # a kernel without large pages
            pages.madvise(advice)
    return pages
