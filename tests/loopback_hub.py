"""A Hugging Face hub on this machine that speaks the few routes which a download uses, with faults.

    with LoopbackHub() as hub:
        hub.use(monkeypatch)                    # this process; `hub.environment()` for others
        hub.add("org/name", {"config.json": b"{}", "model.safetensors": Path(...)})
        hub.faults.drop_at = [0.3, 0.99]        # the next two transfers of large files are cut
        ...
        assert hub.bytes_sent < 1.1 * size

Large files (LARGE_BYTES and more) are what the hub calls LFS files: known by their SHA-256 and
served, after a redirect, by a second server that stands for the storage network.
"""

import hashlib
import json
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import TracebackType
from typing import Any, Self
from urllib.parse import unquote, urlsplit

import pytest
from huggingface_hub import constants

LARGE_BYTES = 1000
PIECE_BYTES = 1 << 16


@dataclass(frozen=True, slots=True)
class HubFile:
    """A file of a repository at one commit."""

    data: bytes | Path

    @property
    def size(self) -> int:
        return self.data.stat().st_size if isinstance(self.data, Path) else len(self.data)

    @property
    def is_large(self) -> bool:
        return self.size >= LARGE_BYTES

    def read(self, offset: int, nbytes: int) -> bytes:
        if isinstance(self.data, bytes):
            return self.data[offset : offset + nbytes]
        with self.data.open("rb") as file:
            file.seek(offset)
            return file.read(nbytes)

    def digest(self) -> str:
        """Return what the hub calls the etag: SHA-256 of a large file, git's SHA-1 of others."""
        content = self.read(0, self.size)
        if self.is_large:
            return hashlib.sha256(content).hexdigest()
        return git_sha1(content)


@dataclass(frozen=True, slots=True)
class Request:
    """One request that was made."""

    method: str
    path: str
    headers: Mapping[str, str]  # names in lower case
    to_storage: bool


@dataclass(slots=True)
class Faults:
    """What goes wrong; lists are used up, one entry at a time."""

    drop_at: list[float] = field(default_factory=list)  # shares of the whole file
    statuses: list[tuple[int, dict[str, str]]] = field(default_factory=list)  # any request
    wrong_bytes: int = 0  # so many transfers of large files have one byte changed
    ignore_range: bool = False  # answer 200 with everything
    bytes_per_s: float | None = None  # of each transfer
    storage_status: int | None = None  # of every transfer of a large file
    listed_names: dict[str, str] = field(default_factory=dict)  # true name: name in the listing
    other_etag: str | None = None  # told by HEAD instead of the listed one


