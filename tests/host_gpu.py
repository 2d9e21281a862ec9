"""A GPU that is none: kernels compiled for the host, memory that no host address reaches."""

import ctypes
from collections.abc import Callable, Sequence

import numpy as np
from cuda_twins import launch
from numpy.typing import NDArray

from localv4.cuda.gpu import GpuMemoryError, Step

LINE = 256


class HostGpu:
    """`localv4.cuda.gpu.Gpu` by the CPU, with so many bytes of memory."""

    name = "a GPU of the tests"

    def __init__(self, total_bytes: int = 1 << 30) -> None:
        self.total_bytes = total_bytes
        self.launches = 0
        self.ready = set[str]()
        self.late = set[str]()
        self._blocks: dict[int, NDArray[np.uint8]] = {}

    def free_bytes(self) -> int:
        return self.total_bytes - sum(block.nbytes for block in self._blocks.values())

    def allocate(self, nbytes: int) -> int:
        if nbytes > self.free_bytes():
            raise GpuMemoryError("the GPU has not enough free memory")
        block = np.full(nbytes + LINE, 0xA5, np.uint8)  # never zeros by luck
        address = -(-block.ctypes.data // LINE) * LINE
        self._blocks[address] = block
        return address

    def free(self, address: int) -> None:
        self._blocks.pop(address).fill(0x5A)

    def upload(self, address: int, host: int, nbytes: int) -> None:
        self._check(address, nbytes)
        ctypes.memmove(address, host, nbytes)

    def download(self, host: int, address: int, nbytes: int) -> None:
        self._check(address, nbytes)
        ctypes.memmove(host, address, nbytes)

    def ask(self, requests: Sequence[tuple[int, int, int]]) -> Callable[[], None]:
        taken = [(host, ctypes.string_at(address, nbytes)) for host, address, nbytes in requests]

        def wait() -> None:
            for host, content in taken:
                ctypes.memmove(host, content, len(content))

        return wait

    def copy(self, target: int, source: int, nbytes: int) -> None:
        self._check(target, nbytes)
        self._check(source, nbytes)
        ctypes.memmove(target, source, nbytes)

    def mark(self) -> int:
        return self.launches

    def new_lane(self, nbytes: int) -> "_Lane":
        return _Lane(self, nbytes)

    def make_ready(
        self, sources: Sequence[str], on_compile: Callable[[int, int], None] | None = None
    ) -> None:
        self.ready.update(sources)
        if on_compile is not None:
            on_compile(len(sources), len(sources))

    def run(self, steps: Sequence[Step]) -> None:
        for step in steps:
            for branch in step:
                for one in branch:
                    self.launches += 1
                    self.late |= {one.kernel.source} - self.ready
                    launch(one.kernel, one.words, one.blocks)

    def record(self, steps: Sequence[Step]) -> "_Recording":
        return _Recording(self, steps)

    def synchronize(self) -> None:
        pass

    def close(self) -> None:
        self._blocks.clear()

    def _check(self, address: int, nbytes: int) -> None:
        for start, block in self._blocks.items():
            if start <= address and address + nbytes <= block.ctypes.data + block.nbytes:
                return
        raise AssertionError(f"{nbytes} bytes at {address:#x} are not memory of the GPU")


class _Recording:
    def __init__(self, gpu: HostGpu, steps: Sequence[Step]) -> None:
        self._gpu, self._steps = gpu, steps

    def replay(self) -> None:
        self._gpu.run(self._steps)


class _Lane:
    def __init__(self, gpu: HostGpu, nbytes: int) -> None:
        self._gpu = gpu
        self._memory = np.zeros(nbytes, np.uint8)
        self.buffer: int = self._memory.ctypes.data

    def follow(self, mark: int) -> None:
        assert mark <= self._gpu.launches

    def send(self, address: int, nbytes: int) -> None:
        self._gpu.upload(address, self.buffer, nbytes)

    def wait(self) -> None:
        pass
