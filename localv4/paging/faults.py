"""Disks that misbehave, for tests: short reads, errors, delays and answers in another order.

Nothing here is reached by a setting. A test makes a `Faults` and hands its methods to what would
otherwise open files and start readers itself.
"""

import errno
import os
import random
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from localv4.paging.raw_file import Io, RawFile
from localv4.paging.readers import Finished, Load, Readers, Split
from localv4.paging.record_file import RecordFile


@dataclass
class Faults:
    """What goes wrong, and how often: shares of all reads, chosen by `seed`.

    `short` reads end early; `eio_once` reads fail, but not when the same bytes are read again;
    reads that touch one of `broken` (file name, offset) fail always; each read takes up to
    `delay_s` longer. `reorder` hands out finished records late and in random order. `counts` says
    what was done, so that a test can see that there was something to survive.
    """

    seed: int
    short: float = 0.0
    eio_once: float = 0.0
    broken: tuple[tuple[str, int], ...] = ()
    delay_s: float = 0.0
    reorder: bool = False
    counts: dict[str, int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._random = random.Random(self.seed)  # noqa: S311 - a seeded choice, no secret
        self._lock = threading.Lock()
        self._failed: set[tuple[str, int]] = set()

    def open_file(self, path: Path, io: Io) -> RecordFile:
        """Open a file as `RecordFile.open` does, to be read with faults."""
        file = RecordFile.open(path, io)
        return RecordFile(path, _FaultyFile(file.raw, path, self), file.refusal)

    def readers(self, load: Load, count: int, split: Split | None = None) -> Readers:
        """Start readers as `Readers` does, which may answer in any order."""
        if self.reorder:
            return _UnorderedReaders(load, count, split, self.chance)
        return Readers(load, count, split)

    def chance(self) -> float:
        """Return a random number from 0 to 1."""
        with self._lock:
            return self._random.random()

    def note(self, what: str) -> None:
        """Count a fault."""
        with self._lock:
            self.counts[what] = self.counts.get(what, 0) + 1

    def fails(self, name: str, offset: int, nbytes: int) -> bool:
        """Say whether a read fails; one up to the same end does so by chance only once."""
        if any(name == file and offset <= at < offset + nbytes for file, at in self.broken):
            return True
        if self.chance() >= self.eio_once:
            return False
        with self._lock:
            is_new = (name, offset + nbytes) not in self._failed
            self._failed.add((name, offset + nbytes))
            return is_new


class _FaultyFile:
    """A raw file whose reads go wrong as `Faults` says."""

    def __init__(self, raw: RawFile, path: Path, faults: Faults) -> None:
        self._raw, self._name, self._faults = raw, path.name, faults
        self.io: Io = raw.io
        self.alignment = raw.alignment

    def read_some(self, address: int, offset: int, nbytes: int) -> int:
        """Read as the real file does, later, less, or not at all."""
        faults = self._faults
        if faults.delay_s:
            time.sleep(faults.chance() * faults.delay_s)
        if faults.fails(self._name, offset, nbytes):
            faults.note("eio")
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        if faults.chance() < faults.short and nbytes > self.alignment:
            faults.note("short")
            blocks = nbytes // self.alignment
            nbytes = max(1, int(faults.chance() * blocks)) * self.alignment
        return self._raw.read_some(address, offset, nbytes)

    def stat(self) -> os.stat_result:
        """Ask the real file."""
        return self._raw.stat()

    def close(self) -> None:
        """Close the real file."""
        self._raw.close()


class _UnorderedReaders(Readers):
    """Readers that shuffle what they hand out and keep some of it for the next time."""

    def __init__(
        self, load: Load, count: int, split: Split | None, chance: Callable[[], float]
    ) -> None:
        self._chance = chance
        super().__init__(load, count, split)

    def _collect(self) -> list[Finished]:
        found = sorted(super()._collect(), key=lambda _: self._chance())
        kept = int(self._chance() * len(found)) if self._wanted() else 0
        self._finished.extend(found[:kept])
        return found[kept:]
