"""Names that come from files: how they are printed, and which of them may be opened."""

import re
from collections.abc import Sequence
from pathlib import Path

from localv4.errors import BadFileError

MAX_SHOWN_CHARS = 100
"""A longer name is cut in messages: a name may be as long as its file."""

MAX_LISTED_NAMES = 5

MAX_FILE_NAME_BYTES = 255
"""The longest file name on the usual file systems."""

_LEADS_ELSEWHERE = re.compile(r"[\x00-\x1f\x7f/\\:]")


def quoted(name: str) -> str:
    """Return `name` in quotes, short and without control characters, for one line of a message."""
    shown = name if len(name) <= MAX_SHOWN_CHARS else name[:MAX_SHOWN_CHARS] + "..."
    return repr(shown)


def listed(names: Sequence[str]) -> str:
    """Return the first of some names for one line of a message, and how many more there are."""
    shown = ", ".join(map(quoted, names[:MAX_LISTED_NAMES]))
    more = len(names) - MAX_LISTED_NAMES
    return shown if more <= 0 else f"{shown} and {more} more"


def names_ending(folder: Path, suffix: str) -> list[str]:
    """Return the sorted names in a folder with this suffix; hidden ones are not meant for us."""
    return sorted(
        entry.name
        for entry in folder.iterdir()
        if entry.name.endswith(suffix) and not entry.name.startswith(".")
    )


def member_path(folder: Path, name: str, named_in: Path) -> Path:
    """Return the path of the file `name` of a model folder.

    A plain name is required, so it cannot lead out of the folder. A symbolic link is followed only
    to a place inside the folder or, in the cache of the Hugging Face hub, to the cache's blobs.
    `named_in` is the file or folder blamed in the BadFileError.
    """
    too_long = len(name.encode("utf-8", "surrogatepass")) > MAX_FILE_NAME_BYTES
    if name in ("", ".", "..") or too_long or _LEADS_ELSEWHERE.search(name):
        raise BadFileError(named_in, f"the file name {quoted(name)} is not a plain name")
    path = folder / name
    refuse_link_outside(path, (folder, *hub_blobs(folder)), named_in)
    return path


def refuse_link_outside(path: Path, roots: tuple[Path, ...], named_in: Path) -> None:
    """Raise BadFileError when `path` is a symbolic link whose target lies in none of `roots`."""
    if not path.is_symlink():
        return
    try:
        target = path.resolve()
    except (OSError, RuntimeError) as error:  # Python 3.11 and 3.12 report a loop as RuntimeError
        raise BadFileError(named_in, f"the link {quoted(path.name)} leads nowhere") from error
    if not any(target.is_relative_to(root.resolve()) for root in roots):
        raise BadFileError(
            named_in,
            f"the link {quoted(path.name)} leads out of the folder",
            hint="put the file itself into the folder",
        )


def hub_blobs(folder: Path) -> tuple[Path, ...]:
    """Return where the hub cache keeps the files of a snapshot; nothing for other folders.

    The layout is `CACHE/models--ORG--NAME/snapshots/REVISION/`, with contents in the `blobs` folder
    of the repository, which may hold links on into the `blobs` folder shared by the whole cache.
    """
    for parent in folder.resolve().parents:
        repository = parent.parent
        if parent.name == "snapshots" and repository.name.startswith("models--"):
            return (repository / "blobs", repository.parent / "blobs")
    return ()
