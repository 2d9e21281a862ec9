"""Digests of downloaded files: taken while they arrive, recorded, and compared later.

The hub knows a large file by its SHA-256 and a small one by git's SHA-1; either is its *etag*. A
record beside the files keeps the etags, and a checksum of each block, which says where a damaged
file is damaged.
"""

import hashlib
import threading
import zlib
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, StringConstraints, ValidationError

from localv4.errors import LocalV4Error
from localv4.finished_file import finished_file
from localv4.small_file import read_small_file
from localv4.storage.gguf import open_gguf
from localv4.storage.mapped_file import MappedFile
from localv4.storage.safetensors_header import read_tensors

BLOCK_BYTES = 4 << 20
MAX_RECORD_BYTES = 64 << 20  # 900 GB are 215,000 blocks, 8 characters each

_READ_BYTES = 1 << 20

Etag = Annotated[str, StringConstraints(pattern=r"^(?:[0-9a-f]{40}|[0-9a-f]{64})$")]
OnBytes = Callable[[int], None]


class FileRecord(BaseModel):
    """What is known of one file."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    bytes: Annotated[int, Field(ge=0, lt=2**60)]
    etag: Etag
    blocks: Annotated[str, StringConstraints(pattern=r"^(?:[0-9a-f]{8})*$")] = ""


class Digester:
    """Digests a file that passes by in pieces."""

    def __init__(self, etag: str, nbytes: int) -> None:
        """Expect a file of `nbytes` whose digest is `etag`."""
        self._etag, self._nbytes = etag, nbytes
        is_large = len(etag) == 64
        self._whole = hashlib.sha256() if is_large else hashlib.sha1(usedforsecurity=False)
        if not is_large:
            self._whole.update(b"blob %d\0" % nbytes)
        self._blocks: list[int] = []
        self._block, self._in_block = 0, 0

    def update(self, piece: bytes) -> None:
        """Take the next piece."""
        self._whole.update(piece)
        rest = memoryview(piece)
        while rest:
            part = rest[: BLOCK_BYTES - self._in_block]
            self._block = zlib.crc32(part, self._block)
            self._in_block += len(part)
            rest = rest[len(part) :]
            if self._in_block == BLOCK_BYTES:
                self._end_block()

    def matches(self) -> bool:
        """Tell, after the last piece, whether this is the file that was expected."""
        return self._whole.hexdigest() == self._etag

    def entry(self) -> FileRecord:
        """Return, after the last piece, what is to be recorded of the file."""
        return FileRecord(bytes=self._nbytes, etag=self._etag, blocks=self.blocks())

    def blocks(self) -> str:
        """Return, after the last piece, the checksums of all blocks, 8 digits each."""
        last = [self._block] if self._in_block else []
        return "".join(f"{block:08x}" for block in self._blocks + last)

    def _end_block(self) -> None:
        self._blocks.append(self._block)
        self._block, self._in_block = 0, 0


def digest_file(path: Path, digester: Digester, on_bytes: OnBytes | None = None) -> None:
    """Let the digester read a whole file."""
    with path.open("rb", buffering=0) as file:
        while piece := file.read(_READ_BYTES):
            digester.update(piece)
            if on_bytes is not None:
                on_bytes(len(piece))


class RecordDocument(BaseModel):
    """What a record holds: the files of one commit of a repository, by name."""

    model_config = ConfigDict(extra="forbid", strict=True)

    version: Literal[1] = 1
    repo: str
    commit: Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{40}$")]
    files: dict[str, FileRecord]


class Record:
    """The record of what was downloaded of one commit. Safe to use from several threads."""

    def __init__(self, path: Path, repo: str, commit: str) -> None:
        """Read what `path` holds of this commit; a damaged record counts as none."""
        self.path = path
        found = read_record(path)
        fits = found is not None and (found.repo, found.commit) == (repo, commit)
        self._document = (
            found
            if found is not None and fits
            else RecordDocument(repo=repo, commit=commit, files={})
        )
        self._lock = threading.Lock()

    def get(self, name: str) -> FileRecord | None:
        """Return what is recorded of a file."""
        return self._document.files.get(name)

    def add(self, name: str, entry: FileRecord) -> None:
        """Record a finished file; the record on disk is whole at any time."""
        with self._lock:
            self._document.files[name] = entry
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with finished_file(self.path) as file:
                file.write(self._document.model_dump_json().encode())


def read_record(path: Path) -> RecordDocument | None:
    """Return the record in a file; None when there is none that can be read."""
    try:
        return RecordDocument.model_validate_json(read_small_file(path, MAX_RECORD_BYTES))
    except (LocalV4Error, ValidationError, ValueError):
        return None


def damaged_ranges(path: Path, blocks: str) -> list[tuple[int, int]]:
    """Return the places (begin, end) of the blocks whose checksum has changed."""
    digester = Digester("0" * 64, 0)
    digest_file(path, digester)
    now = digester.blocks()
    size = path.stat().st_size
    return [
        (begin, min(begin + BLOCK_BYTES, size))
        for number in range(0, len(now), 8)
        if now[number : number + 8] != blocks[number : number + 8]
        for begin in (number // 8 * BLOCK_BYTES,)
    ]


def tensors_in(path: Path, ranges: list[tuple[int, int]]) -> list[str]:
    """Name the tensors of a weight file that lie in any of the ranges of bytes.

    Returns nothing where the header itself cannot be read any more.
    """
    try:
        if path.suffix.lower() == ".gguf":
            with closing(open_gguf(path)) as checkpoint:
                index = [file.name for file in checkpoint.files].index(path.name)
                tensors = [item for item in checkpoint.tensors.values() if item.file == index]
        else:
            with closing(MappedFile(path)) as file:
                tensors = read_tensors(file, 0)
    except (LocalV4Error, OSError, ValueError):
        return []
    return [
        tensor.name
        for tensor in sorted(tensors, key=lambda item: item.offset)
        if any(
            tensor.offset < end and begin < tensor.offset + tensor.nbytes for begin, end in ranges
        )
    ]
