"""Measures what a GPU can do: how fast it reads its memory, is filled, and multiplies."""

import numpy as np

from localv4.cuda.driver import CudaGpu
from localv4.cuda.gpu import GpuMemoryError, Launch
from localv4.cuda.program import name_of
from localv4.cuda.speed import GpuSpeed
from localv4.cuda.twins import TWINS
from localv4.kernels.activations import row_bytes
from localv4.kernels.formats import OPERATIONS
from localv4.kernels.gemm import SPARE_TOKENS
from localv4.kernels.operation import WORDS
from localv4.kernels.packed import GROUP_ROWS, MX4, packed_bytes

MIB = 1 << 20

COPY_BYTES = 1024 * MIB
"""Copied inside the GPU: much more than its caches hold."""

LEAST_BYTES = 16 * MIB

UPLOAD_BYTES = 64 * MIB

REPEATS = 10

PRODUCT_ROWS, PRODUCT_COLS, PRODUCT_TOKENS = 2048, 4096, 1024
"""A product of gate or up of an expert of V4-Flash, with a prompt."""

GEMM = name_of(OPERATIONS[MX4.name].gemm)
F32_BYTES = 4


def measure(gpu: CudaGpu) -> GpuSpeed:
    """Measure in a tenth of a second; raises GpuMemoryError when too little memory is free.

    Kernels that were never compiled for this GPU are compiled now, in a few seconds.
    """
    return GpuSpeed(copy_bytes_s(gpu), _upload_bytes_s(gpu), product_ops_s(gpu))


def copy_bytes_s(gpu: CudaGpu) -> float:
    """Return the bytes that a copy inside the GPU reads and writes in a second.

    Raises GpuMemoryError when too little memory is free.
    """
    size = COPY_BYTES
    while 3 * size > gpu.free_bytes():
        size //= 2
        if size < LEAST_BYTES:
            raise GpuMemoryError("the GPU has not enough free memory to be measured")
    source, target = gpu.allocate(size), gpu.allocate(size)
    try:
        gpu.copy(target, source, size)
        seconds = [gpu.seconds(lambda: gpu.copy(target, source, size), 3) for _ in range(REPEATS)]
    finally:
        gpu.free(source)
        gpu.free(target)
    return 2 * size / min(seconds)


def _upload_bytes_s(gpu: CudaGpu) -> float:
    """Return the bytes that come from pinned memory of the host in a second."""
    target, lane = gpu.allocate(UPLOAD_BYTES), gpu.new_lane(UPLOAD_BYTES)
    try:
        seconds = min(lane.seconds(target, UPLOAD_BYTES) for _ in range(REPEATS))
    finally:
        lane.close()
        gpu.free(target)
    return UPLOAD_BYTES / seconds


def product_ops_s(
    gpu: CudaGpu,
    rows: int = PRODUCT_ROWS,
    cols: int = PRODUCT_COLS,
    tokens: int = PRODUCT_TOKENS,
) -> float:
    """Return the operations per second of a product of MX4 weights with many tokens."""
    room = tokens + SPARE_TOKENS
    sizes = [
        packed_bytes(MX4, rows, cols),
        *(room * nbytes for nbytes in row_bytes(cols)),
        F32_BYTES * rows * room,
    ]
    places: list[int] = []
    try:
        for nbytes in sizes:
            places.append(gpu.allocate(nbytes))
            content = np.ones(nbytes, np.uint8)  # as floats tiny numbers, as codes all the same
            gpu.upload(places[-1], content.ctypes.data, nbytes)
        weights, *inputs, out = places
        words = (0, weights, rows // GROUP_ROWS, cols, *inputs, tokens, out, F32_BYTES * rows, 0)
        padded = (*words, *[0] * (WORDS - len(words)))
        launches = [
            Launch(kernel, blocks, kernel.shared(padded), padded)
            for kernel in TWINS[GEMM].kernels
            if (blocks := kernel.blocks(padded)) > 0
        ]
        gpu.run([[launches]])
        seconds = min(gpu.seconds(lambda: gpu.run([[launches]]), 3) for _ in range(REPEATS))
    finally:
        gpu.synchronize()
        for place in places:
            gpu.free(place)
    return 2 * rows * cols * tokens / seconds