class LoopbackHub:
    """A hub and its storage, each on a port of its own, until the block ends."""

    def __init__(self) -> None:
        self.faults = Faults()
        self.requests: list[Request] = []
        self.bytes_sent = 0  # of contents of files
        self.token: str | None = None  # when set, requests without it are answered with 401
        self.gated: set[str] = set()
        self.lock = threading.Lock()
        self._repos: dict[str, dict[str, dict[str, HubFile]]] = {}
        self._main: dict[str, str] = {}
        self._hub = _Server(self, is_storage=False)
        self._storage = _Server(self, is_storage=True)

    def __enter__(self) -> Self:
        for server in (self._hub, self._storage):
            threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for server in (self._hub, self._storage):
            server.shutdown()
            server.server_close()

    @property
    def endpoint(self) -> str:
        """The address for HF_ENDPOINT."""
        return f"http://127.0.0.1:{self._hub.server_port}"

    @property
    def storage(self) -> str:
        """The address of the second server."""
        return f"http://127.0.0.1:{self._storage.server_port}"

    def add(self, repo: str, files: Mapping[str, bytes | Path], commit: str | None = None) -> str:
        """Publish a commit, which becomes the main branch; return its name."""
        tree = {name: HubFile(data) for name, data in files.items()}
        listing = json.dumps([(name, file.digest()) for name, file in tree.items()])
        commit = commit or hashlib.sha1(listing.encode()).hexdigest()
        self._repos.setdefault(repo, {})[commit] = tree
        self._main[repo] = commit
        return commit

    def use(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Make huggingface_hub in this process ask this hub."""
        monkeypatch.setattr(constants, "ENDPOINT", self.endpoint)
        template = self.endpoint + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)

    def environment(self) -> dict[str, str]:
        """Return the variables that make another process ask this hub."""
        return {"HF_ENDPOINT": self.endpoint, "no_proxy": "127.0.0.1", "HF_HUB_OFFLINE": "0"}

    def tree(self, repo: str, revision: str) -> tuple[str, dict[str, HubFile]] | None:
        """Return a commit's name and files; None where there is none."""
        commit = self._main.get(repo, "") if revision == "main" else revision
        files = self._repos.get(repo, {}).get(commit)
        return None if files is None else (commit, files)

    def has_repo(self, repo: str) -> bool:
        return repo in self._repos

    def blob(self, digest: str) -> HubFile | None:
        """Return the large file with this digest."""
        for commits in self._repos.values():
            for files in commits.values():
                for file in files.values():
                    if file.is_large and file.digest() == digest:
                        return file
        return None

    def transfers(self) -> list[Request]:
        """Return the requests for contents of large files."""
        return [made for made in self.requests if made.to_storage and made.method == "GET"]


def git_sha1(content: bytes) -> str:
    """Return the digest that git gives to a file."""
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


def noise(nbytes: int, seed: int = 0) -> bytes:
    """Return bytes that do not repeat."""
    return hashlib.shake_128(seed.to_bytes(8, "little")).digest(nbytes)


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    block_on_close = False

    def __init__(self, hub: LoopbackHub, *, is_storage: bool) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.hub = hub
        self.is_storage = is_storage

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Say nothing about clients that went away."""


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: _Server

    def log_message(self, format: str, *arguments: Any) -> None:
        """Print nothing: `LoopbackHub.requests` is the log."""

    def do_HEAD(self) -> None:
        self._answer()

    def do_GET(self) -> None:
        self._answer()

    def _answer(self) -> None:
        hub = self.server.hub
        path = unquote(urlsplit(self.path).path)
        headers = {name.lower(): value for name, value in self.headers.items()}
        with hub.lock:
            hub.requests.append(Request(self.command, path, headers, self.server.is_storage))
            fault = hub.faults.statuses.pop(0) if hub.faults.statuses else None
        if fault is not None:
            self._fail(fault[0], "", fault[1])
        elif self.server.is_storage:
            self._send_blob(path.removeprefix("/"))
        elif hub.token is not None and self.headers.get("Authorization") != f"Bearer {hub.token}":
            self._fail(401, "Invalid credentials in Authorization header")
        elif path.startswith("/api/models/"):
            self._send_listing(path.removeprefix("/api/models/").split("/"))
        else:
            self._send_file(path.removeprefix("/").split("/"))

    def _fail(self, status: int, code: str = "", headers: Mapping[str, str] | None = None) -> None:
        self._send(status, {"X-Error-Code": code, **(headers or {})}, b'{"error": "no"}')

    def _send(self, status: int, headers: Mapping[str, str], content: bytes) -> None:
        self.send_response(status)
        for name, value in {"Content-Length": str(len(content)), **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def _find(self, repo: str, revision: str) -> tuple[str, dict[str, HubFile]] | None:
        hub = self.server.hub
        found = hub.tree(repo, revision)
        if repo in hub.gated:
            self._fail(403, "GatedRepo")
        elif not hub.has_repo(repo):
            self._fail(404, "RepoNotFound")
        elif found is None:
            self._fail(404, "RevisionNotFound")
        else:
            return found
        return None

    def _send_listing(self, parts: list[str]) -> None:
        """Answer org/name[/revision/REVISION] and org/name/tree/REVISION."""
        repo = "/".join(parts[:2])
        found = self._find(repo, parts[3] if len(parts) > 3 else "main")
        if found is None:
            return
        commit, files = found
        shown = self.server.hub.faults.listed_names
        rows = [_row(shown.get(name, name), file) for name, file in files.items()]
        listing: Any = {"id": repo, "sha": commit, "siblings": rows}
        if parts[2:3] == ["tree"]:
            listing = [
                {"type": "file", "path": row["rfilename"], "oid": row["blobId"], **row}
                for row in rows
            ]
        self._send(200, {"Content-Type": "application/json"}, json.dumps(listing).encode())

    def _send_file(self, parts: list[str]) -> None:
        """Answer org/name/resolve/REVISION/PATH: a small file itself, a redirect to others."""
        hub = self.server.hub
        found = self._find("/".join(parts[:2]), parts[3]) if len(parts) > 4 else None
        if found is None:
            return
        commit, files = found
        file = files.get("/".join(parts[4:]))
        if file is None:
            self._fail(404, "EntryNotFound", {"X-Repo-Commit": commit})
            return
        etag = hub.faults.other_etag or file.digest()
        if not file.is_large:
            self._send_range(file, {"ETag": f'"{etag}"', "X-Repo-Commit": commit})
            return
        headers = {
            "X-Repo-Commit": commit,
            "X-Linked-Etag": f'"{etag}"',
            "X-Linked-Size": str(file.size),
            "Location": f"{hub.storage}/{file.digest()}",
        }
        self._send(302, headers, b"")

    def _send_blob(self, digest: str) -> None:
        hub = self.server.hub
        file = hub.blob(digest)
        if hub.faults.storage_status is not None:
            self._fail(hub.faults.storage_status)
        elif file is None:
            self._fail(404)
        else:
            self._send_range(file, {})

    def _send_range(self, file: HubFile, headers: Mapping[str, str]) -> None:
        hub, size = self.server.hub, file.size
        begin, end = self._range(size)
        with hub.lock:
            faults = hub.faults
            if faults.ignore_range:
                begin, end = 0, size
            is_partial = "Range" in self.headers and not faults.ignore_range
            is_transfer = file.is_large and self.command == "GET"
            cut = int(faults.drop_at.pop(0) * size) if faults.drop_at and is_transfer else end
            is_wrong = is_transfer and faults.wrong_bytes > 0
            faults.wrong_bytes -= is_wrong
        self.send_response(206 if is_partial else 200)
        if is_partial:
            self.send_header("Content-Range", f"bytes {begin}-{end - 1}/{size}")
        self.send_header("Content-Length", str(end - begin))
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "GET":
            self._send_content(file, begin, min(end, max(cut, begin)), is_wrong)
            self.close_connection = cut < end

    def _range(self, size: int) -> tuple[int, int]:
        given = self.headers.get("Range", "")
        first, _, last = given.removeprefix("bytes=").partition("-")
        return int(first or 0), min(size, int(last) + 1 if last else size)

    def _send_content(self, file: HubFile, begin: int, end: int, is_wrong: bool) -> None:
        hub = self.server.hub
        for start in range(begin, end, PIECE_BYTES):
            piece = file.read(start, min(PIECE_BYTES, end - start))
            if is_wrong and start == begin:
                piece = bytes([piece[0] ^ 1]) + piece[1:]
            with hub.lock:
                hub.bytes_sent += len(piece)  # first: the client may look as soon as it has them
            self.wfile.write(piece)
            if hub.faults.bytes_per_s is not None:
                time.sleep(len(piece) / hub.faults.bytes_per_s)


def _row(name: str, file: HubFile) -> dict[str, Any]:
    digest = file.digest()
    row: dict[str, Any] = {"rfilename": name, "size": file.size, "blobId": digest[:40]}
    if file.is_large:
        row["lfs"] = {"size": file.size, "sha256": digest, "pointerSize": 134}
    return row
