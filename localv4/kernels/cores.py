"""The processor's cores that this process may use: which are fast, and which share a core.

Every operating system tells it in its own way. A *cpu* here is what the system schedules on; two of
one core (SMT) share its arithmetic units, so that the second adds nothing to vector code.
"""

import ctypes
import os
import struct
import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

FAST_SHARE = 0.8
"""Share of the largest capacity or clock that makes a core fast: turbo clocks differ by less."""

_SYS, _PROC = Path("/sys"), Path("/proc")


@dataclass(frozen=True, slots=True)
class Cpu:
    """One that this process may use.

    `number` is the system's, within `group` (Windows has groups of 64; elsewhere 0). Those of one
    `core` are siblings. `is_fast` tells performance cores from others, if the machine has both.
    """

    number: int
    core: int
    is_fast: bool = True
    group: int = 0


def usable_cpus() -> list[Cpu]:
    """Return what this process may run on, in the system's order; at least one."""
    try:
        if sys.platform.startswith("linux"):
            cpus = linux_cpus(os.sched_getaffinity(0))
        elif sys.platform == "darwin":
            cpus = macos_cpus(_macos_number)
        elif sys.platform == "win32":
            cpus = windows_cpus(_windows_records(), _windows_affinity())
        else:
            cpus = []
    except (AttributeError, OSError, ValueError, struct.error):
        cpus = []  # a system that keeps it from us, or tells it in another way
    return cpus or [Cpu(number, number) for number in range(os.cpu_count() or 1)]


def quota(sys_root: Path = _SYS, proc: Path = _PROC) -> float:
    """Return how many cores' time a container may use, infinity where there is no limit."""
    limit = float("inf")
    for line in _text(proc / "self/cgroup").splitlines():
        _, controllers, path = line.split(":", 2)
        if controllers == "":
            base = sys_root / "fs/cgroup"
        elif "cpu" in controllers.split(","):
            base = sys_root / "fs/cgroup" / controllers
        else:
            continue
        inner = base / path.lstrip("/")
        # inside a container its own folder is the root, whatever the path outside of it
        for folder in (inner, *inner.parents, base):
            if folder == base or base in folder.parents:
                limit = min(limit, _folder_quota(folder))
    return limit


def pinning_order(cpus: Iterable[Cpu]) -> list[Cpu]:
    """Sort for one thread on each: first of every fast core, first of every other, siblings."""
    seen: set[int] = set()
    firsts: list[Cpu] = []
    siblings: list[Cpu] = []
    for cpu in cpus:
        (siblings if cpu.core in seen else firsts).append(cpu)
        seen.add(cpu.core)
    return sorted(firsts, key=lambda cpu: not cpu.is_fast) + siblings


# --- Linux ---


def linux_cpus(allowed: Iterable[int], sys_root: Path = _SYS) -> list[Cpu]:
    """Return the allowed cpus as /sys describes them; without it each is a fast core."""
    numbers = sorted(allowed)
    fast = _linux_fast(numbers, sys_root)
    cpus = []
    for number in numbers:
        topology = sys_root / f"devices/system/cpu/cpu{number}/topology"
        siblings = _text(topology / "core_cpus_list") or _text(topology / "thread_siblings_list")
        core = min(_numbers(siblings), default=number)
        cpus.append(Cpu(number, core, number in fast))
    return cpus


def _linux_fast(numbers: list[int], sys_root: Path) -> set[int]:
    """Return the performance cores among some cpus; all, if they are alike."""
    intel = set(_numbers(_text(sys_root / "devices/cpu_core/cpus"))) & set(numbers)
    if intel:
        return intel
    for name in ("cpu_capacity", "cpufreq/cpuinfo_max_freq"):
        files = (sys_root / f"devices/system/cpu/cpu{number}/{name}" for number in numbers)
        sizes = [int(_text(file) or 0) for file in files]
        if min(sizes) > 0:
            least = FAST_SHARE * max(sizes)
            return {n for n, size in zip(numbers, sizes, strict=True) if size >= least}
    return set(numbers)


