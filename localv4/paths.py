"""Where localv4 keeps its files on this machine. Nothing is created by asking for a path."""

import os
import stat
import sys
from pathlib import Path

from platformdirs import PlatformDirs

from localv4.errors import BadFileError, LocalV4Error

_DIRS = PlatformDirs("localv4", appauthor=False)


def home_dir() -> Path:
    """Return the folder of lasting data: `LOCALV4_HOME`, else the platform's user data folder."""
    override = os.environ.get("LOCALV4_HOME", "").strip()
    if override:
        return Path(os.path.expanduser(override)).absolute()  # noqa: PTH111 - that of Path raises
    return Path(_DIRS.user_data_dir)


def models_dir() -> Path:
    """Return the folder of converted models. It is data, not cache: a cleaner must not take it."""
    return home_dir() / "models"


def cache_dir() -> Path:
    """Return the folder of what can be made again, such as compiled kernels."""
    return Path(_DIRS.user_cache_dir)


def state_dir() -> Path:
    """Return the folder of history and logs."""
    return Path(_DIRS.user_state_dir)


def config_dir() -> Path:
    """Return the folder of the user's own configuration files."""
    return Path(_DIRS.user_config_dir)


def private_dir(path: Path) -> Path:
    """Create `path` for this user alone (mode 0700) and return it.

    An existing folder is narrowed to 0700. Raises BadFileError when it belongs to somebody else or
    is no folder, LocalV4Error when it cannot be created.
    """
    try:
        path.mkdir(mode=0o700, parents=True, exist_ok=True)
        _claim(path)
    except FileExistsError as error:
        raise BadFileError(path, "is a file where a folder is due") from error
    except OSError as error:
        raise LocalV4Error(f"cannot create {path}: {error.strerror or error}") from error
    return path


def _claim(path: Path) -> None:
    """Check the owner and take every right from group and others.

    What lies in such a folder is trusted later (compiled code, chat history), so a folder that
    another user prepared must never be used. Windows keeps the profile folders private by itself.
    """
    if sys.platform == "win32":
        return
    status = path.stat()
    if status.st_uid != os.getuid():
        raise BadFileError(path, "the folder belongs to another user")
    if stat.S_IMODE(status.st_mode) & 0o077:
        path.chmod(0o700)
