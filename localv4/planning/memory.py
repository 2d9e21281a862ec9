"""The memory of this machine as it is now, and what limits this process to less."""

import os
import sys
from dataclasses import dataclass
from pathlib import Path

import psutil

CGROUP_ROOT = Path("/sys/fs/cgroup")
MAX_FILE_BYTES = 1 << 12


@dataclass(frozen=True, slots=True)
class Memory:
    """Bytes of memory. `limit` is that of a container or control group, None without one.

    `available` is what programs can have now, cached files making room, within the limit.
    """

    total: int
    available: int
    limit: int | None = None
    swap_total: int = 0
    swap_used: int = 0

    @property
    def most(self) -> int:
        """What this process could ever have."""
        return self.total if self.limit is None else min(self.total, self.limit)


def read_memory(cgroup_root: Path = CGROUP_ROOT) -> Memory:
    """Look at the memory of this machine and the limits of this process; takes a millisecond."""
    virtual, swap = psutil.virtual_memory(), psutil.swap_memory()
    total, available = int(virtual.total), int(virtual.available)
    limit, room = None, available
    if sys.platform == "linux":
        limit, room = _cgroup_limit(cgroup_root)
    if limit is not None and limit >= total:
        limit = None
    if limit is not None:
        available = min(available, room)
    return Memory(total, available, limit, int(swap.total), int(swap.used))


def _cgroup_limit(root: Path) -> tuple[int | None, int]:
    """Return the lowest memory.max from this process's group upwards, and the room below it.

    Cached files count as used there, but make room as everywhere: they are not counted.
    """
    limit, room = None, 0
    for folder in _own_groups(root):
        most, used = _number(folder / "memory.max"), _number(folder / "memory.current")
        if most is None or used is None:
            continue
        free = max(0, most - used + _statistic(folder / "memory.stat", "inactive_file"))
        room = free if limit is None else min(room, free)
        limit = most if limit is None else min(limit, most)
    return limit, room


def _own_groups(root: Path) -> list[Path]:
    """Return the folder of this process's group (cgroup v2) and those above it."""
    try:
        lines = Path("/proc/self/cgroup").read_text("utf-8")[:MAX_FILE_BYTES].splitlines()
    except (OSError, ValueError):
        return [root]
    own = next((line[3:] for line in lines if line.startswith("0::")), "/")
    folder = Path(os.path.normpath(root / own.lstrip("/")))
    if not folder.is_relative_to(root):
        return [root]
    return [folder, *(parent for parent in folder.parents if parent.is_relative_to(root))]


def _number(path: Path) -> int | None:
    try:
        text = path.read_text("ascii")[:MAX_FILE_BYTES].strip()
    except (OSError, ValueError):
        return None
    return int(text) if text.isdigit() else None  # "max" is no limit


def _statistic(path: Path, name: str) -> int:
    try:
        lines = path.read_text("ascii").splitlines()
    except (OSError, ValueError):
        return 0
    values = (line.split()[1] for line in lines if line.split()[:1] == [name])
    return int(next(values, "0"))
