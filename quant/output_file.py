"""Files that appear when they are complete: written under another name, synced, renamed."""

import errno
import hashlib
import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Executor, Future
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

_LARGEST_WRITE = 1 << 26
"""One call to the system writes no more: Linux stops at 2 GiB, and the digest keeps pace."""

_CANNOT_RESERVE = (errno.EOPNOTSUPP, errno.EINVAL, errno.ENOSYS)

Part = bytes | NDArray[Any]
Job = Part | Callable[[], Part]
"""Bytes, or what computes them."""

OnBytes = Callable[[int], None]
Key = TypeVar("Key")


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

    Space that was reserved is used. `on_bytes` is told the number of bytes after every piece.
    """
    digest, total = hashlib.sha256(), 0
    partial = partial_path(path)
    descriptor = os.open(partial, os.O_WRONLY | os.O_CREAT, 0o666)
    try:
        for part in parts:
            raw = _view(part)
            for start in range(0, len(raw), _LARGEST_WRITE):
                piece = raw[start : start + _LARGEST_WRITE]
                digest.update(piece)
                _write_all(descriptor, piece)
                if on_bytes is not None:
                    on_bytes(len(piece))
            total += len(raw)
        os.ftruncate(descriptor, total)
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
    partial.replace(path)
    _sync_folder(path.parent)
    return WrittenFile(total, digest.hexdigest())


def in_order(
    jobs: Iterable[tuple[Key, Job]], pool: Executor | None, ahead: int
) -> Iterator[tuple[Key, Part]]:
    """Yield the bytes of each job, in order; `pool` computes up to `ahead` of them beforehand."""
    if pool is None:
        yield from ((key, job() if callable(job) else job) for key, job in jobs)
        return
    waiting: deque[tuple[Key, Future[Part] | Part]] = deque()
    try:
        for key, job in jobs:
            waiting.append((key, pool.submit(job) if callable(job) else job))
            if len(waiting) > ahead:
                yield _finished(*waiting.popleft())
        while waiting:
            yield _finished(*waiting.popleft())
    finally:
        for _, part in waiting:
            if isinstance(part, Future):
                part.cancel()


def _finished(key: Key, part: Future[Part] | Part) -> tuple[Key, Part]:
    return key, part.result() if isinstance(part, Future) else part


def nbytes_of(part: Part) -> int:
    """Return the number of bytes of a part."""
    return len(part) if isinstance(part, bytes) else part.nbytes


def _view(part: Part) -> memoryview:
    array = np.frombuffer(part, np.uint8) if isinstance(part, bytes) else part
    return array.reshape(-1).view(np.uint8).data


def _write_all(descriptor: int, piece: memoryview) -> None:
    while piece:
        piece = piece[os.write(descriptor, piece) :]


def _sync_folder(folder: Path) -> None:
    """Make a rename last; systems that cannot open a folder keep their own order."""
    if os.name == "nt":
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
