"""Removing models, and what interrupted work has left behind.

A model that is in use may be removed: on Linux and macOS whoever has its files open or mapped keeps
them whole, and the space is free when that program ends; Windows refuses, and nothing is lost.
"""

import contextlib
import os
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from filelock import Timeout

from localv4 import paths
from localv4.errors import LocalV4Error, NotFoundError, UsageError
from localv4.library import hub_cache
from localv4.library.hub_cache import PART_SUFFIX, RECORD_FOLDER
from localv4.library.installed import InstalledModel, matching
from localv4.library.model_files import files_of_gguf, find_weight_sets
from localv4.library.registry import load_registry

REMOVING_PREFIX = ".removing-"


@dataclass(frozen=True, slots=True)
class Removal:
    """Something that can be removed; `nbytes` is what the disk gets back."""

    name: str
    path: Path
    nbytes: int
    execute: Callable[[], None]


def plan_removal(reference: str) -> Removal:
    """Find what `rm` of a name or reference would remove; nothing is removed yet.

    Raises NotFoundError for a model that is not here, UsageError for one that is not ours to
    remove or a name with several meanings.
    """
    found = matching(reference)
    if not found:
        raise NotFoundError(f"{reference} is not installed", hint="localv4 list")
    if len(found) > 1:
        names = ", ".join(model.name for model in found)
        raise UsageError(f"{reference} is here in several forms", hint=f"choose among: {names}")
    [model] = found
    if model.source == "embedded":
        raise UsageError(f"{model.name} is part of localv4 and stays", hint="pip uninstall localv4")
    if model.source == "hub-cache":
        return _from_cache(model)
    return _from_home(model)


def _from_home(model: InstalledModel) -> Removal:
    """Remove a model of the folder of models, and its folder if nothing else is in it."""
    home = paths.models_dir()
    if model.format == "gguf":
        files = files_of_gguf(model.path)
        rest = [] if model.path.parent == home else _others(model.path.parent, files)
        if model.path.parent == home or rest:
            return _of_files(model, files)
        return _of_folder(model, model.path.parent)
    inner = [item.path for item in find_weight_sets(model.path) if item.path != model.path]
    if any(path.is_relative_to(model.path) for path in inner):
        kept = [item for item in model.path.iterdir() if item.is_file()]
        return _of_files(model, kept)  # other forms of it live in subfolders
    return _of_folder(model, model.path)


def _others(folder: Path, files: list[Path]) -> list[Path]:
    """Return other weights than `files` in a folder."""
    return [weights.path for weights in find_weight_sets(folder) if weights.path not in files]


def _of_folder(model: InstalledModel, folder: Path) -> Removal:
    def execute() -> None:
        # A model is there or not: the first step takes it away as a whole.
        home = paths.models_dir()
        hidden = home / f"{REMOVING_PREFIX}{folder.name}-{os.getpid()}"
        folder.rename(hidden)
        shutil.rmtree(hidden)
        if folder.parent != home:
            with contextlib.suppress(OSError):  # it holds other forms
                folder.parent.rmdir()

    return Removal(model.name, folder, _size(folder), _plainly(execute, folder))


def _of_files(model: InstalledModel, files: list[Path]) -> Removal:
    def execute() -> None:
        for file in files:
            file.unlink(missing_ok=True)

    nbytes = sum(_size(file) for file in files)
    return Removal(model.name, model.path, nbytes, _plainly(execute, model.path))


def _from_cache(model: InstalledModel) -> Removal:
    """Remove a revision as huggingface_hub does it, or one form of several in a revision."""
    snapshot = _snapshot_of(model.path)
    if model.format == "gguf":
        files = files_of_gguf(model.path)
        if _others(snapshot, files):
            return _form_in_cache(model, snapshot, files)
    from huggingface_hub import scan_cache_dir

    scanned = scan_cache_dir(hub_cache.cache_folder())
    strategy = scanned.delete_revisions(snapshot.name)

    def execute() -> None:
        strategy.execute()
        with contextlib.suppress(FileNotFoundError):
            _record_of(snapshot).unlink()

    return Removal(model.name, snapshot, strategy.expected_freed_size, _plainly(execute, snapshot))


