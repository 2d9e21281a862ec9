"""Whether memory is short: what each operating system tells of it, in one place."""

import ctypes
import sys
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import psutil

from localv4.paging.control_groups import (
    CGROUPS,
    PROC,
    counter,
    group_folders,
    memory_limits,
    text_of,
)


@dataclass(frozen=True, slots=True)
class Pressure:
    """How short memory was since the last reading.

    `stalled` is the share of that time in which some program waited for memory, `swapped_in_s` what
    came back from swap, in bytes per second; both are 0 where the system does not tell.
    `is_warned` says that the system itself asks programs to use less, `available` how many bytes
    there are.
    """

    stalled: float
    swapped_in_s: float
    is_warned: bool
    available: int


class Gauge(Protocol):
    """Reads the pressure, each time since the time before."""

    def read(self) -> Pressure:
        """Return the pressure since the last call; the first one has no share of time."""


def open_gauge() -> Gauge:
    """Return the gauge of this system."""
    if sys.platform.startswith("linux"):
        return LinuxGauge()
    if sys.platform == "darwin":
        return PlainGauge(MacAlarm())
    if sys.platform == "win32":
        return PlainGauge(WindowsAlarm())
    return PlainGauge(NoAlarm())


def available_bytes(proc: Path = PROC, cgroups: Path = CGROUPS) -> int:
    """Return the memory that this process can have now: what is free, or its groups' limits leave.

    Cached files make room, in the system and in a control group.
    """
    free = int(psutil.virtual_memory().available)
    return max(0, min([free, *(limit.left for limit in memory_limits(proc, cgroups))]))


# --- Linux ---


class LinuxGauge:
    """Pressure stall information of the system and of the control group, and pages swapped in.

    The totals of both readings are compared. The averages that the kernel keeps go on for ten
    seconds after memory was given back, and would have it given back again.
    """

    def __init__(self, proc: Path = PROC, cgroups: Path = CGROUPS) -> None:
        self._proc, self._cgroups = proc, cgroups
        self._last = self._totals()

    def read(self) -> Pressure:
        """Return the pressure since the last call."""
        before, self._last = self._last, self._totals()
        now = self._last
        passed_s = now.at_s - before.at_s
        stalled_s = max(
            (b - a for a, b in zip(before.stalled_s, now.stalled_s, strict=False)), default=0.0
        )
        swapped = max(0, now.swapped_in - before.swapped_in)
        return Pressure(
            stalled=min(1.0, stalled_s / passed_s) if passed_s > 0 else 0.0,
            swapped_in_s=swapped / passed_s if passed_s > 0 else 0.0,
            is_warned=False,
            available=available_bytes(self._proc, self._cgroups),
        )

    def _totals(self) -> "_Totals":
        group = next(group_folders(self._proc, self._cgroups), None)
        files = [self._proc / "pressure/memory"]
        if group is not None:
            files.append(group / "memory.pressure")
        return _Totals(
            time.monotonic(),
            tuple(stalled_seconds(text_of(file)) for file in files),
            counter(text_of(self._proc / "vmstat"), "pswpin") * 4096,
        )


@dataclass(frozen=True, slots=True)
class _Totals:
    """Sums since the system was started."""

    at_s: float
    stalled_s: tuple[float, ...]
    swapped_in: int


def stalled_seconds(text: str) -> float:
    """Return how long some program has waited, of what the kernel calls a pressure file."""
    for line in text.splitlines():
        words = line.split()
        if words and words[0] == "some":
            fields = dict(word.partition("=")[::2] for word in words[1:])
            return int(fields.get("total", "0")) / 1e6
    return 0.0


# --- macOS, Windows and others ---


class Alarm(Protocol):
    """A system's own sign that memory is short."""

    def is_on(self) -> bool:
        """Say whether the system asks programs to use less memory."""


class PlainGauge:
    """A system's own alarm, and swap by psutil, which counts on macOS only."""

    def __init__(self, alarm: Alarm) -> None:
        self._alarm = alarm
        self._last = self._swapped()

    def read(self) -> Pressure:
        """Return the pressure since the last call."""
        (then_s, before), self._last = self._last, self._swapped()
        now_s, now = self._last
        passed_s = now_s - then_s
        return Pressure(
            stalled=0.0,
            swapped_in_s=max(0, now - before) / passed_s if passed_s > 0 else 0.0,
            is_warned=self._alarm.is_on(),
            available=available_bytes(),
        )

    def _swapped(self) -> tuple[float, int]:
        swapped = 0
        with suppress(OSError, RuntimeError):  # Windows whose performance counters are off
            swapped = int(psutil.swap_memory().sin)
        return time.monotonic(), swapped


class NoAlarm:
    """A system that tells nothing."""

    def is_on(self) -> bool:
        """Say no."""
        return False


class MacAlarm:
    """The level that macOS tells all programs: 1 normal, 2 warning, 4 critical."""

    _WARNING = 2

    def is_on(self) -> bool:
        """Say whether the level is above normal."""
        level, size = ctypes.c_int(0), ctypes.c_size_t(ctypes.sizeof(ctypes.c_int))
        failed = ctypes.CDLL(None).sysctlbyname(
            b"kern.memorystatus_vm_pressure_level",
            ctypes.byref(level),
            ctypes.byref(size),
            None,
            ctypes.c_size_t(0),
        )
        return not failed and level.value >= self._WARNING


class WindowsAlarm:
    """The notification of Windows that physical memory runs low."""

    _LOW_MEMORY = 0  # LowMemoryResourceNotification

    def __init__(self) -> None:
        self._kernel32 = ctypes.WinDLL("kernel32")  # type: ignore[attr-defined]
        self._kernel32.CreateMemoryResourceNotification.restype = ctypes.c_void_p
        self._handle = self._kernel32.CreateMemoryResourceNotification(self._LOW_MEMORY)

    def is_on(self) -> bool:
        """Say whether the notification is set now."""
        state = ctypes.c_int(0)
        handle = ctypes.c_void_p(self._handle)
        done = self._kernel32.QueryMemoryResourceNotification(handle, ctypes.byref(state))
        return bool(done and state.value)
