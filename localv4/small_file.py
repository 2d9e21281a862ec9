"""Read a small file that came with a model: a regular file, never more of it than allowed."""

import stat
from pathlib import Path

from localv4.errors import BadFileError, LocalV4Error, NotFoundError


def read_small_file(path: Path, limit: int) -> bytes:
    """Return the bytes of a regular file of at most `limit` bytes.

    Raises NotFoundError when it is absent, BadFileError when it is too large or no regular file,
    LocalV4Error when the system refuses. A pipe or a device is not even opened: it could wait for
    ever, or never end.
    """
    try:
        if not stat.S_ISREG(path.stat().st_mode):
            raise BadFileError(path, "is not a regular file")
        with path.open("rb") as file:
            data = file.read(limit + 1)
    except (FileNotFoundError, NotADirectoryError) as error:
        raise NotFoundError(f"no {path.name} in {path.parent}") from error
    except OSError as error:
        raise LocalV4Error(f"cannot read {path}: {error.strerror or error}") from error
    if len(data) > limit:
        raise BadFileError(path, f"larger than {limit} bytes")
    return data
