"""The control groups of Linux that this process is in, and what they leave it of the memory."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

PROC, CGROUPS = Path("/proc"), Path("/sys/fs/cgroup")

_UNLIMITED = 1 << 60
"""Control groups of version 1 have a limit of about 2^63 where there is none."""


@dataclass(frozen=True, slots=True)
class MemoryLimit:
    """A limit in bytes, and how much of it nobody uses; cached files make room."""

    nbytes: int
    left: int


def memory_limits(proc: Path = PROC, cgroups: Path = CGROUPS) -> Iterator[MemoryLimit]:
    """Yield the limits above this process: of its group, and of all that this one lies in."""
    for group in group_folders(proc, cgroups):
        limits = [text_of(group / name) for name in ("memory.max", "memory.high")]
        limit = min((int(text) for text in limits if text.isdigit()), default=_UNLIMITED)
        if limit < _UNLIMITED:
            cached = counter(text_of(group / "memory.stat"), "inactive_file")
            used = int(text_of(group / "memory.current") or 0)
            yield MemoryLimit(limit, limit - used + cached)
    for group in group_folders(proc, cgroups, "memory"):
        limit = int(text_of(group / "memory.limit_in_bytes") or _UNLIMITED)
        if limit < _UNLIMITED:
            cached = counter(text_of(group / "memory.stat"), "total_inactive_file")
            used = int(text_of(group / "memory.usage_in_bytes") or 0)
            yield MemoryLimit(limit, limit - used + cached)


def group_folders(proc: Path, cgroups: Path, controller: str = "") -> Iterator[Path]:
    """Yield the folder of this process's group, and those above it up to the root.

    Version 2 has one tree and no name of a controller, version 1 a tree for each. Within a
    container the own folder is the root, whatever path the outside knows.
    """
    for line in text_of(proc / "self/cgroup").splitlines():
        _, controllers, path = line.split(":", 2)
        if controller not in controllers.split(","):
            continue
        base = cgroups / controller if controller else cgroups
        inner = base / path.lstrip("/")
        for folder in (inner, *inner.parents):
            if folder.is_dir():
                yield folder
            if folder == base:
                break


def counter(text: str, name: str) -> int:
    """Return a number of a file with a name and a number in each line, 0 if it is not there."""
    for line in text.splitlines():
        key, _, value = line.partition(" ")
        if key == name:
            return int(value)
    return 0


def text_of(file: Path) -> str:
    """Return what the system tells in a file, nothing where there is none."""
    try:
        return file.read_text("ascii", "replace").strip()
    except OSError:
        return ""
