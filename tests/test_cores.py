"""Threads go to physical performance cores, as each system describes them."""

import os
import struct
import sys
from pathlib import Path

import pytest
from system_files import write_tree

from localv4.kernels import cores, threads
from localv4.kernels.cores import (
    Cpu,
    linux_cpus,
    macos_cpus,
    pinning_order,
    quota,
    usable_cpus,
    windows_cpus,
)

INFINITE = float("inf")


def cpu_files(
    siblings: list[str], name: str = "", values: list[int] | None = None
) -> dict[str, str]:
    """The files of /sys for each cpu: which share its core, and a number of the kind `name`."""
    base = "devices/system/cpu/cpu"
    files = {f"{base}{i}/topology/core_cpus_list": text for i, text in enumerate(siblings)}
    return files | {f"{base}{i}/{name}": str(value) for i, value in enumerate(values or [])}


def fast(cpus: list[Cpu]) -> list[int]:
    """The numbers of the performance cores."""
    return [cpu.number for cpu in cpus if cpu.is_fast]


def test_linux_siblings_share_a_core(tmp_path: Path) -> None:
    write_tree(tmp_path, cpu_files(["0,2", "1,3", "0,2", "1,3"]))
    cpus = linux_cpus({0, 1, 2, 3}, tmp_path)
    assert [cpu.core for cpu in cpus] == [0, 1, 0, 1] and fast(cpus) == [0, 1, 2, 3]
    assert [cpu.number for cpu in linux_cpus({3, 1}, tmp_path)] == [1, 3]


def test_linux_siblings_by_the_older_name(tmp_path: Path) -> None:
    base = "devices/system/cpu/cpu"
    write_tree(tmp_path, {f"{base}{i}/topology/thread_siblings_list": "0-1" for i in range(2)})
    assert [cpu.core for cpu in linux_cpus({0, 1}, tmp_path)] == [0, 0]


def test_linux_hybrid_of_intel(tmp_path: Path) -> None:
    pairs = ["0-1", "0-1", "2-3", "2-3", "4", "5", "6", "7"]
    write_tree(tmp_path, cpu_files(pairs) | {"devices/cpu_core/cpus": "0-3"})
    write_tree(tmp_path, {"devices/cpu_atom/cpus": "4-7"})
    cpus = linux_cpus(range(8), tmp_path)
    assert fast(cpus) == [0, 1, 2, 3] and len({cpu.core for cpu in cpus}) == 6
    # bound to the small cores alone, those are the fastest there are
    assert fast(linux_cpus({5, 6}, tmp_path)) == [5, 6]


@pytest.mark.parametrize(
    ("name", "values", "expected"),
    [
        ("cpu_capacity", [400, 400, 1024, 1009], [2, 3]),
        ("cpu_capacity", [1024] * 4, [0, 1, 2, 3]),
        ("cpufreq/cpuinfo_max_freq", [5_100_000, 5_000_000, 3_300_000, 3_300_000], [0, 1]),
        ("cpufreq/cpuinfo_max_freq", [4_700_000, 4_500_000], [0, 1, 2, 3]),  # not known of all
    ],
)
def test_linux_by_capacity_or_clock(
    name: str, values: list[int], expected: list[int], tmp_path: Path
) -> None:
    write_tree(tmp_path, cpu_files(["0", "1", "2", "3"], name, values))
    assert fast(linux_cpus(range(4), tmp_path)) == expected


def test_linux_capacity_counts_before_the_clock(tmp_path: Path) -> None:
    write_tree(tmp_path, cpu_files(["0", "1"], "cpu_capacity", [1024, 300]))
    write_tree(tmp_path, cpu_files(["0", "1"], "cpufreq/cpuinfo_max_freq", [3_000_000, 3_000_000]))
    assert fast(linux_cpus(range(2), tmp_path)) == [0]


def test_linux_that_tells_nothing(tmp_path: Path) -> None:
    assert linux_cpus({2, 5}, tmp_path) == [Cpu(2, 2), Cpu(5, 5)]


@pytest.mark.parametrize(
    ("groups", "files", "expected"),
    [
        ("0::/", {"cpu.max": "250000 100000"}, 2.5),
        ("0::/", {"cpu.max": "max 100000"}, INFINITE),
        ("0::/", {}, INFINITE),
        ("0::/a/b", {"a/cpu.max": "300000 100000", "a/b/cpu.max": "max 100000"}, 3.0),
        ("0::/outside/of/it", {"cpu.max": "100000 100000"}, 1.0),
        (
            "4:memory:/a\n3:cpu,cpuacct:/a",
            {
                "cpu,cpuacct/a/cpu.cfs_quota_us": "50000",
                "cpu,cpuacct/a/cpu.cfs_period_us": "100000",
            },
            0.5,
        ),
        (
            "3:cpu:/",
            {"cpu/cpu.cfs_quota_us": "-1", "cpu/cpu.cfs_period_us": "100000"},
            INFINITE,
        ),
        ("3:cpuset:/", {"cpuset/cpu.cfs_quota_us": "1", "cpuset/cpu.cfs_period_us": "1"}, INFINITE),
    ],
)
def test_quota(groups: str, files: dict[str, str], expected: float, tmp_path: Path) -> None:
    proc = write_tree(tmp_path / "proc", {"self/cgroup": groups})
    root = write_tree(tmp_path / "sys", {f"fs/cgroup/{name}": text for name, text in files.items()})
    assert quota(root, proc) == expected


