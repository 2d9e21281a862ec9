"""Measures what a GPU can do: how fast it reads its memory, and how fast it is filled."""

from dataclasses import dataclass

from localv4.cuda.driver import CudaGpu
from localv4.cuda.gpu import GpuMemoryError

MIB = 1 << 20

COPY_BYTES = 1024 * MIB
"""Copied inside the GPU: much more than its caches hold."""

LEAST_BYTES = 16 * MIB

UPLOAD_BYTES = 64 * MIB

REPEATS = 10


@dataclass(frozen=True, slots=True)
class GpuSpeed:
    """Bytes per second: read and written together by a copy inside the GPU, and from the host."""

    copy_bytes_s: float
    upload_bytes_s: float


def measure(gpu: CudaGpu) -> GpuSpeed:
    """Measure in a tenth of a second; raises GpuMemoryError when too little memory is free."""
    size = COPY_BYTES
    while 3 * size > gpu.free_bytes():
        size //= 2
        if size < LEAST_BYTES:
            raise GpuMemoryError("the GPU has not enough free memory to be measured")
    source, target = gpu.allocate(size), gpu.allocate(size)
    try:
        gpu.copy(target, source, size)
        copy_s = min(gpu.seconds(lambda: gpu.copy(target, source, size), 3) for _ in range(REPEATS))
        lane = gpu.new_lane(UPLOAD_BYTES)
        upload_s = min(lane.seconds(target, min(size, UPLOAD_BYTES)) for _ in range(REPEATS))
        lane.close()
    finally:
        gpu.free(source)
        gpu.free(target)
    return GpuSpeed(2 * size / copy_s, min(size, UPLOAD_BYTES) / upload_s)
