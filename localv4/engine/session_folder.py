"""The folder of saved sessions: where its files lie, how large it may become, what goes first."""

import shutil
import time
from collections.abc import Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from localv4 import paths

LIMIT_VARIABLE = "LOCALV4_SESSIONS_MAX"
"""Where the user sets the limit."""

DEFAULT_LIMIT = 8 << 30
DISK_SHARE = 0.1
"""The default limit is no larger a part of the disk."""

FILLED = 0.9
"""Share of the limit down to which files are removed when there are too many."""

ABANDONED_S = 3600.0
"""An unfinished file that is older belongs to a process that was killed."""

_BLOCKS, _SNAPSHOTS = "blocks", "snapshots"
_SUFFIX = ".safetensors"


@dataclass(frozen=True, slots=True)
class StoredFile:
    """A file of the store, as a listing shows it."""

    path: Path
    nbytes: int
    used_s: float


class SessionFolder:
    """All blocks and snapshots of one folder, whatever models they are of."""

    def __init__(self, folder: Path, limit: int) -> None:
        """`limit` in bytes bounds all files together."""
        self.folder, self.limit = folder, limit

    def block(self, name: str) -> Path:
        """Return where the block of this name lies, if it is there."""
        return self.folder / _BLOCKS / name[:2] / f"{name}{_SUFFIX}"

    def snapshot(self, name: str) -> Path:
        """Return where the snapshot of this name lies, if it is there."""
        return self.folder / _SNAPSHOTS / name[:2] / f"{name}{_SUFFIX}"

    def files(self) -> Iterator[StoredFile]:
        """Yield all files; those that a killed process left unfinished are removed."""
        oldest = time.time() - ABANDONED_S
        for kind in (_BLOCKS, _SNAPSHOTS):
            for path in (self.folder / kind).glob("??/*"):
                with suppress(OSError):  # another process may just remove it
                    status = path.stat()
                    if path.name.startswith(".") and status.st_mtime < oldest:
                        path.unlink()
                    else:
                        yield StoredFile(path, status.st_size, status.st_mtime)

    def nbytes_of(self, names: Iterable[str]) -> int:
        """Return the bytes of the blocks and snapshots of these names."""
        found = 0
        for name in names:
            for path in (self.block(name), self.snapshot(name)):
                with suppress(OSError):
                    found += path.stat().st_size
        return found

    def remove(self, names: Iterable[str]) -> int:
        """Remove the blocks and snapshots of these names; return the bytes that came free."""
        freed = 0
        for name in names:
            freed += remove_file(self.block(name)) + remove_file(self.snapshot(name))
        return freed

    def remove_all(self) -> int:
        """Remove all blocks and snapshots; return the bytes that came free."""
        return sum(remove_file(file.path) for file in self.files())

    def make_room(self, nbytes: int) -> int:
        """Remove what was not used for longest, until so many bytes more are within the limit.

        Returns the bytes that are held then.
        """
        found = sorted(self.files(), key=lambda file: file.used_s)
        held = sum(file.nbytes for file in found)
        if held + nbytes > self.limit:
            most = int(self.limit * FILLED) - nbytes
            for file in found:
                if held <= most:
                    break
                held -= remove_file(file.path)
        return held


def remove_file(path: Path) -> int:
    """Remove a file if it is there; return the bytes that came free."""
    try:
        nbytes = path.stat().st_size
        path.unlink()
    except OSError:
        return 0
    return nbytes


def sessions_dir() -> Path:
    """Return the folder of saved sessions. What was said in them is data, not cache."""
    return paths.home_dir() / "sessions"


def open_folder(limit: int | None = None) -> SessionFolder:
    """Return the folder of this user; `limit` in bytes defaults to a share of the disk."""
    folder = sessions_dir()
    return SessionFolder(folder, _default_limit(folder) if limit is None else limit)


def _default_limit(folder: Path) -> int:
    place = folder
    while not place.exists() and place != place.parent:
        place = place.parent
    try:
        return min(DEFAULT_LIMIT, int(shutil.disk_usage(place).total * DISK_SHARE))
    except OSError:
        return DEFAULT_LIMIT
