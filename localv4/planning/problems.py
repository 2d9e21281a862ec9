"""What keeps this machine from its best, and what to do about it."""

from dataclasses import dataclass
from pathlib import Path

from localv4.planning import system
from localv4.planning.machine import Machine
from localv4.planning.plan import GIB, gib

LEAST_FREE_DISK = 20 * GIB
"""Less is soon full: a model takes 80 GiB and more."""

LOW_AVAILABLE = 0.5
"""Less of the memory available than this share: other programs have it."""

SLOW_DISK_BYTES_S = 1e9


@dataclass(frozen=True, slots=True)
class Problem:
    """Something found, and its remedy."""

    what: str
    remedy: str


def find_problems(machine: Machine, sys_root: Path = system.SYS) -> list[Problem]:
    """Look at memory, clock, power and disk; changes nothing."""
    return [*_memory_problems(machine, sys_root), *_other_problems(machine, sys_root)]


def _memory_problems(machine: Machine, sys_root: Path) -> list[Problem]:
    memory, found = machine.memory, []
    if memory.limit is not None:
        found.append(
            Problem(
                f"a container or control group allows {gib(memory.limit)} of {gib(memory.total)}",
                "start it with a higher memory limit",
            )
        )
    if memory.available < LOW_AVAILABLE * memory.most:
        found.append(
            Problem(
                f"only {gib(memory.available)} of {gib(memory.most)} are available",
                "close other programs: what they hold, experts cannot have",
            )
        )
    if system.huge_pages(sys_root) == "never":
        found.append(
            Problem(
                "large pages are switched off: kernels read memory more slowly",
                "echo madvise | sudo tee /sys/kernel/mm/transparent_hugepage/enabled",
            )
        )
    if machine.swap_is_compressed:
        found.append(
            Problem(
                "swap lies in memory (zram): what is swapped out still takes memory",
                "leave more to other programs with --reserve, so that nothing is swapped",
            )
        )
    return found


def _other_problems(machine: Machine, sys_root: Path) -> list[Problem]:
    found = []
    if system.governor(sys_root) == "powersave" and not _is_intel_pstate(sys_root):
        found.append(
            Problem(
                "the clock is governed to save power",
                "choose the power profile for performance",
            )
        )
    if system.runs_on_battery():
        found.append(Problem("the battery is being emptied", "plug the computer in"))
    if machine.disk_free is not None and machine.disk_free < LEAST_FREE_DISK:
        found.append(
            Problem(
                f"the disk has {gib(machine.disk_free)} left",
                "make room, or set LOCALV4_HOME and HF_HOME to another disk",
            )
        )
    if machine.disk is not None and machine.disk.bytes_s < SLOW_DISK_BYTES_S:
        found.append(
            Problem(
                f"the disk reads {machine.disk.bytes_s / 1e9:.2f} GB/s at random",
                "keep models that do not fit into memory on an NVMe drive",
            )
        )
    return found


def _is_intel_pstate(sys_root: Path) -> bool:
    """Say whether the driver is one whose `powersave` reaches the full clock when it is busy."""
    driver = sys_root / "devices/system/cpu/cpu0/cpufreq/scaling_driver"
    try:
        return driver.read_text("utf-8").strip() in ("intel_pstate", "amd-pstate-epp")
    except OSError:
        return False
