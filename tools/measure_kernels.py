#!/usr/bin/env python3
"""Times the products of one token on the CPU at the dimensions of DeepSeek-V4-Flash.

    measure_kernels.py [--only TEXT] [--threads N] [--rounds 9]

Prints Markdown: the median speed of each product and its share of the read roof, which is measured
with as many threads right before and after each sample; the median of the shares. Operands are
taken in turn from more memory than caches hold.
"""

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

sys.path.insert(0, str(Path(__file__).parent))

import kernel_cases_decode
from kernel_cases import Case, Operands

from localv4.kernels.buffers import aligned_bytes
from localv4.kernels.compiler import Entry
from localv4.kernels.operation import WORDS
from localv4.kernels.team import Team
from localv4.kernels.threads import default_threads
from localv4.planning.roofs import ROOF_BYTES, RoofProbe

LOWEST_BYTE, HIGHEST_BYTE = 0x30, 0x40
"""Random bytes are in between: as parts of floats of any kind they make numbers of moderate size,
no NaN and nothing so small that processors compute it slowly."""


class HostMemory:
    """Memory for the operands of cases."""

    def __init__(self) -> None:
        self._taken: list[NDArray[np.generic]] = []
        random = np.random.default_rng(1)
        self._random = random.integers(LOWEST_BYTE, HIGHEST_BYTE, 64 << 20, np.uint8)

    def random(self, nbytes: int) -> int:
        """Return the address of so many random bytes."""
        own = aligned_bytes(nbytes)
        own[:] = np.resize(self._random, nbytes)
        return self.array(own)

    def array(self, values: NDArray[np.generic]) -> int:
        """Return the address of values that stay."""
        self._taken.append(values)
        address: int = values.ctypes.data
        return address


def program(entry: Entry, operands: Operands, nbytes: int, memory: HostMemory) -> NDArray[np.int64]:
    """Return an operation on copies of its operands, in turn."""
    steps = np.zeros((-(-ROOF_BYTES // nbytes), WORDS), np.int64)
    for step in steps:
        words = operands(memory)
        step[: 1 + len(words)] = (entry.address, *words)
    return steps


def seconds(run: Callable[[], object]) -> float:
    """Return how long something takes."""
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def measure(case: Case, probe: RoofProbe, threads: int, rounds: int) -> tuple[float, float]:
    """Return the median of the bytes per second of a case, and of its shares of the roof."""
    _, entry, operands, nbytes, _ = case
    memory, team = HostMemory(), Team(threads)
    steps, speeds, shares = program(entry, operands, nbytes, memory), [], []
    team.run(steps)
    for _ in range(rounds):
        roof = probe.read_bytes_s()
        speeds.append(nbytes * len(steps) / seconds(lambda: team.run(steps)))
        shares.append(speeds[-1] / max(roof, probe.read_bytes_s()))
    team.close()
    return statistics.median(speeds), statistics.median(shares)


def main() -> None:
    """Measure the cases that are asked for."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", default="", help="cases with this text in their name")
    parser.add_argument("--threads", type=int, default=default_threads())
    parser.add_argument("--rounds", type=int, default=9)
    options = parser.parse_args()
    probe = RoofProbe(options.threads, ROOF_BYTES)
    sys.stdout.write(
        f"{options.threads} threads\n\n| product | GB/s | % of roof |\n|---|--:|--:|\n"
    )
    for case in kernel_cases_decode.products():
        if options.only in case[0]:
            speed, share = measure(case, probe, options.threads, options.rounds)
            sys.stdout.write(f"| {case[0]} | {speed / 1e9:.1f} | {100 * share:.0f} |\n")
            sys.stdout.flush()


if __name__ == "__main__":
    main()
