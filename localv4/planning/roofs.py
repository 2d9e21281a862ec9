"""What a machine can do at best in a second: bytes that threads read, operations that they do."""

import time
from dataclasses import dataclass

import numpy as np

from localv4.kernels import probes
from localv4.kernels.buffers import aligned_bytes
from localv4.kernels.operation import WORDS
from localv4.kernels.team import Team

ROOF_BYTES = 1 << 30
"""Memory that the read roof is measured on: larger than the last-level caches."""

PIECE_BYTES = 1 << 20
"""Memory that a thread reads at a time; who is faster reads more of them."""

PASSES = 5
"""Times that a roof is measured; the best one counts."""

SHORTEST_PASS_S = 0.02
"""The integer peak is measured over at least this time."""


@dataclass(frozen=True, slots=True)
class Roof:
    """What all threads reach together: bytes read per second, int8 operations per second."""

    read_bytes_s: float
    int8_ops_s: float


class RoofProbe:
    """Measures the roofs with `threads` threads; holds a buffer of `nbytes` all the while.

    Raises MemoryError if there is no memory for the buffer.
    """

    def __init__(self, threads: int, nbytes: int) -> None:
        self._team = Team(threads)
        self._buffer = aligned_bytes(nbytes)
        self._buffer.fill(1)  # untouched pages would all be one page of zeros, in the cache
        self._sums = np.zeros((threads, 8), np.int64)
        self._rounds = 1 << 12

    def measure(self) -> Roof:
        """Return the best of a few passes of each probe."""
        read = max(self.read_bytes_s() for _ in range(PASSES))
        while self._multiply_s() < SHORTEST_PASS_S:
            self._rounds *= 2
        multiply_s = min(self._multiply_s() for _ in range(PASSES))
        operations = self._team.members * probes.dot_roof_operations(self._rounds)
        return Roof(read, operations / multiply_s)

    def read_bytes_s(self) -> float:
        """Return the bytes per second of one pass over the buffer."""
        start, sums = self._buffer.ctypes.data, self._sums.ctypes.data
        pieces = max(1, self._buffer.nbytes // PIECE_BYTES)
        piece = min(PIECE_BYTES, self._buffer.nbytes // 512 * 512)
        taken_s = self._pass_s(probes.read_roof.address, start, piece, pieces, sums)
        return pieces * piece / taken_s

    def _multiply_s(self) -> float:
        start, sums = self._buffer.ctypes.data, self._sums.ctypes.data
        return self._pass_s(probes.dot_roof.address, start, self._rounds, sums)

    def _pass_s(self, *words: int) -> float:
        """Return the seconds that the team takes for an operation."""
        program = np.zeros((1, WORDS), np.int64)
        program[0, : len(words)] = words
        start = time.perf_counter()
        self._team.run(program)
        return time.perf_counter() - start
