"""The memory of this machine as it is now, and what limits this process to less."""

from dataclasses import dataclass
from pathlib import Path

import psutil

from localv4.paging.control_groups import CGROUPS, PROC, memory_limits
from localv4.paging.pressure import available_bytes


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
    limit = min((limit.nbytes for limit in memory_limits(proc, cgroups)), default=None)
    return Memory(
        total,
        available_bytes(proc, cgroups),
        limit if limit is not None and limit < total else None,
        int(swap.total),
        int(swap.used),
    )
