"""Split GGUF models: `STEM-00001-of-00003.gguf` and its siblings in the same folder."""

import re
from collections.abc import Iterable, Mapping
from pathlib import Path

from localv4.errors import BadFileError
from localv4.storage.checkpoint import MetaValue
from localv4.storage.names import hub_blobs, listed, refuse_link_outside

MAX_SPLITS = 512
"""Each takes two open files."""

_SPLIT_NAME = re.compile(r"(?P<stem>.+)-(?P<number>[0-9]{5})-of-(?P<count>[0-9]{5})\.gguf")


def first_of_each(names: Iterable[str]) -> list[str]:
    """Return one name for each model among file names: split files count as one."""
    models: dict[str, str] = {}
    for name in sorted(names):
        match = _SPLIT_NAME.fullmatch(name)
        models.setdefault(f"{match['stem']}-of-{match['count']}" if match else name, name)
    return list(models.values())


def split_paths(path: Path) -> list[Path]:
    """Return the files of the set that `path` is named as a member of; `path` alone for others."""
    match = _SPLIT_NAME.fullmatch(path.name)
    if match is None or not path.exists():
        return [path]
    count = int(match["count"])
    if not 1 <= int(match["number"]) <= count or count > MAX_SPLITS:
        raise BadFileError(path, f"the name is not one of a set of up to {MAX_SPLITS} files")
    names = [f"{match['stem']}-{number:05}-of-{count:05}.gguf" for number in range(1, count + 1)]
    siblings = [path.with_name(name) for name in names]
    missing = [sibling.name for sibling in siblings if not sibling.exists()]
    if missing:
        raise BadFileError(
            path,
            f"{len(missing)} of {count} split files are missing: {listed(missing)}",
            hint="put all files of the set into one folder",
        )
    # Beside the named file, or beside its target when the user named a link.
    roots = (path.parent, path.resolve().parent, *hub_blobs(path.parent))
    for sibling in siblings:
        if sibling != path:
            refuse_link_outside(sibling, roots, path)
    return siblings


def check_split(path: Path, metadata: Mapping[str, MetaValue], index: int, count: int) -> None:
    """Check that a file is what its name says: number `index` of `count`."""
    declared = split_number(path, metadata, "split.count")
    if count == 1 and declared not in (None, 1):
        raise BadFileError(
            path,
            f"split.count: {declared}, but the name is not that of a split file",
            hint="give the files of the set their names back: NAME-00001-of-00003.gguf",
        )
    if count > 1 and declared != count:
        raise BadFileError(path, f"split.count: {declared}, but the name says {count}")
    number = split_number(path, metadata, "split.no")
    if number != index and not (count == 1 and number is None):
        raise BadFileError(path, f"split.no: {number}, but {index} was due")


def split_number(path: Path, metadata: Mapping[str, MetaValue], key: str) -> int | None:
    """Return the integer value of a key, None where the key is absent."""
    number = metadata.get(key)
    if number is not None and type(number) is not int:
        raise BadFileError(path, f"{key}: not an integer")
    return number
