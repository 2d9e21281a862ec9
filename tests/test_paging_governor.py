"""Memory pressure as each system tells it, and a budget that follows it down and up again."""

import ctypes
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
from system_files import write_tree

from localv4.paging import pressure
from localv4.paging.governor import (
    CALM_LOOKS,
    GROWING_LOOKS,
    LEAST_AVAILABLE,
    Governor,
    is_pressed,
)
from localv4.paging.pressure import (
    LinuxGauge,
    PlainGauge,
    Pressure,
    available_bytes,
    open_gauge,
    stalled_seconds,
)

MB = 1 << 20
CALM = Pressure(0.0, 0.0, False, 64 << 30)
STALLED = Pressure(0.5, 0.0, False, 4 << 30)


class FakeGauge:
    """Tells what a test wants."""

    def __init__(self) -> None:
        self.now = CALM

    def read(self) -> Pressure:
        return self.now


class Held:
    """A budget of 1000 MB that a governor changes; keeps a record of how."""

    def __init__(self, least: int = 300 * MB) -> None:
        self.nbytes = 1000 * MB
        self.steps: list[int] = []
        self.gauge = FakeGauge()
        self.governor = Governor(self.nbytes, least, self._shrink, self._grow, self.gauge)

    def _shrink(self, nbytes: int) -> int:
        self.nbytes -= nbytes
        self.steps.append(-nbytes)
        return nbytes

    def _grow(self, nbytes: int) -> int:
        self.nbytes += nbytes
        self.steps.append(nbytes)
        return nbytes

    def look(self, now: Pressure, times: int = 1) -> int:
        """Look some times; return by how much the budget changed."""
        before, self.gauge.now = self.nbytes, now
        for _ in range(times):
            self.governor.look()
        assert self.governor.held == self.nbytes
        return self.nbytes - before


@pytest.mark.parametrize(
    ("reading", "pressed"),
    [
        (CALM, False),
        (Pressure(0.04, 0.0, False, 4 << 30), False),
        (Pressure(0.06, 0.0, False, 4 << 30), True),
        (Pressure(0.06, 0.0, False, 64 << 30), False),
        (Pressure(0.0, 4 * MB, False, 64 << 30), True),
        (Pressure(0.0, 1000.0, False, 64 << 30), False),
        (Pressure(0.0, 0.0, True, 64 << 30), True),
        (Pressure(0.0, 0.0, False, LEAST_AVAILABLE - 1), True),
    ],
)
def test_what_counts_as_pressure(reading: Pressure, pressed: bool) -> None:
    assert is_pressed(reading) is pressed
    held = Held()
    assert held.look(reading) == (-50 * MB if pressed else 0)


def test_each_look_under_pressure_takes_a_step_down_to_the_least() -> None:
    held = Held(least=780 * MB)
    assert held.look(STALLED, 3) == -150 * MB
    assert held.look(STALLED, 5) == -70 * MB
    assert held.nbytes == 780 * MB and held.steps[-1] == -20 * MB


def test_memory_comes_back_slowly_and_not_above_the_budget() -> None:
    held = Held()
    held.look(STALLED, 3)
    assert held.look(CALM, CALM_LOOKS - 1) == 0
    assert held.look(CALM) == 50 * MB
    assert held.look(CALM, GROWING_LOOKS - 1) == 0
    assert held.look(CALM) == 50 * MB
    assert held.look(CALM, 10 * GROWING_LOOKS) == 50 * MB
    assert held.nbytes == held.governor.budget


def test_pressure_ends_the_calm() -> None:
    held = Held()
    held.look(STALLED)
    held.look(CALM, CALM_LOOKS - 1)
    assert held.look(STALLED) == -50 * MB
    assert held.look(CALM, CALM_LOOKS - 1) == 0


def test_growing_that_was_followed_by_pressure_waits_twice_as_long() -> None:
    held = Held()
    held.look(STALLED, 4)
    assert held.look(CALM, CALM_LOOKS) == 50 * MB
    held.look(STALLED)
    assert held.look(CALM, 2 * CALM_LOOKS - 1) == 0
    assert held.look(CALM) == 50 * MB
    held.look(STALLED)
    assert held.look(CALM, 4 * CALM_LOOKS - 1) == 0
    assert held.look(CALM) == 50 * MB


