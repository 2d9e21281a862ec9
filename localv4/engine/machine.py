"""The machine under a benchmark: what it is, what it can do at best, and who else uses it."""

import ctypes
import ctypes.util
import os
import platform
import sys
import time
from collections.abc import Iterable
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

import numpy as np
import psutil

from localv4 import __version__
from localv4.kernels import probes
from localv4.kernels.buffers import aligned_bytes
from localv4.kernels.isa import ISA
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

MAX_CPU_INFO_BYTES = 1 << 16


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
        start, sums = self._buffer.ctypes.data, self._sums.ctypes.data
        pieces = max(1, self._buffer.nbytes // PIECE_BYTES)
        piece = min(PIECE_BYTES, self._buffer.nbytes // 512 * 512)
        read = (probes.read_roof.address, start, piece, pieces, sums)
        read_s = min(self._pass_s(*read) for _ in range(PASSES))
        while self._multiply_s() < SHORTEST_PASS_S:
            self._rounds *= 2
        multiply_s = min(self._multiply_s() for _ in range(PASSES))
        operations = self._team.members * probes.dot_roof_operations(self._rounds)
        return Roof(pieces * piece / read_s, operations / multiply_s)

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


@dataclass(frozen=True, slots=True)
class CpuTimes:
    """Seconds since some start: wall clock, one process, everybody, and what was withheld."""

    wall_s: float
    own_s: float
    busy_s: float
    stolen_s: float


def cpu_times(pid: int | None = None) -> CpuTimes:
    """Return where processor time has gone so far; `pid` names another process than this one.

    Raises ProcessLookupError if there is none.
    """
    everybody = psutil.cpu_times()._asdict()
    try:
        own = psutil.Process(pid).cpu_times()
    except psutil.NoSuchProcess:
        raise ProcessLookupError(f"there is no process {pid}") from None
    names = ("user", "nice", "system", "irq", "softirq", "interrupt", "dpc")
    return CpuTimes(
        wall_s=time.perf_counter(),
        own_s=own.user + own.system,
        busy_s=sum(everybody.get(name, 0.0) for name in names),
        stolen_s=everybody.get("steal", 0.0),  # by the hypervisor; only Linux tells
    )


def foreign_cores(before: CpuTimes, after: CpuTimes) -> float:
    """Return how many cores' worth of time others used or the hypervisor withheld in between."""
    wall_s = max(after.wall_s - before.wall_s, 1e-9)
    foreign_s = (after.busy_s - before.busy_s) - (after.own_s - before.own_s)
    return (max(0.0, foreign_s) + after.stolen_s - before.stolen_s) / wall_s


def available_bytes() -> int:
    """Return the memory that programs can have now; cached files make room."""
    return int(psutil.virtual_memory().available)


def resident_bytes() -> int:
    """Return the memory that this process holds now, mapped pages included."""
    return int(psutil.Process().memory_info().rss)


def peak_resident_bytes() -> int:
    """Return the most memory that this process has held, mapped pages included."""
    if sys.platform == "linux":
        # getrusage would count the process that started this one, up to the exec
        for line in Path("/proc/self/status").read_text("ascii", "replace").splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    if sys.platform == "win32":
        return int(psutil.Process().memory_info().peak_wset)
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def resident_file_bytes(paths: Iterable[Path]) -> int | None:
    """Return how much of some mapped files is in this process now; None where nobody tells."""
    maps = getattr(psutil.Process(), "memory_maps", None)  # macOS keeps this to itself
    if maps is None:
        return None
    wanted = {os.path.realpath(path) for path in paths}
    return sum(int(part.rss) for part in maps(grouped=True) if part.path in wanted)


def machine_facts() -> dict[str, str | int | None]:
    """Return what a reader of figures must know of this machine; no names of host or user."""
    return {
        "cpu": cpu_name(),
        "isa": ISA.level,
        "physical_cores": psutil.cpu_count(logical=False),
        "logical_cores": psutil.cpu_count(),
        "ram_bytes": int(psutil.virtual_memory().total),
        "os": f"{platform.system()} {platform.release()}",
        "architecture": platform.machine(),
        "localv4": __version__,
        "python": platform.python_version(),
        "numpy": version("numpy"),
        "numba": version("numba"),
        "llvmlite": version("llvmlite"),
    }


def cpu_name() -> str:
    """Return the processor's own name, or the best that the system tells."""
    name = None
    if sys.platform == "linux":
        name = _linux_cpu_name(Path("/proc/cpuinfo"))
    elif sys.platform == "darwin":
        name = _darwin_cpu_name()
    elif sys.platform == "win32":
        name = os.environ.get("PROCESSOR_IDENTIFIER")
    return name or platform.processor() or platform.machine()


def _linux_cpu_name(path: Path) -> str | None:
    try:
        with path.open(encoding="utf-8", errors="replace") as file:
            lines = file.read(MAX_CPU_INFO_BYTES).splitlines()
    except OSError:
        return None
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, None)


def _darwin_cpu_name() -> str | None:
    system = ctypes.CDLL(ctypes.util.find_library("c"))
    text, size = ctypes.create_string_buffer(256), ctypes.c_size_t(256)
    failed = system.sysctlbyname(
        b"machdep.cpu.brand_string", text, ctypes.byref(size), None, ctypes.c_size_t(0)
    )
    return None if failed else text.value.decode("utf-8", "replace")
