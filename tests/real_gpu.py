"""Running twins on a real GPU in tests: LOCALV4_TEST_GPU=1.

Kernels get the very addresses of the host: all memory of this process is registered with the
driver while one runs, so the GPU reads and writes it over the bus. Slow, and true.
"""

import functools
import os
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from localv4.cuda.driver import CudaGpu
from localv4.cuda.gpu import Launch
from localv4.cuda.twin import Kernel

IS_WANTED = os.environ.get("LOCALV4_TEST_GPU") == "1"

PORTABLE_AND_MAPPED = 3


@functools.cache
def gpu() -> CudaGpu:
    """The first GPU."""
    return CudaGpu(0)


def launch(kernel: Kernel, words: Sequence[int]) -> None:
    """Run one kernel on memory of the host, and wait."""
    device = gpu()
    blocks = kernel.blocks(words)
    if blocks:
        with _registered_memory():
            device.run([[[Launch(kernel, blocks, kernel.shared(words), tuple(words))]]])
            device.synchronize()


@contextmanager
def _registered_memory() -> Iterator[None]:
    """Make all writable anonymous memory known to the driver.

    Not for longer than a launch: memory that is freed meanwhile would be replaced by other pages
    at its addresses, of which the GPU knows nothing.
    """
    from cuda.bindings import driver

    registered = []
    for line in Path("/proc/self/maps").read_text().splitlines():
        found = re.match(r"([0-9a-f]+)-([0-9a-f]+) rw-p \S+ \S+ 0\s*(\[heap\])?$", line)
        if found:
            start, end = int(found[1], 16), int(found[2], 16)
            status = driver.cuMemHostRegister(start, end - start, PORTABLE_AND_MAPPED)[0]
            if int(status) == 0:
                registered.append(start)
    try:
        yield
    finally:
        for start in registered:
            driver.cuMemHostUnregister(start)
