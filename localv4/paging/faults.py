"""Disks that misbehave, for tests: short reads, errors, delays and answers in another order.

Nothing here is reached by a setting. A test makes a `Faults` and hands its methods to what would
otherwise open files and start readers itself.
"""

import errno
import os
import random
import threading
import time
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from localv4.paging.raw_file import Io, RawFile
from localv4.paging.readers import Finished, Load, Readers, Split
from localv4.paging.record_file import RecordFile


@dataclass
class Faults:
    """What goes wrong, and how often: shares of all reads.

    Which ones it are depends on `seed` and on file, offset and length, not on the order of threads.
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
        self._lock = threading.Lock()
        self._failed: set[tuple[str, int]] = set()

    def open_file(self, path: Path, io: Io) -> RecordFile:
        """Open a file as `RecordFile.open` does, to be read with faults."""
        file = RecordFile.open(path, io)
        return RecordFile(path, _FaultyFile(file.raw, path, self), file.refusal)

    def readers(self, load: Load, count: int, split: Split | None = None) -> Readers:
        """Start readers as `Readers` does, which may answer in any order."""
        if self.reorder:
            return _UnorderedReaders(load, count, split, self)
        return Readers(load, count, split)

    def chance(self, *of_what: object) -> float:
        """Return a number from 0 to 1: always the same one for the same thing."""
        return random.Random(repr((self.seed, *of_what))).random()  # noqa: S311 - no secret

    def note(self, what: str) -> None:
        """Count a fault."""
        with self._lock:
            self.counts[what] = self.counts.get(what, 0) + 1

    def fails(self, name: str, offset: int, nbytes: int) -> bool:
        """Say whether a read fails; one up to the same end does so by chance only once."""
        end = offset + nbytes
        if any(name == file and offset <= at < end for file, at in self.broken):
            return True
        if self.chance("eio", name, end) >= self.eio_once:
            return False
        with self._lock:
            is_new = (name, end) not in self._failed
            self._failed.add((name, end))
            return is_new


class _FaultyFile:
    """A raw file whose reads go wrong as `Faults` says."""

    def __init__(self, raw: RawFile, path: Path, faults: Faults) -> None:
        self._raw, self._name, self._faults = raw, path.name, faults
        self.io: Io = raw.io
        self.alignment = raw.alignment

    def read_some(self, address: int, offset: int, nbytes: int) -> int:
        """Read as the real file does, later, less, or not at all."""
        faults, place = self._faults, (self._name, offset, nbytes)
        if faults.delay_s:
            time.sleep(faults.chance("delay", *place) * faults.delay_s)
        if faults.fails(*place):
            faults.note("eio")
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        blocks = nbytes // self.alignment
        if blocks > 1 and faults.chance("short", *place) < faults.short:
            faults.note("short")
            nbytes = max(1, int(faults.chance("length", *place) * blocks)) * self.alignment
        return self._raw.read_some(address, offset, nbytes)

    def stat(self) -> os.stat_result:
        """Ask the real file."""
        return self._raw.stat()

    def close(self) -> None:
        """Close the real file."""
        self._raw.close()


class _UnorderedReaders(Readers):
    """Readers that shuffle what they hand out and keep some of it for the next time."""

    def __init__(self, load: Load, count: int, split: Split | None, faults: Faults) -> None:
        self._faults, self._turn = faults, 0
        super().__init__(load, count, split)

    def _collect(self) -> list[Finished]:
        self._turn += 1
        chance = partial(self._faults.chance, "order", self._turn)
        found = sorted(super()._collect(), key=lambda done: chance(done.key))
        kept = int(chance() * len(found)) if self._wanted() else 0
        self._finished.extend(found[:kept])
        return found[kept:]
