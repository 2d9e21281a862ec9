"""What reading achieves: bytes per second while busy, time of one record, processor time."""

import threading
import time
from collections import deque
from dataclasses import dataclass

import numpy as np

_LATENCIES = 4096
"""Reads whose times are kept, the latest: percentiles are those of the present, in 32 KiB."""


@dataclass(frozen=True, slots=True)
class ReadStatistics:
    """Reads of records. Times in seconds; `cpu_s` is that of the threads that read.

    `busy_s` is the time in which at least one read was under way, `depth_s` the sum of the times
    of all. The percentiles are those of the latest reads, from their begin to their end.
    """

    nbytes: int
    reads: int
    busy_s: float
    depth_s: float
    cpu_s: float
    p50_s: float
    p99_s: float

    @property
    def bytes_s(self) -> float:
        """Bytes per second while busy."""
        return self.nbytes / self.busy_s if self.busy_s else 0.0

    @property
    def mean_depth(self) -> float:
        """How many reads were under way, on average while there were any."""
        return self.depth_s / self.busy_s if self.busy_s else 0.0

    @property
    def core_s_per_gb(self) -> float:
        """Processor seconds for a gigabyte (10^9 bytes)."""
        return self.cpu_s / self.nbytes * 1e9 if self.nbytes else 0.0

    def since(self, earlier: "ReadStatistics") -> "ReadStatistics":
        """Return what came after an earlier reading; the percentiles stay those of the latest."""
        return ReadStatistics(
            self.nbytes - earlier.nbytes,
            self.reads - earlier.reads,
            self.busy_s - earlier.busy_s,
            self.depth_s - earlier.depth_s,
            self.cpu_s - earlier.cpu_s,
            self.p50_s,
            self.p99_s,
        )


class ReadMeter:
    """Counts reads as they begin and end; whoever calls it holds one lock all the while."""

    def __init__(self) -> None:
        self._nbytes = self._reads = self._under_way = 0
        self._busy_s = self._depth_s = 0.0
        self._busy_since = 0.0
        self._cpu_s: dict[int, float] = {}
        self._latencies: deque[float] = deque(maxlen=_LATENCIES)

    def begin(self, now: float) -> None:
        """Note that a read begins."""
        if self._under_way == 0:
            self._busy_since = now
        self._under_way += 1

    def end(self, begun: float, now: float, nbytes: int) -> None:
        """Note that a read has ended."""
        self._under_way -= 1
        if self._under_way == 0:
            self._busy_s += now - self._busy_since
        self._depth_s += now - begun
        self._latencies.append(now - begun)
        self._nbytes += nbytes
        self._reads += 1

    def add_cpu(self) -> None:
        """Note the processor time that the calling thread has had since it began."""
        self._cpu_s[threading.get_ident()] = time.thread_time()

    def statistics(self) -> ReadStatistics:
        """Return the sums up to now; a read that is under way does not count yet."""
        busy_s = self._busy_s
        if self._under_way:
            busy_s += time.perf_counter() - self._busy_since
        times = np.array(self._latencies or [0.0])
        p50_s, p99_s = np.percentile(times, [50, 99]).tolist()
        return ReadStatistics(
            self._nbytes,
            self._reads,
            busy_s,
            self._depth_s,
            sum(self._cpu_s.values()),
            p50_s,
            p99_s,
        )
