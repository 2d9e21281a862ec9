"""The headers of a model on the hub, as files here: a few MB instead of the whole model.

Every weight file becomes one of the same name and size in a temporary folder, of which only the
header was fetched. The rest is a hole that takes no disk space. So what opens models opens this,
too, with all its checks, and only values are missing.
"""

import ctypes
import sys
import tempfile
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from localv4.errors import BadFileError, LocalV4Error
from localv4.library import hub
from localv4.library.hub import OnWait
from localv4.library.published import HubFile, Wanted, list_files, select
from localv4.library.remote import RemoteFile
from localv4.storage.gguf_values import MAX_HEADER_BYTES as MAX_GGUF_HEADER_BYTES
from localv4.storage.gguf_values import GgufValues
from localv4.storage.mapped_file import MappedFile
from localv4.storage.safetensors_header import LENGTH_BYTES, MAX_HEADER_BYTES

CONNECTIONS = 8
FIRST_BYTES = 256 << 10
"""Fetched of every file at first: the header of most shards. GGUF files get twice as much until
the header is whole, since nothing tells how long it is."""

MAX_SMALL_BYTES = 16 << 20
"""Of a file that is fetched whole."""
_SMALL_FILES = ("config.json", "manifest.json", "metadata.gguf")
"""What opening needs beside weights. The index of shards is not fetched: headers say it all."""

OnFile = Callable[[int, int], None]
"""Told (files done, files)."""


@dataclass(frozen=True, slots=True)
class RemoteModel:
    """What was fetched: `path` can be opened while the folder lives.

    `weight_bytes` are those of all weight files on the hub, `fetched` those of the headers.
    """

    path: Path
    repo: str
    commit: str
    weight_bytes: int
    fetched: int


@contextmanager
def remote_headers(
    wanted: Wanted, on_file: OnFile | None = None, on_wait: OnWait | None = None
) -> Iterator[RemoteModel]:
    """Fetch the headers of a published model into a folder that is removed in the end.

    Raises LocalV4Error when the hub cannot be asked, NotFoundError when it has no such model,
    BadFileError for files that are none of a model.
    """
    listing = list_files(wanted.repo, wanted.revision, on_wait)
    chosen = [file for file in select(wanted, listing) if _is_needed(file.name)]
    weights = [file for file in chosen if _is_weight(file.name)]
    with tempfile.TemporaryDirectory(prefix="localv4-headers-") as name:
        folder = Path(name)

        def fetch(file: HubFile) -> int:
            remote = RemoteFile(
                wanted.repo, listing.commit, file.name, file.nbytes, file.etag, on_wait
            )
            return _fetch(remote, folder / file.name)

        fetched = 0
        with ThreadPoolExecutor(CONNECTIONS) as pool:
            for done, nbytes in enumerate(pool.map(fetch, chosen), start=1):
                fetched += nbytes
                if on_file is not None:
                    on_file(done, len(chosen))
        yield RemoteModel(
            path=_what_to_open(folder, weights),
            repo=wanted.repo,
            commit=listing.commit,
            weight_bytes=sum(file.nbytes for file in weights),
            fetched=fetched,
        )


def _is_needed(name: str) -> bool:
    return _is_weight(name) or name in _SMALL_FILES


def _is_weight(name: str) -> bool:
    return name.endswith((".safetensors", ".gguf")) and name not in _SMALL_FILES


def _what_to_open(folder: Path, weights: list[HubFile]) -> Path:
    ggufs = sorted(file.name for file in weights if file.name.endswith(".gguf"))
    if ggufs and len(ggufs) == len(weights):
        return folder / ggufs[0]
    places = {(folder / file.name).parent for file in weights}
    return places.pop() if len(places) == 1 else folder


def _fetch(remote: RemoteFile, target: Path) -> int:
    """Write what is needed of a file; return the bytes that were fetched."""
    target.parent.mkdir(parents=True, exist_ok=True)
    if not _is_weight(remote.name):
        if remote.size > MAX_SMALL_BYTES:
            raise BadFileError(remote.name, f"has {remote.size} bytes, too many for its kind")
        target.write_bytes(remote.read(0, remote.size))
        return remote.size
    head = remote.read(0, min(FIRST_BYTES, remote.size))
    if remote.name.endswith(".gguf"):
        head = _gguf_header(remote, head, target)
    else:
        head = _safetensors_header(remote, head)
    with target.open("wb") as file:
        _make_sparse(file.fileno())
        file.write(head)
        file.truncate(remote.size)
    return len(head)


def _safetensors_header(remote: RemoteFile, head: bytes) -> bytes:
    """Return the header; its length is at the beginning."""
    end = LENGTH_BYTES + int.from_bytes(head[:LENGTH_BYTES], "little")
    if len(head) < LENGTH_BYTES or end > min(remote.size, LENGTH_BYTES + MAX_HEADER_BYTES):
        raise BadFileError(remote.name, "is no safetensors file: its header would be too long")
    if end > len(head):
        head += remote.read(len(head), end - len(head))
    return head


def _gguf_header(remote: RemoteFile, head: bytes, target: Path) -> bytes:
    """Return a beginning of the file that holds its whole header."""
    while True:
        target.write_bytes(head)
        try:
            _walk_gguf(target)
        except BadFileError:  # cut, or damaged: with all of it, opening will tell
            most = min(remote.size, MAX_GGUF_HEADER_BYTES)
            if len(head) >= most:
                return head
            head += remote.read(len(head), min(len(head), most - len(head)))
        else:
            return head


def _walk_gguf(path: Path) -> None:
    """Read over a GGUF header. Raises BadFileError if the file ends before it does."""
    with closing(MappedFile(path)) as file:
        values = GgufValues(file)
        values.raw(8, "magic and version")
        tensors, keys = values.u64("tensor count"), values.u64("key count")
        for _ in range(keys):
            values.string("key")
            values.value(values.u32("type"), "value")
        for _ in range(tensors):
            values.string("name")
            dimensions = values.u32("dimensions")
            values.raw(8 * min(dimensions, 8) + 4 + 8, "shape, type and offset")


def _make_sparse(descriptor: int) -> None:
    """Let holes of a file take no space: Windows has to be asked for it."""
    if sys.platform != "win32":
        return
    import msvcrt

    set_sparse, returned = 0x900C4, ctypes.c_ulong(0)
    handle = msvcrt.get_osfhandle(descriptor)
    with suppress(OSError):
        ctypes.WinDLL("kernel32").DeviceIoControl(
            ctypes.c_void_p(handle), set_sparse, None, 0, None, 0, ctypes.byref(returned), None
        )


def check_online() -> None:
    """Raise LocalV4Error if HF_HUB_OFFLINE forbids to ask the hub."""
    if hub.is_offline():
        raise LocalV4Error(
            "offline: the headers of a model on the hub cannot be read",
            hint="unset HF_HUB_OFFLINE, or name a model that is known or installed",
        )