def _numbers(text: str) -> list[int]:
    """Read a list as the kernel writes it: 0-3,8"""
    numbers: list[int] = []
    for part in text.split(","):
        if part:
            first, _, last = part.partition("-")
            numbers.extend(range(int(first), int(last or first) + 1))
    return numbers


def _folder_quota(folder: Path) -> float:
    """Return the limit of one control group: version 2 has one file, version 1 two."""
    given, _, period = _text(folder / "cpu.max").partition(" ")
    if not period:
        given, period = _text(folder / "cpu.cfs_quota_us"), _text(folder / "cpu.cfs_period_us")
    if not period or given in ("", "max", "-1"):
        return float("inf")
    return int(given) / int(period)


def _text(file: Path) -> str:
    try:
        return file.read_text().strip()
    except OSError:
        return ""


# --- macOS ---


def macos_cpus(number_of: Callable[[str], int]) -> list[Cpu]:
    """Return as many as there are cores; `number_of(name)` asks the system, 0 if it does not know.

    Their numbers mean nothing: threads cannot be bound there.
    """
    fast = number_of("hw.perflevel0.physicalcpu") or number_of("hw.physicalcpu")
    slow = number_of("hw.perflevel1.physicalcpu")
    return [Cpu(i, i, i < fast) for i in range(fast + slow)]


def _macos_number(name: str) -> int:
    value = ctypes.c_int(0)
    size = ctypes.c_size_t(ctypes.sizeof(value))
    call = ctypes.CDLL(None).sysctlbyname
    failed = call(name.encode(), ctypes.byref(value), ctypes.byref(size), None, ctypes.c_size_t(0))
    return 0 if failed else value.value


# --- Windows ---

# PROCESSOR_RELATIONSHIP behind relation and size: flags, efficiency class, 20 bytes, group count
_CORE = struct.Struct("<IIBB20xH")
_GROUP_AFFINITY = struct.Struct("<QH6x")
_RELATION_CORE = 0


def windows_cpus(records: bytes, affinity: int) -> list[Cpu]:
    """Read what GetLogicalProcessorInformationEx tells about cores.

    `affinity` is the mask of the process in group 0, 0 if there is none.
    """
    found = []
    at = 0
    while at < len(records):
        relation, size, _, efficiency, groups = _CORE.unpack_from(records, at)
        for i in range(groups if relation == _RELATION_CORE else 0):
            mask, group = _GROUP_AFFINITY.unpack_from(
                records, at + _CORE.size + i * _GROUP_AFFINITY.size
            )
            allowed = mask & affinity if affinity and group == 0 else mask
            found += [(n, at, efficiency, group) for n in range(64) if allowed >> n & 1]
        at += size or len(records)
    best = max((efficiency for _, _, efficiency, _ in found), default=0)
    return [Cpu(n, core, efficiency == best, group) for n, core, efficiency, group in found]


def _windows_records() -> bytes:
    kernel32 = ctypes.windll.kernel32  # type: ignore[attr-defined]
    size = ctypes.c_ulong(0)
    kernel32.GetLogicalProcessorInformationEx(_RELATION_CORE, None, ctypes.byref(size))
    buffer = ctypes.create_string_buffer(size.value)
    done = kernel32.GetLogicalProcessorInformationEx(_RELATION_CORE, buffer, ctypes.byref(size))
    return buffer.raw[: size.value] if done else b""


def _windows_affinity() -> int:
    kernel32 = ctypes.windll.kernel32  # type: ignore[attr-defined]
    mask, system = ctypes.c_size_t(0), ctypes.c_size_t(0)
    process = ctypes.c_void_p(kernel32.GetCurrentProcess())
    kernel32.GetProcessAffinityMask(process, ctypes.byref(mask), ctypes.byref(system))
    return mask.value
