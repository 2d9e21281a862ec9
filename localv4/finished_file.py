"""Result files that appear all at once: written under another name, synced, then renamed."""

import contextlib
import errno
import os
import shutil
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from localv4.errors import DoesNotFitError, LocalV4Error


@contextlib.contextmanager
def finished_file(path: Path, need_bytes: int = 0, hint: str | None = None) -> Iterator[BinaryIO]:
    """Open a file under another name; it gets its own name when all of it is on disk.

    The other name is hidden and this thread's own: several may write one file, and the last stays.
    Raises DoesNotFitError, with `hint`, if the disk has no room for `need_bytes` or becomes full,
    LocalV4Error for what else the system refuses.
    """
    unfinished = path.with_name(f".{path.name}.{os.getpid()}.{threading.get_ident()}.part")
    try:
        _check_space(path.parent, need_bytes, hint)
        with unfinished.open("wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        unfinished.replace(path)
        sync_folder(path.parent)
    except OSError as error:
        message = f"cannot write {path}: {error.strerror or error}"
        if error.errno == errno.ENOSPC:
            raise DoesNotFitError(message, hint=hint) from error
        raise LocalV4Error(message) from error
    finally:
        with contextlib.suppress(OSError):
            unfinished.unlink(missing_ok=True)


def sync_folder(folder: Path) -> None:
    """Make new names in a folder last; systems that cannot be asked for it keep their own order."""
    if os.name == "nt":
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):  # file systems that know no such thing
            raise
    finally:
        os.close(descriptor)


def _check_space(folder: Path, need_bytes: int, hint: str | None) -> None:
    have_bytes = shutil.disk_usage(folder).free
    if have_bytes < need_bytes:
        need, have = need_bytes / 2**30, have_bytes / 2**30
        raise DoesNotFitError(
            f"the result needs {need:.1f} GiB, {folder} has {have:.1f} GiB free", hint=hint
        )
