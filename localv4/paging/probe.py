"""How fast this disk gives random records, measured in seconds with the readers of the engine."""

import ctypes
import os
import random
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import numpy as np

from localv4.errors import LocalV4Error
from localv4.paging.arena import Arena, footprint
from localv4.paging.file_reads import FileReads, Piece
from localv4.paging.raw_file import ALIGNMENT, Io, bypass_cache
from localv4.paging.read_statistics import ReadStatistics
from localv4.paging.readers import Key, Readers

SCRATCH_BYTES = 1 << 30
WRITING_SHARE = 0.5
"""Share of the time that a scratch file may take to be written."""

_BLOCK_BYTES = 4 << 20
_LEAST_RECORDS = 8
"""Records that a file must have, so that its reads are random."""

_MODEL_FILES = {".safetensors", ".gguf"}


@dataclass(frozen=True, slots=True)
class DiskSpeed:
    """Random reads of records: bytes per second, processor seconds for 10^9 bytes, times.

    `io` says how they were read; "buffered" if the disk's files cannot be read otherwise.
    """

    bytes_s: float
    core_s_per_gb: float
    p50_s: float
    p99_s: float
    io: Io


def measure_disk(
    place: Path, record_bytes: int, readers: int, seconds: float = 4.0, io: Io = "direct"
) -> DiskSpeed:
    """Measure the disk that a file, or a folder, lies on (or will lie); takes `seconds` in all.

    Reads the file, or the largest model file in the folder. Where there is none, half of the time
    goes into a scratch file of at most SCRATCH_BYTES, which is removed. Raises LocalV4Error.
    """
    end_s = time.monotonic() + seconds
    with _something_to_read(place, record_bytes, seconds * WRITING_SHARE) as path:
        table = random_records(path, record_bytes)
        reads = FileReads(table, io)
        try:
            if reads.io == "buffered":
                forget(path)
            left_s = max(0.1, end_s - time.monotonic())
            done = read_for(reads.load, reads.split, list(table), record_bytes, readers, left_s)
        finally:
            reads.close()
        return DiskSpeed(done.bytes_s, done.core_s_per_gb, done.p50_s, done.p99_s, reads.io)


def random_records(path: Path, nbytes: int, seed: int = 1) -> Mapping[Key, Sequence[Piece]]:
    """Return the aligned records that a file has room for, in random order."""
    size = path.stat().st_size
    offsets = list(range(0, size - nbytes + 1, -(-nbytes // ALIGNMENT) * ALIGNMENT))
    random.Random(seed).shuffle(offsets)  # noqa: S311 - an order, no secret
    return {(0, i): (Piece(path, offset, nbytes),) for i, offset in enumerate(offsets)}


def read_for(
    load: Callable[[Key, int], int],
    split: Callable[[Key, int, int], Sequence[Callable[[], int]]] | None,
    keys: Sequence[Key],
    record_bytes: int,
    count: int,
    seconds: float,
    at_once: int = 0,
) -> ReadStatistics:
    """Read records in turn for some time, `at_once` of them (twice as many as readers by default).

    A group is asked for when the one before it has come, as the layers of a network do; by default
    each record that comes is followed by the next. Ends early when all were read once, lest they
    come from a cache of the disk. Raises what a read raises.
    """
    in_turn, depth = iter(keys), at_once or 2 * count
    arena = Arena(depth * footprint(record_bytes))
    readers = Readers(load, count, split)
    try:
        free = [_place(arena, record_bytes) for _ in range(depth)]
        end_s = time.monotonic() + seconds
        while True:
            wanted = [] if time.monotonic() >= end_s else free
            if not at_once or len(free) == depth:
                for key in list(islice(in_turn, len(wanted))):
                    readers.submit(key, free.pop())
            came = readers.wait()
            if not came:
                return readers.statistics
            for record in came:
                if record.error is not None:
                    raise record.error
                free.append(record.address)
    finally:
        readers.close()
        arena.close()


def _place(arena: Arena, nbytes: int) -> int:
    """Return memory that has its pages already, as that of an arena in use has."""
    address = arena.take(nbytes)
    assert address is not None
    ctypes.memset(address, 1, nbytes)
    return address


@contextmanager
def _something_to_read(place: Path, record_bytes: int, seconds: float) -> Iterator[Path]:
    """Give a file with enough records: `place`, the largest one in it, or a scratch file."""
    least = _LEAST_RECORDS * record_bytes
    try:
        files = [place]
        if place.is_dir():
            files = [file for file in place.iterdir() if file.suffix.lower() in _MODEL_FILES]
        sizes = {file: file.stat().st_size for file in files if file.is_file()}
        largest = max(sizes, key=lambda file: sizes[file], default=None)
        if largest is not None and sizes[largest] >= least:
            yield largest
            return
        folder = place if place.is_dir() else place.parent
        with scratch_file(folder) as path:
            write_random(path, least, max(least, SCRATCH_BYTES), seconds)
            yield path
    except OSError as error:
        raise LocalV4Error(f"cannot measure the disk of {place}: {error.strerror}") from error


@contextmanager
def scratch_file(folder: Path) -> Iterator[Path]:
    """Give an empty file in a folder, which is removed at the end. Raises OSError."""
    descriptor, name = tempfile.mkstemp(prefix=".localv4-disk-", dir=folder)
    os.close(descriptor)
    try:
        yield Path(name)
    finally:
        Path(name).unlink()


def write_random(path: Path, least: int, most: int, seconds: float) -> None:
    """Fill a file with bytes that nothing can compress, and wait until the disk has them.

    Stops after `seconds` once there are `least` bytes. Raises OSError.
    """
    block = np.random.default_rng().integers(0, 256, _BLOCK_BYTES, np.uint8)
    end_s = time.monotonic() + seconds
    with path.open("wb") as file:
        bypass_cache(file.fileno())  # else the reads that follow would be served from there
        written = 0
        while written < most and (written < least or time.monotonic() < end_s):
            np.add(block, 1, out=block)  # no two blocks alike, for disks that look for such
            written += file.write(block[: most - written].data)
            if written % (16 * _BLOCK_BYTES) == 0:
                os.fsync(file.fileno())
        file.flush()
        os.fsync(file.fileno())


def forget(path: Path) -> None:
    """Drop a file from the page cache, where the system lets us."""
    if hasattr(os, "posix_fadvise"):
        with path.open("rb") as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
