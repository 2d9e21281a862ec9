"""Where downloaded files are kept: the cache of the Hugging Face hub, or a folder of one's own.

The cache has the layout of huggingface_hub, and its programs find what is put there:
`models--ORG--NAME/blobs/ETAG` holds a file, `snapshots/COMMIT/NAME` is a link to it, and
`refs/BRANCH` names a commit. A file that is not finished has the suffix PART_SUFFIX.
"""

import os
import threading
from abc import ABC, abstractmethod
from pathlib import Path

from localv4.finished_file import finished_file
from localv4.library import hub
from localv4.library.digests import Digester, Record, digest_file
from localv4.library.hub_cache import PART_SUFFIX, RECORD_FOLDER
from localv4.library.published import HubFile


class Store(ABC):
    """The place of one commit's files."""

    def __init__(self, folder: Path, base: Path, record: Path, repo: str, commit: str) -> None:
        """`folder` is what a user opens; `base` lies on the same disk, and always will exist."""
        self.folder = folder
        self.base = base
        self.record = Record(record, repo, commit)

    @abstractmethod
    def content(self, file: HubFile) -> Path:
        """Return where the file's bytes belong."""

    @abstractmethod
    def part(self, file: HubFile) -> Path:
        """Return where its bytes are collected, on the same disk."""

    @abstractmethod
    def lock(self, file: HubFile) -> Path:
        """Return the file to be locked by whoever writes it."""

    @abstractmethod
    def publish(self, file: HubFile) -> None:
        """Make a finished file visible under its name."""

    def path(self, file: HubFile) -> Path:
        """Return the file's place under its own name."""
        return self.folder / file.name

    def finish(self, revision: str) -> None:
        """Note that everything of the revision is here; most places need no such note."""
        del revision

    def has(self, file: HubFile) -> bool:
        """Tell whether a file of this size is here; its digest is looked at elsewhere."""
        return size_of(self.content(file)) == file.nbytes or size_of(self.path(file)) == file.nbytes


class CacheStore(Store):
    """The hub's cache."""

    def __init__(self, repo: str, commit: str) -> None:
        """Choose the folders of a repository; nothing is created."""
        cache = Path(hub.constants.HF_HUB_CACHE)
        name = f"models--{repo.replace('/', '--')}"
        self._entry = cache / name
        self._locks = cache / ".locks" / name
        record = self._entry / RECORD_FOLDER / f"{commit}.json"
        self._commit = commit
        super().__init__(self._entry / "snapshots" / commit, cache, record, repo, commit)

    def content(self, file: HubFile) -> Path:
        return self._entry / "blobs" / file.etag

    def part(self, file: HubFile) -> Path:
        return self._entry / "blobs" / f"{file.etag}{PART_SUFFIX}"

    def lock(self, file: HubFile) -> Path:
        return self._locks / f"{file.etag}.lock"  # the one that huggingface_hub takes

    def publish(self, file: HubFile) -> None:
        pointer, content = self.path(file), self.content(file)
        if not content.exists():
            return  # moved to its name earlier, where there are no links
        pointer.parent.mkdir(parents=True, exist_ok=True)
        target = Path(os.path.relpath(content, pointer.parent))
        if pointer.is_symlink() and pointer.readlink() == target:
            return
        link = pointer.with_name(f".{file.etag[:16]}.{os.getpid()}.{threading.get_ident()}.link")
        try:
            if getattr(hub.constants, "HF_HUB_DISABLE_SYMLINKS", False):
                raise OSError("links are not wanted")
            link.symlink_to(target)
        except OSError:  # Windows grants links to developers only: then the name is the file
            content.replace(pointer)
        else:
            link.replace(pointer)

    def finish(self, revision: str) -> None:
        if revision == self._commit:
            return
        reference = self._entry / "refs" / revision
        reference.parent.mkdir(parents=True, exist_ok=True)
        with finished_file(reference) as file:
            file.write(self._commit.encode())


class FolderStore(Store):
    """A folder that a user named: plain files under their own names."""

    def __init__(self, folder: Path, repo: str, commit: str) -> None:
        """Choose the folder; nothing is created."""
        self._own = folder / RECORD_FOLDER
        super().__init__(folder, folder, self._own / "pull.json", repo, commit)

    def content(self, file: HubFile) -> Path:
        return self.path(file)

    def part(self, file: HubFile) -> Path:
        return self._own / f"{file.etag}{PART_SUFFIX}"

    def lock(self, file: HubFile) -> Path:
        return self._own / f"{file.etag}.lock"

    def publish(self, file: HubFile) -> None:
        """Do nothing: the file has its name already."""

    def has(self, file: HubFile) -> bool:
        """Tell whether this very file is here; one that somebody else put there is read once."""
        path = self.path(file)
        if size_of(path) != file.nbytes:
            return False
        known = self.record.get(file.name)
        if known is not None:
            return known.etag == file.etag
        digester = Digester(file.etag, file.nbytes)
        digest_file(path, digester)
        if not digester.matches():
            return False
        self.record.add(file.name, digester.entry())
        return True


def size_of(path: Path) -> int | None:
    """Return the size of a regular file, None where there is none."""
    try:
        return path.stat().st_size if path.is_file() else None
    except OSError:
        return None
