"""Running twins on a real GPU in tests: LOCALV4_TEST_GPU=1.

Kernels get the very addresses of the host: all memory of this process is registered with the
driver, so the GPU reads and writes it over the bus. Slow, and true.
"""

import ctypes
import functools
import os
import re
from collections.abc import Sequence
from pathlib import Path

from localv4.cuda.driver import CudaGpu
from localv4.cuda.gpu import Launch
from localv4.cuda.twin import Kernel

IS_WANTED = os.environ.get("LOCALV4_TEST_GPU") == "1"

PAGE = 4096
PORTABLE_AND_MAPPED = 3

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # malloc.h

if IS_WANTED:
    # memory that the driver knows must not be given back: other memory would come to its place
    _libc = ctypes.CDLL(None)
    _libc.mallopt(M_MMAP_THRESHOLD, 32 << 20)  # the most that it takes
    _libc.mallopt(M_TRIM_THRESHOLD, (1 << 31) - 1)

_registered: list[tuple[int, int]] = []


@functools.cache
def gpu() -> CudaGpu:
    """The first GPU."""
    return CudaGpu(0)


def launch(kernel: Kernel, words: Sequence[int], blocks: int) -> None:
    """Run one kernel on memory of the host, and wait."""
    device = gpu()
    _register_all(device)
    if blocks:
        device.run([[[Launch(kernel, blocks, kernel.shared(words), tuple(words))]]])
        device.synchronize()


def _register_all(device: CudaGpu) -> None:
    """Make all writable anonymous memory known to the driver that is not yet."""
    from cuda.bindings import driver

    for line in Path("/proc/self/maps").read_text().splitlines():
        found = re.match(r"([0-9a-f]+)-([0-9a-f]+) rw-p \S+ \S+ 0\s*(\[heap\])?$", line)
        if not found:
            continue
        start, end = int(found[1], 16), int(found[2], 16)
        for first, last in _parts(start, end):
            status = driver.cuMemHostRegister(first, last - first, PORTABLE_AND_MAPPED)[0]
            if int(status) == 0:
                _registered.append((first, last))
            elif os.environ.get("LOCALV4_TEST_GPU_VERBOSE"):
                print(f"not registered: {first:#x}-{last:#x} {status}")


def _parts(start: int, end: int) -> list[tuple[int, int]]:
    """Return what is not registered of a range."""
    parts, at = [], start
    for first, last in sorted(_registered):
        if last <= at or first >= end:
            continue
        if first > at:
            parts.append((at, first))
        at = max(at, last)
    if at < end:
        parts.append((at, end))
    return parts
