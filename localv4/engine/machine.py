"""The machine under a benchmark: what it is, what it holds, and who else uses it."""

import os
import platform
import sys
import time
from collections.abc import Iterable
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

import psutil

from localv4 import __version__
from localv4.kernels.isa import ISA
from localv4.planning.processor import cpu_name


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
