#!/usr/bin/env python3
"""Times the CUDA kernels at the dimensions of DeepSeek-V4-Flash on a GPU; prints Markdown.

    python tools/measure_cuda_kernels.py [decode] [many] [rest] [--only TEXT]

Shares are those of what a copy inside the GPU reads and writes together, and of the bf16 peak
(--peak TFLOP/s), in the same run. Operands are taken from memory that no cache holds.
"""

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

sys.path.insert(0, str(Path(__file__).parent))

import kernel_cases_decode
import kernel_cases_many
import kernel_cases_rest

from localv4.cuda.driver import CudaGpu
from localv4.cuda.gpu import GpuError, Launch
from localv4.cuda.probe import measure
from localv4.cuda.program import twin_of
from localv4.cuda.twin import SCRATCH
from localv4.kernels.compiler import Entry
from localv4.kernels.operation import WORDS

CACHE_BYTES = 400 << 20
"""Copies of operands are made until they are larger than this, so that no cache helps."""

MOST_COPIES, LEAST_RUNS = 32, 20


class DeviceMemory:
    """Memory of a GPU for the operands of cases; all of it is given back at the end of one."""

    def __init__(self, gpu: CudaGpu) -> None:
        self._gpu = gpu
        self._taken: list[int] = []
        self._random = np.random.default_rng(1).integers(0, 256, 64 << 20, np.uint8)

    def random(self, nbytes: int) -> int:
        """Return the address of so many random bytes."""
        address = self._take(nbytes)
        for start in range(0, nbytes, self._random.nbytes):
            part = min(self._random.nbytes, nbytes - start)
            self._gpu.upload(address + start, self._random.ctypes.data, part)
        return address

    def array(self, values: NDArray[np.generic]) -> int:
        """Return the address of a copy."""
        own = np.ascontiguousarray(values)
        address = self._take(own.nbytes)
        self._gpu.upload(address, own.ctypes.data, own.nbytes)
        self._gpu.synchronize()
        return address

    def scratch(self, nbytes: int) -> int:
        """Return memory of any content."""
        return self._take(nbytes)

    def _take(self, nbytes: int) -> int:
        self._taken.append(self._gpu.allocate(max(nbytes, 256)))
        return self._taken[-1]

    def free(self) -> None:
        """Give everything back."""
        self._gpu.synchronize()
        while self._taken:
            self._gpu.free(self._taken.pop())


def launches(
    memory: DeviceMemory, operations: Sequence[tuple[Entry, Sequence[int]]]
) -> list[Launch]:
    """Return the launches of operations that run one after the other."""
    owned: dict[tuple[int, int], int] = {}
    found = []
    for entry, operands in operations:
        twin = twin_of(entry)
        words = [0, *operands, *[0] * (WORDS - 1 - len(operands))]
        if needed := twin.scratch(words):
            key = (words[twin.owner] if twin.owner else -len(found), needed)
            if key not in owned:
                owned[key] = memory.scratch(needed)
            words[SCRATCH] = owned[key]
        for kernel in twin.kernels:
            if blocks := kernel.blocks(words):
                found.append(Launch(kernel, blocks, kernel.shared(words), tuple(words)))
    return found


def time_s(
    gpu: CudaGpu,
    memory: DeviceMemory,
    make: Callable[[], Sequence[tuple[Entry, Sequence[int]]]],
    nbytes: int,
) -> float:
    """Return the seconds of one run of some operations, in a graph of several copies of them."""
    copies = max(1, min(MOST_COPIES, CACHE_BYTES // max(1, nbytes)))
    steps = [[[launch]] for _ in range(copies) for launch in launches(memory, make())]
    recording = gpu.record(steps)
    runs = max(1, LEAST_RUNS // copies)
    gpu.seconds(recording.replay, 2)
    return min(gpu.seconds(recording.replay, runs) for _ in range(3)) / copies


def main() -> None:
    """Run the cases that are asked for."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("areas", nargs="*", default=["decode", "many", "rest"])
    parser.add_argument("--only", default="")
    parser.add_argument("--peak", type=float, default=790.0, help="bf16 TFLOP/s of the GPU")
    options = parser.parse_args()
    gpu = CudaGpu(0)
    memory, speed = DeviceMemory(gpu), measure(gpu)
    sys.stdout.write(f"{gpu.name}: copies {speed.copy_bytes_s / 1e9:.0f} GB/s, ")
    _say(f"from the host {speed.upload_bytes_s / 1e9:.1f} GB/s\n")
    _say("| case | µs | GB/s | % of copy | TFLOP/s | % of bf16 |\n|---|--:|--:|--:|--:|--:|")
    modules = {"decode": kernel_cases_decode, "many": kernel_cases_many, "rest": kernel_cases_rest}
    for area in options.areas:
        cases = [
            (name, [(entry, operands)], nbytes, flops)
            for name, entry, operands, nbytes, flops in modules[area].cases()
        ]
        if area == "rest":
            cases += kernel_cases_rest.chains()
        for name, operations, nbytes, flops in cases:
            if options.only not in name:
                continue

            def make(operations: Sequence = operations) -> Sequence:
                if callable(operations):
                    return operations(memory)
                return [(entry, operands(memory)) for entry, operands in operations]

            try:
                seconds = time_s(gpu, memory, make, nbytes)
            except (GpuError, AssertionError, KeyError) as error:
                _say(f"| {name} | {error} |")
                memory.free()
                continue
            rate, speed_flops = nbytes / seconds, flops / seconds
            _say(
                f"| {name} | {1e6 * seconds:.1f} | {rate / 1e9:.0f} | "
                f"{100 * rate / speed.copy_bytes_s:.0f} | {speed_flops / 1e12:.1f} | "
                f"{100 * speed_flops / 1e12 / options.peak:.0f} |"
            )
            memory.free()


def _say(line: str) -> None:
    sys.stdout.write(f"{line}\n")
    sys.stdout.flush()


if __name__ == "__main__":
    main()