def test_quota_where_there_are_no_groups(tmp_path: Path) -> None:
    assert quota(tmp_path, tmp_path) == INFINITE


@pytest.mark.parametrize(
    ("answers", "count", "expected"),
    [
        ({"hw.perflevel0.physicalcpu": 8, "hw.perflevel1.physicalcpu": 4}, 12, list(range(8))),
        ({"hw.physicalcpu": 6}, 6, list(range(6))),
        ({}, 0, []),
    ],
)
def test_macos(answers: dict[str, int], count: int, expected: list[int]) -> None:
    cpus = macos_cpus(lambda name: answers.get(name, 0))
    assert len(cpus) == count and fast(cpus) == expected


def windows_core(mask: int, efficiency: int, group: int = 0) -> bytes:
    """One record of a processor core."""
    head = struct.pack("<IIBB20xH", 0, 48, 0, efficiency, 1)
    return head + struct.pack("<QH6x", mask, group)


def test_windows() -> None:
    records = windows_core(0b11, 1) + windows_core(0b1100, 1) + windows_core(0b10000, 0)
    cpus = windows_cpus(records, 0)
    assert [cpu.number for cpu in cpus] == [0, 1, 2, 3, 4] and fast(cpus) == [0, 1, 2, 3]
    assert len({cpu.core for cpu in cpus}) == 3
    assert [cpu.number for cpu in windows_cpus(records, 0b10110)] == [1, 2, 4]
    assert fast(windows_cpus(records, 0b10000)) == [4]


def test_windows_with_more_than_64() -> None:
    records = windows_core(1, 0) + windows_core(1, 0, 1)
    assert [(cpu.number, cpu.group) for cpu in windows_cpus(records, 0b1)] == [(0, 0), (0, 1)]


def test_windows_other_records_are_skipped() -> None:
    other = struct.pack("<II24x", 2, 32)
    assert windows_cpus(other + windows_core(1, 0) + other, 0) == [Cpu(0, 32)]


def test_order_of_pinning() -> None:
    slow, first, sibling, second = (
        Cpu(0, 0, is_fast=False),
        Cpu(1, 1),
        Cpu(2, 1),
        Cpu(3, 3),
    )
    assert pinning_order([slow, first, sibling, second]) == [first, second, slow, sibling]


def test_this_machine() -> None:
    cpus = usable_cpus()
    assert len(cpus) == len({(cpu.group, cpu.number) for cpu in cpus}) >= 1
    assert any(cpu.is_fast for cpu in cpus)
    if hasattr(os, "sched_getaffinity"):
        assert {cpu.number for cpu in cpus} == os.sched_getaffinity(0)


@pytest.mark.parametrize("platform", ["linux", "darwin", "win32", "plan9"])
def test_any_other_machine_counts_its_processors(
    platform: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def unknown(*_: object) -> None:
        raise OSError("no such call")

    for name in ("linux_cpus", "_macos_number", "_windows_records"):
        monkeypatch.setattr(cores, name, unknown)
    monkeypatch.setattr(sys, "platform", platform)
    monkeypatch.setattr(os, "cpu_count", lambda: 3)
    assert usable_cpus() == [Cpu(0, 0), Cpu(1, 1), Cpu(2, 2)]


@pytest.mark.parametrize(
    ("limit", "most", "default", "processors"),
    [(INFINITE, 99, 2, 5), (2.9, 99, 2, 2), (1.9, 99, 1, 1), (0.5, 99, 1, 1), (INFINITE, 1, 1, 5)],
)
def test_threads(
    limit: float, most: int, default: int, processors: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    cpus = [Cpu(0, 0), Cpu(1, 0), Cpu(2, 2), Cpu(3, 2), Cpu(4, 4, is_fast=False)]
    monkeypatch.setattr(threads, "usable_cpus", lambda: cpus)
    monkeypatch.setattr(threads, "quota", lambda: limit)
    monkeypatch.setattr(threads, "most_threads", lambda: most)
    assert threads.default_threads() == default
    assert threads.usable_processors() == processors