def test_a_long_calm_is_trusted_again() -> None:
    held = Held()
    held.look(STALLED)
    held.look(CALM, CALM_LOOKS)
    held.look(STALLED)  # too early
    held.look(CALM, 10 * CALM_LOOKS)
    assert held.nbytes == held.governor.budget
    held.look(STALLED)
    assert held.look(CALM, CALM_LOOKS) == 50 * MB


def test_nothing_grows_where_there_is_no_room() -> None:
    held = Held()
    held.look(STALLED)
    narrow = Pressure(0.0, 0.0, False, LEAST_AVAILABLE + 99 * MB)
    assert held.look(narrow, 5 * CALM_LOOKS) == 0
    assert held.look(CALM) == 50 * MB


def test_what_was_not_given_back_is_still_held() -> None:
    gauge = FakeGauge()
    gauge.now = STALLED
    governor = Governor(1000 * MB, 0, lambda nbytes: 0, lambda nbytes: nbytes, gauge)
    governor.look()
    assert governor.held == 1000 * MB


def until(condition: object) -> None:
    assert callable(condition)
    end = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.001)


def test_the_thread_looks_until_it_is_closed() -> None:
    held = Held()
    held.gauge.now = STALLED
    held.governor.start(every_s=0.001)
    until(lambda: len(held.steps) >= 3)
    held.governor.close()
    steps = len(held.steps)
    time.sleep(0.02)
    assert len(held.steps) == steps
    assert not any(thread.name == "memory-governor" for thread in threading.enumerate())


def test_an_error_ends_the_thread_and_is_kept() -> None:
    def fail(nbytes: int) -> int:
        raise RuntimeError("no")

    gauge = FakeGauge()
    gauge.now = STALLED
    watched = Governor(1000, 0, fail, fail, gauge)
    watched.start(every_s=0.001)
    until(lambda: watched.failure is not None)
    watched.close()
    assert str(watched.failure) == "no"


# --- Linux ---


def stalls(seconds: float) -> str:
    total = int(seconds * 1e6)
    return (
        f"some avg10=9.00 avg60=0.00 avg300=0.00 total={total}\n"
        "full avg10=0.00 avg60=0.00 avg300=0.00 total=99"
    )


