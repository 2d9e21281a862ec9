"""DeepSeek-V4 models in the Hugging Face cache, whoever downloaded them. Opens no socket."""

import re
import warnings
from collections.abc import Container, Iterator
from dataclasses import dataclass
from pathlib import Path

from localv4.errors import LocalV4Error
from localv4.library.model_files import is_packed, model_type
from localv4.small_file import read_small_file

PART_SUFFIX = ".incomplete"
"""Ends the name of a file that is not complete; huggingface_hub's own unfinished files, too."""
RECORD_FOLDER = ".localv4"
"""Holds, in the folder of a repository, what `pull` knows of its files."""

MAX_REF_BYTES = 256  # a commit has 40

_COMMIT = re.compile(r"^[0-9a-f]{40}$")
_FOLDER = re.compile(r"^models--(?P<org>[\w.-]+?)--(?P<name>[\w.-]+)$", re.ASCII)
# V4.1 is another architecture and must not match.
_V4_NAME = re.compile(r"deepseek[-_]?v4(?![.\d])", re.IGNORECASE)


@dataclass(frozen=True, slots=True)
class CachedRepo:
    """A repository in the cache."""

    repo: str  # "org/name"
    snapshots: tuple[Path, ...]  # that of the main branch first, then the latest download


def cache_folder() -> Path:
    """Return the cache folder: `HF_HUB_CACHE`, else `HF_HOME`/hub, else the platform's."""
    with warnings.catch_warnings():
        # about variables for downloads, which `pull` speaks of
        warnings.simplefilter("ignore", FutureWarning)
        from huggingface_hub import constants  # here: commands without models start faster

    return Path(constants.HF_HUB_CACHE)


def cached_repos(known: Container[str] = ()) -> Iterator[CachedRepo]:
    """Yield the repositories that hold a DeepSeek-V4 model.

    A repository counts when it is one of `known` (in lower case), when its config.json has the
    architecture, or, where it has no config.json (GGUF), when it is packed or its name says so.
    """
    try:
        entries = sorted(cache_folder().glob("models--*"))
    except OSError:
        return
    for entry in entries:
        cached = _open_entry(entry)
        if cached and (cached.repo.lower() in known or is_v4(cached)):
            yield cached


def cached_repo(repo: str) -> CachedRepo | None:
    """Return the repository if something of it was downloaded."""
    return _open_entry(cache_folder() / f"models--{repo.replace('/', '--')}")


def is_v4(cached: CachedRepo) -> bool:
    """Tell by config.json, form or name whether the repository holds a DeepSeek-V4 model."""
    found = model_type(cached.snapshots[0])
    if found is not None:
        return found == "deepseek_v4"
    return is_packed(cached.snapshots[0]) or _V4_NAME.search(cached.repo) is not None


def _open_entry(entry: Path) -> CachedRepo | None:
    match = _FOLDER.match(entry.name)
    if match is None:
        return None
    try:
        found = [item for item in (entry / "snapshots").iterdir() if _COMMIT.match(item.name)]
        found.sort(key=lambda item: item.stat().st_mtime, reverse=True)
    except OSError:
        return None
    main = _main_commit(entry)
    found.sort(key=lambda item: item.name != main)  # stable: only the main branch moves ahead
    return CachedRepo(f"{match['org']}/{match['name']}", tuple(found)) if found else None


def _main_commit(entry: Path) -> str | None:
    try:
        return read_small_file(entry / "refs" / "main", MAX_REF_BYTES).decode("ascii").strip()
    except (LocalV4Error, ValueError):
        return None
