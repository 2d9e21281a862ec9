"""The folder that a conversion writes into: claimed by one process, its disk space reserved."""

import errno
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout

from localv4.errors import DoesNotFitError, LocalV4Error
from quant.output_file import partial_path, reserve

LOCK_NAME = ".lock"
NO_SPACE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
SPARE_BYTES = 1 << 24
"""Beside the large files: journal, tokenizer, and what else is small."""


@contextmanager
def claimed(folder: Path, lock_name: str = LOCK_NAME) -> Iterator[None]:
    """Make a folder and keep other processes out of it while the block runs.

    Raises LocalV4Error when another one is in it or it cannot be written, DoesNotFitError when the
    disk becomes full.
    """
    lock = folder / lock_name
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with FileLock(lock, timeout=0):
            yield
        lock.unlink(missing_ok=True)
    except Timeout:
        raise LocalV4Error(f"another process is writing {folder}", hint="wait for it") from None
    except OSError as error:
        raise write_error(folder, error) from error


def write_error(folder: Path, error: OSError) -> LocalV4Error:
    """Return what a user is told about a failed write."""
    what = error.strerror or str(error)
    if error.errno in NO_SPACE:
        return DoesNotFitError(
            f"cannot write {folder}: {what}",
            hint="free some space and run the same command again: it goes on where it was",
        )
    return LocalV4Error(
        f"cannot write {folder}: {what}", hint="run the same command again to go on"
    )


def reserve_all(folder: Path, sizes: Mapping[str, int]) -> None:
    """Take the disk space of all files at once, before the work begins.

    Raises DoesNotFitError; nothing is kept then.
    """
    taken = sum(_taken(partial_path(folder / name)) for name in sizes)
    needed = sum(sizes.values())
    free = shutil.disk_usage(folder).free + taken
    if needed + SPARE_BYTES > free:
        raise _too_small(folder, needed, free)
    try:
        for name, nbytes in sizes.items():
            reserve(folder / name, nbytes)
    except OSError as error:
        if error.errno not in NO_SPACE:
            raise
        for name in sizes:
            partial_path(folder / name).unlink(missing_ok=True)
        raise _too_small(folder, needed, free) from error


def _taken(path: Path) -> int:
    """Return the bytes of disk that an unfinished file has already."""
    if not path.exists():
        return 0
    status = path.stat()
    return getattr(status, "st_blocks", 0) * 512


def _too_small(folder: Path, needed: int, free: int) -> DoesNotFitError:
    return DoesNotFitError(
        f"{folder} needs {_size(needed)}, but the disk has {_size(free)} left",
        hint="free some space, name another disk with -o, or choose a smaller recipe",
    )


def _size(nbytes: int) -> str:
    return f"{nbytes / 1e9:.1f} GB" if nbytes >= 1e9 else f"{nbytes / 1e6:.1f} MB"