def test_a_pressure_file() -> None:
    assert stalled_seconds(stalls(1.5)) == 1.5
    assert stalled_seconds("") == 0.0


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[float]]:
    """The time, in a list of one."""
    now = [100.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    yield now


def test_linux_tells_what_happened_since_the_last_time(tmp_path: Path, clock: list[float]) -> None:
    files = {"pressure/memory": stalls(5.0), "vmstat": "pswpin 100\npswpout 5"}
    proc = write_tree(tmp_path, files | {"self/cgroup": ""})
    gauge = LinuxGauge(proc, tmp_path / "none")
    clock[0] += 2
    write_tree(tmp_path, {"pressure/memory": stalls(5.5), "vmstat": "pswpin 1124\npswpout 5"})
    reading = gauge.read()
    assert reading.stalled == pytest.approx(0.25)
    assert reading.swapped_in_s == 512 * 4096
    assert not reading.is_warned and reading.available > 0
    clock[0] += 2
    assert gauge.read().stalled == gauge.read().swapped_in_s == 0.0


def test_the_pressure_of_the_own_group_counts_too(tmp_path: Path, clock: list[float]) -> None:
    proc = write_tree(tmp_path / "proc", {"pressure/memory": stalls(0), "self/cgroup": "0::/a/b"})
    groups = write_tree(tmp_path / "groups", {"a/b/memory.pressure": stalls(1)})
    gauge = LinuxGauge(proc, groups)
    clock[0] += 2
    write_tree(groups, {"a/b/memory.pressure": stalls(2)})
    assert gauge.read().stalled == pytest.approx(0.5)


def test_limits_of_groups_bound_what_is_available(tmp_path: Path) -> None:
    proc = write_tree(tmp_path / "proc", {"self/cgroup": "0::/a/b"})
    groups = tmp_path / "groups"
    assert available_bytes(proc, groups) > 1000
    write_tree(groups, {"a/memory.max": "5000", "a/memory.current": "1000"})
    write_tree(groups, {"a/b/memory.max": "max", "a/b/memory.current": "1000"})
    assert available_bytes(proc, groups) == 4000
    write_tree(groups, {"a/memory.stat": "anon 1\ninactive_file 500"})
    assert available_bytes(proc, groups) == 4500
    write_tree(groups, {"a/b/memory.high": "1200"})
    assert available_bytes(proc, groups) == 200
    write_tree(groups, {"a/b/memory.current": "2000"})
    assert available_bytes(proc, groups) == 0


def test_groups_of_version_1(tmp_path: Path) -> None:
    proc = write_tree(tmp_path / "proc", {"self/cgroup": "4:memory:/x\n3:cpu,cpuacct:/y\n0::/"})
    groups = write_tree(
        tmp_path / "groups",
        {
            "memory/x/memory.limit_in_bytes": "9000",
            "memory/x/memory.usage_in_bytes": "2000",
            "memory/x/memory.stat": "total_inactive_file 100",
            "memory/memory.limit_in_bytes": "9223372036854771712",
        },
    )
    assert available_bytes(proc, groups) == 7100


def test_in_a_container_the_own_folder_is_the_root(tmp_path: Path) -> None:
    proc = write_tree(tmp_path / "proc", {"self/cgroup": "0::/docker/0123"})
    groups = write_tree(tmp_path / "groups", {"memory.max": "3000", "memory.current": "1000"})
    assert available_bytes(proc, groups) == 2000


def test_this_machine_has_a_gauge() -> None:
    reading = open_gauge().read()
    assert 0.0 <= reading.stalled <= 1.0
    assert 0 < reading.available <= psutil.virtual_memory().total


# --- others ---


class Alarm:
    """On or off."""

    def __init__(self) -> None:
        self.on = False

    def is_on(self) -> bool:
        return self.on


def test_an_alarm_and_swap(monkeypatch: pytest.MonkeyPatch, clock: list[float]) -> None:
    swapped = [10 * MB]

    class Swap:
        @property
        def sin(self) -> int:
            return swapped[0]

    monkeypatch.setattr(psutil, "swap_memory", Swap)
    alarm = Alarm()
    gauge = PlainGauge(alarm)
    clock[0] += 4
    swapped[0] += 8 * MB
    alarm.on = True
    reading = gauge.read()
    assert (reading.stalled, reading.swapped_in_s, reading.is_warned) == (0.0, 2 * MB, True)


@pytest.mark.parametrize(("level", "is_on"), [(1, False), (2, True), (4, True)])
def test_macos_levels(monkeypatch: pytest.MonkeyPatch, level: int, is_on: bool) -> None:
    class System:
        @staticmethod
        def sysctlbyname(name: bytes, value: object, *rest: object) -> int:
            assert name == b"kern.memorystatus_vm_pressure_level"
            ctypes.cast(value, ctypes.POINTER(ctypes.c_int))[0] = level  # type: ignore[arg-type]
            return 0

    monkeypatch.setattr(ctypes, "CDLL", lambda name: System)
    assert pressure.MacAlarm().is_on() is is_on


@pytest.mark.parametrize("state", [0, 1])
def test_windows_notification(monkeypatch: pytest.MonkeyPatch, state: int) -> None:
    class Create:
        restype: object = None

        def __call__(self, kind: int) -> int:
            assert kind == 0
            return 77

    class Kernel32:
        CreateMemoryResourceNotification = Create()

        @staticmethod
        def QueryMemoryResourceNotification(handle: ctypes.c_void_p, value: object) -> int:
            assert handle.value == 77
            ctypes.cast(value, ctypes.POINTER(ctypes.c_int))[0] = state  # type: ignore[arg-type]
            return 1

    monkeypatch.setattr(ctypes, "WinDLL", lambda name: Kernel32, raising=False)
    assert pressure.WindowsAlarm().is_on() is bool(state)


@pytest.mark.skipif(sys.platform == "linux", reason="has a gauge of its own")
def test_the_alarm_of_this_system_can_be_asked() -> None:
    assert open_gauge().read().is_warned in (True, False)


@pytest.mark.parametrize("error", [RuntimeError("no counters"), OSError(5, "denied")])
def test_swap_that_cannot_be_asked_for_is_none(
    monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    def refuse() -> object:
        raise error

    monkeypatch.setattr(psutil, "swap_memory", refuse)
    assert PlainGauge(pressure.NoAlarm()).read().swapped_in_s == 0