def _form_in_cache(model: InstalledModel, snapshot: Path, files: list[Path]) -> Removal:
    """Remove files of a revision, and their contents where no other revision has them."""
    blobs = {file: file.resolve() for file in files}
    used = {
        other.resolve()
        for other in snapshot.parent.glob("*/**/*")
        if other.is_symlink() and other not in blobs
    }
    freed = sum(_size(blob) for blob in blobs.values() if blob not in used)

    def execute() -> None:
        for file, blob in blobs.items():
            file.unlink(missing_ok=True)
            if blob not in used:
                blob.unlink(missing_ok=True)
        with contextlib.suppress(OSError):  # it holds something else
            files[0].parent.rmdir()

    return Removal(model.name, model.path, freed, _plainly(execute, model.path))


def _snapshot_of(path: Path) -> Path:
    for place in (path, *path.parents):
        if place.parent.name == "snapshots":
            return place
    raise LocalV4Error(f"{path} is in no snapshot of the Hugging Face cache")


def _record_of(snapshot: Path) -> Path:
    return snapshot.parents[1] / RECORD_FOLDER / f"{snapshot.name}.json"


def find_leftovers() -> Iterator[Removal]:
    """Yield unfinished downloads, files that no model has, and models half removed.

    What another process is working on is left out. Of the hub's cache only repositories with
    DeepSeek-V4 models are looked at, and those that `pull` has begun.
    """
    for entry in _entries(paths.models_dir(), f"{REMOVING_PREFIX}*"):
        yield Removal(entry.name, entry, _size(entry), _plainly(_remover(entry), entry))
    cache = hub_cache.cache_folder()
    known = {spec.repo.lower() for spec in load_registry().models.values()}
    ours = {cached.repo for cached in hub_cache.cached_repos(known)}
    for entry in _entries(cache, "models--*"):
        repo = entry.name.removeprefix("models--").replace("--", "/", 1)
        if repo in ours or repo.lower() in known or (entry / RECORD_FOLDER).is_dir():
            yield from _leftovers_of(repo, entry, cache / ".locks" / entry.name)


def _leftovers_of(repo: str, entry: Path, locks: Path) -> Iterator[Removal]:
    used = {pointer.resolve() for pointer in entry.glob("snapshots/*/**/*") if pointer.is_symlink()}
    for blob in _entries(entry / "blobs", "*"):
        is_part = blob.name.endswith(PART_SUFFIX)
        if not is_part and (blob.resolve() in used or blob.is_symlink()):
            continue
        lock = locks / f"{blob.name.partition('.')[0]}.lock"
        if _is_free(lock):
            what = "unfinished" if is_part else "unused"
            name = f"{repo}: {what} {blob.name[:12]}"
            yield Removal(name, blob, _size(blob), _plainly(_unlinker(blob, lock), blob))


def _remover(folder: Path) -> Callable[[], None]:
    return lambda: shutil.rmtree(folder)


def _unlinker(blob: Path, lock: Path) -> Callable[[], None]:
    def execute() -> None:
        with _held(lock):
            blob.unlink(missing_ok=True)

    return execute


def _is_free(lock: Path) -> bool:
    """Tell whether no process holds the lock."""
    if not lock.exists():
        return True
    try:
        with _held(lock):
            return True
    except LocalV4Error:
        return False


@contextlib.contextmanager
def _held(lock: Path) -> Iterator[None]:
    from localv4.library import hub  # here: `list` looks for leftovers, and finds none

    lock.parent.mkdir(parents=True, exist_ok=True)
    with contextlib.ExitStack() as held:
        try:
            held.enter_context(hub.WeakFileLock(lock, timeout=0.01))
        except Timeout as error:
            raise LocalV4Error("another process is downloading this") from error
        yield


def _plainly(execute: Callable[[], None], path: Path) -> Callable[[], None]:
    """Wrap a removal so that a refusal of the system becomes one line."""

    def wrapped() -> None:
        try:
            execute()
        except PermissionError as error:
            raise LocalV4Error(
                f"cannot remove {path}: {error.strerror}", hint="is it in use by a program?"
            ) from error
        except OSError as error:
            raise LocalV4Error(f"cannot remove {path}: {error.strerror or error}") from error

    return wrapped


def _entries(folder: Path, pattern: str) -> list[Path]:
    try:
        return sorted(folder.glob(pattern))
    except OSError:
        return []


def _size(path: Path) -> int:
    """Return the size of a file, or of everything below a folder; links count nothing."""
    if path.is_symlink():
        return 0
    if path.is_file():
        return path.stat().st_size
    return sum(item.stat().st_size for item in path.rglob("*") if item.is_file())
