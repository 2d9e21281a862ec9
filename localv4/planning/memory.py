"""The memory of this machine as it is now, and what limits this process to less."""

import os
import sys
from dataclasses import dataclass
from pathlib import Path

import psutil

from localv4.paging.pressure import available_bytes

PROC, CGROUPS = Path("/proc"), Path("/sys/fs/cgroup")


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


def read_memory(proc: Path = PROC, cgroups: Path = CGROUPS) -> Memory:
    """Look at the memory of this machine and the limits of this process; takes a millisecond."""
    total, swap = int(psutil.virtual_memory().total), psutil.swap_memory()
    limit = _lowest_limit(proc, cgroups) if sys.platform == "linux" else None
    return Memory(
        total,
        available_bytes(proc, cgroups),
        limit if limit is not None and limit < total else None,
        int(swap.total),
        int(swap.used),
    )


def _lowest_limit(proc: Path, root: Path) -> int | None:
    """Return the lowest memory.max of this process's group (cgroup v2) and of those above it."""
    lines = _text(proc / "self/cgroup").splitlines()
    own = next((line[3:] for line in lines if line.startswith("0::")), "/")
    folder = Path(os.path.normpath(root / own.lstrip("/")))
    folders = [folder, *folder.parents]
    limits = [_text(place / "memory.max") for place in folders if place.is_relative_to(root)]
    return min((int(text) for text in limits if text.isdigit()), default=None)


def _text(path: Path) -> str:
    try:
        return path.read_text("ascii", "replace").strip()
    except OSError:
        return ""
