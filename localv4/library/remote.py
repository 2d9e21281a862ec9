"""A file of the hub that is read in place: any range of it, and never more than asked for."""

import re
from collections.abc import Iterator, Mapping
from urllib.parse import urlsplit

from huggingface_hub import get_hf_file_metadata, hf_hub_url

from localv4.errors import BadFileError, LocalV4Error
from localv4.library import hub
from localv4.library.hub import OnWait, Patience, Sleep

MAX_REQUEST_BYTES = 4 << 30
"""Storage networks send no answer of more than some tens of gigabytes."""

MAX_SKIPPED_BYTES = 16 << 20
"""A server that sends whole files only is of no use for reading parts that begin later."""

_COMMIT = re.compile(r"[0-9a-f]{40}")
_CONTENT_RANGE = re.compile(r"bytes (\d{1,18})-(\d{1,18})/(\d{1,18}|\*)")

# A link to the storage behind the hub is signed for about an hour; then these come.
_EXPIRED = (400, 401, 403, 404, 410)


class RemoteFile:
    """A file in a repository at a fixed commit. Safe to use from several threads.

    `etag` is the SHA-256 of a large file and git's SHA-1 of a small one.
    """

    def __init__(
        self,
        repo: str,
        revision: str,
        name: str,
        size: int,
        etag: str,
        on_wait: OnWait | None = None,
        sleep: Sleep | None = None,
    ) -> None:
        """Describe what the hub has said about the file; `open_remote` asks it.

        `on_wait` and `sleep` are those of hub.Patience.
        """
        self.repo = repo
        self.revision = revision
        self.name = name
        self.size = size
        self.etag = etag
        self._on_wait = on_wait
        self._sleep = sleep
        self._url = hf_hub_url(repo, name, revision=revision)
        self._location: str | None = None  # where the hub redirected to, while that works

    def read(self, offset: int, nbytes: int) -> bytes:
        """Return exactly `nbytes` from `offset`; links that drop are taken up again.

        Raises ValueError for a range outside the file, LocalV4Error when it cannot be had.
        """
        if not 0 <= offset <= offset + nbytes <= self.size:
            raise ValueError(f"{offset} + {nbytes} of {self.size} bytes")
        pieces = self.stream(offset, offset + nbytes, max_skipped=MAX_SKIPPED_BYTES)
        return b"".join(pieces)

    def stream(
        self, offset: int = 0, end: int | None = None, *, max_skipped: int | None = None
    ) -> Iterator[bytes]:
        """Yield the bytes from `offset` to `end` in pieces, the whole rest by default.

        A server that ignores ranges sends the beginning, too, which is dropped: up to
        `max_skipped` bytes. Raises LocalV4Error.
        """
        end = self.size if end is None else end
        patience = Patience(self.repo, self.name, self._on_wait, self._sleep)
        while offset < end:
            stage = min(end, offset + MAX_REQUEST_BYTES)
            try:
                for piece in self._pieces(offset, stage, max_skipped):
                    offset += len(piece)
                    patience.progressed()
                    yield piece
                if offset < stage:
                    raise ConnectionResetError("the answer ended early")
            except Exception as error:
                if not hub.is_request_error(error):
                    raise
                has_expired = self._location is not None and hub.status_of(error) in _EXPIRED
                self._location = None
                if not has_expired:
                    patience.wait(error)

    def _pieces(self, offset: int, end: int, max_skipped: int | None) -> Iterator[bytes]:
        """Yield what one request brings, at most up to `end`."""
        url = self._location or self._url
        sent = hub.headers() | {"Range": f"bytes={offset}-{end - 1}"}
        if _origin(url) != _origin(self._url):
            sent.pop("authorization", None)  # the storage behind the hub must not see the token
        timeout = hub.constants.HF_HUB_DOWNLOAD_TIMEOUT
        with hub.get_session().stream("GET", url, headers=sent, timeout=timeout) as answer:
            hub.hf_raise_for_status(answer)
            self._location = str(answer.url)
            skip = self._skipped(answer.status_code, answer.headers, offset)
            if max_skipped is not None and skip > max_skipped:
                raise LocalV4Error(
                    f"{urlsplit(url).hostname} does not serve parts of files ({self.name})",
                    hint="pull the whole model first",
                )
            for piece in answer.iter_bytes():
                kept = piece[skip : skip + end - offset]
                skip = max(0, skip - len(piece))
                offset += len(kept)
                if kept:
                    yield kept
                if offset == end:
                    return

    def _skipped(self, status: int, fields: Mapping[str, str], offset: int) -> int:
        """Return how many bytes of the answer come before `offset`."""
        if status == 200:
            return offset
        found = _CONTENT_RANGE.fullmatch(fields.get("Content-Range", ""))
        is_plain = fields.get("Content-Encoding", "identity") == "identity"
        if status != 206 or found is None or int(found[1]) != offset or not is_plain:
            raise BadFileError(self.name, f"the hub answers a request for a part with {status}")
        if found[3] not in ("*", str(self.size)):
            raise BadFileError(
                self.name, f"the hub serves {found[3]} bytes, but listed {self.size}"
            )
        return 0


def open_remote(
    repo: str, name: str, revision: str | None = None, on_wait: OnWait | None = None
) -> RemoteFile:
    """Ask the hub for a file's size, commit and etag. Raises LocalV4Error, NotFoundError."""
    url = hf_hub_url(repo, name, revision=revision)
    found = hub.ask(lambda: get_hf_file_metadata(url, headers=hub.headers()), repo, name, on_wait)
    if found.commit_hash is None or found.etag is None or found.size is None:
        raise LocalV4Error(
            f"{hub.host()} does not speak the protocol of the hub", hint="check HF_ENDPOINT"
        )
    if not _COMMIT.fullmatch(found.commit_hash):
        raise LocalV4Error(f"{hub.host()} names no commit for {name}", hint="check HF_ENDPOINT")
    return RemoteFile(repo, found.commit_hash, name, found.size, found.etag, on_wait)


def _origin(url: str) -> tuple[str, str | None, int | None]:
    parts = urlsplit(url)
    return parts.scheme, parts.hostname, parts.port
