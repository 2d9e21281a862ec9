"""Files that appear when they are complete: written under another name, synced, renamed."""

import errno
import hashlib
import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Executor, Future
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, TypeVar

import numpy as np
from numpy.typing import NDArray

from localv4.finished_file import sync_folder
from localv4.kernels.buffers import aligned_bytes
from localv4.model.matrix import Packed
from quant.direct_writer import DirectWriter

_PIECE_BYTES = 1 << 18
"""The digest and the copy for the disk take so much in turn: it stays in a core's own cache."""

_CANNOT_RESERVE = (errno.EOPNOTSUPP, errno.EINVAL, errno.ENOSYS)

Part = bytes | NDArray[Any]
Job = Part | Callable[[], "Part | Lent"]
"""Bytes, or what computes them."""

OnBytes = Callable[[int], None]


class Watch(Protocol):
    """Whoever is told how far the writing is."""

    def add_bytes(self, nbytes: int) -> None:
        """So many more bytes are written."""

    def add_tensor(self) -> None:
        """One more tensor is written."""


Key = TypeVar("Key")


class Buffers:
    """Memory for parts of one size, used again and again: fresh pages cost more than the work."""

    def __init__(self, nbytes: int) -> None:
        self._nbytes = nbytes
        self._free: list[Packed] = []

    def take(self) -> "Lent":
        """Return a part with any contents; may be called from any thread."""
        try:
            return Lent(self._free.pop(), self)
        except IndexError:
            return Lent(aligned_bytes(self._nbytes), self)

    def give_back(self, data: Packed) -> None:
        """Take memory that nobody looks at any more."""
        self._free.append(data)


@dataclass(frozen=True, slots=True)
class Lent:
    """A part in memory that goes back when the part has been written."""

    data: Packed
    owner: Buffers


@dataclass(frozen=True, slots=True)
class WrittenFile:
    """What is known about a finished file."""

    bytes: int
    sha256: str


def partial_path(path: Path) -> Path:
    """Return the name that a file has until it is complete."""
    return path.with_name(f".{path.name}.partial")


def reserve(path: Path, nbytes: int) -> None:
    """Take disk space for a file of `nbytes` that is going to be written.

    Raises OSError when there is too little. Where the system cannot reserve, nothing happens.
    """
    descriptor = os.open(partial_path(path), os.O_WRONLY | os.O_CREAT, 0o666)
    try:
        os.ftruncate(descriptor, min(nbytes, os.fstat(descriptor).st_size))
        if hasattr(os, "posix_fallocate"):
            os.posix_fallocate(descriptor, 0, nbytes)
    except OSError as error:
        if error.errno not in _CANNOT_RESERVE:
            raise
    finally:
        os.close(descriptor)


def write_file(path: Path, parts: Iterable[Part], on_bytes: OnBytes | None = None) -> WrittenFile:
    """Write a file under another name and give it its own when every byte is on the disk.

    Space that was reserved is used. `on_bytes` is told the number of bytes after every part.
    """
    digest, total = hashlib.sha256(), 0
    partial = partial_path(path)
    descriptor = os.open(partial, os.O_WRONLY | os.O_CREAT, 0o666)
    try:
        with DirectWriter(descriptor) as writer:
            for part in parts:
                raw = _bytes_of(part)
                for start in range(0, len(raw), _PIECE_BYTES):
                    piece = raw[start : start + _PIECE_BYTES]
                    digest.update(piece.data)
                    writer.write(piece)
                total += len(raw)
                if on_bytes is not None:
                    on_bytes(len(raw))
        os.ftruncate(descriptor, total)
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
    partial.replace(path)
    sync_folder(path.parent)
    return WrittenFile(total, digest.hexdigest())


def in_order(
    jobs: Iterable[tuple[Key, Job]], pool: Executor | None, ahead: int
) -> Iterator[tuple[Key, Part]]:
    """Yield the bytes of each job, in order; `pool` computes up to `ahead` of them beforehand.

    The bytes are good until the next ones are asked for.
    """
    if pool is None:
        for key, job in jobs:
            yield from _finished(key, job() if callable(job) else job)
        return
    waiting: deque[tuple[Key, Future[Part | Lent] | Part]] = deque()
    try:
        for key, job in jobs:
            waiting.append((key, pool.submit(job) if callable(job) else job))
            if len(waiting) > ahead:
                yield from _finished(*waiting.popleft())
        while waiting:
            yield from _finished(*waiting.popleft())
    finally:
        for _, part in waiting:
            if isinstance(part, Future):
                part.cancel()


def _finished(key: Key, part: Future[Part | Lent] | Part | Lent) -> Iterator[tuple[Key, Part]]:
    found = part.result() if isinstance(part, Future) else part
    if isinstance(found, Lent):
        yield key, found.data
        found.owner.give_back(found.data)
    else:
        yield key, found


def nbytes_of(part: Part) -> int:
    """Return the number of bytes of a part."""
    return len(part) if isinstance(part, bytes) else part.nbytes


def _bytes_of(part: Part) -> NDArray[np.uint8]:
    array = np.frombuffer(part, np.uint8) if isinstance(part, bytes) else part
    return array.reshape(-1).view(np.uint8)
