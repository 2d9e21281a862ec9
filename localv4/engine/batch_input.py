"""The rows of a batch file: found, named and bounded before the first of them is answered.

A file is one JSON object a line, in OpenAI's Batch shape or a short form, or (`.txt`) one prompt a
line. The first reading keeps only where each row lies, so that a file of any length fits into
memory; rows are read again when their turn comes.
"""

import hashlib
import json
import math
import stat
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Literal, NoReturn

from localv4.errors import BadFileError, LocalV4Error, NotFoundError, UsageError

MAX_LINE_BYTES = 10 * 2**20
"""A prompt that fills a context of a million tokens has about 5 MB."""

MAX_ID_CHARS = 512

_SKIPPED_BYTES = 1 << 20
_UTF8_MARK = b"\xef\xbb\xbf"
_FOREIGN = {
    b"\x1f\x8b": "compressed by gzip",
    b"BZh91AY": "compressed by bzip2",
    b"\xfd7zXZ": "compressed by xz",
    b"\x28\xb5\x2f\xfd": "compressed by zstd",
    b"PK\x03\x04": "a zip archive",
    b"\xff\xfe": "text in UTF-16",
    b"\xfe\xff": "text in UTF-16",
}

Kind = Literal["chat", "completion"]
"""What a row asks for: an answer to messages, or how a text goes on."""

_URLS: dict[str, Kind] = {"/v1/chat/completions": "chat", "/v1/completions": "completion"}
_ENVELOPE = ("custom_id", "method", "url")


class RowError(LocalV4Error):
    """A row cannot be answered; `code` says why in a word that programs can compare."""

    def __init__(self, code: str, message: str) -> None:
        super().__init__(message)
        self.code = code


@dataclass(frozen=True, slots=True)
class Place:
    """Where a row lies in the file: `line` from 1 on, bytes from `offset`; and its content."""

    line: int
    offset: int
    nbytes: int
    custom_id: str
    digest: bytes


@dataclass(frozen=True, slots=True)
class Row:
    """A row of the input. `problem` says why it cannot be answered; then the body is empty."""

    custom_id: str
    digest: bytes
    kind: Kind
    body: dict[str, Any]
    problem: RowError | None = None


@dataclass(frozen=True, slots=True)
class BatchInput:
    """All rows of a file, by place."""

    path: Path
    is_text: bool
    places: list[Place]

    def lines(self, places: Iterable[Place]) -> Iterator[tuple[Place, bytes]]:
        """Yield rows as they stand in the file; LocalV4Error when it was changed meanwhile."""
        with _open(self.path) as file:
            for place in places:
                file.seek(place.offset)
                data = _content(file.read(min(place.nbytes, MAX_LINE_BYTES + 1)))
                if place.nbytes <= MAX_LINE_BYTES and _digest(data) != place.digest:
                    raise LocalV4Error(f"{self.path} was changed while it was read")
                yield place, data


def scan(path: Path) -> BatchInput:
    """Find the rows of a file; blank lines are none.

    Raises NotFoundError, BadFileError for what is no such file, and UsageError when two rows have
    the same custom_id.
    """
    is_text = path.suffix.lower() == ".txt"
    places: list[Place] = []
    lines: dict[str, int] = {}
    for line, offset, nbytes, data, digest in _scan_lines(path):
        custom_id = parse_row(line, data, is_text, digest).custom_id
        if custom_id in lines:
            raise UsageError(
                f"{path}: lines {lines[custom_id]} and {line} have the same custom_id"
                f" {custom_id[:80]!r}",
                hint="results are told apart by it: give each row its own",
            )
        lines[custom_id] = line
        places.append(Place(line, offset, nbytes, custom_id, digest))
    return BatchInput(path, is_text, places)


def parse_row(line: int, data: bytes, is_text: bool, digest: bytes) -> Row:
    """Return the row that a line of the file stands for; one with a `problem` if it is bad."""
    custom_id = f"line-{line}"
    try:
        if len(data) > MAX_LINE_BYTES:
            raise RowError("line_too_long", f"line {line} is longer than {MAX_LINE_BYTES} bytes")
        text = _decoded(line, data)
        if is_text:
            return Row(custom_id, digest, "chat", {"prompt": text})
        fields = _object(line, text)
        custom_id = _custom_id(line, fields)
        return Row(custom_id, digest, _kind(line, fields), _body(line, fields))
    except RowError as problem:
        return Row(custom_id, digest, "chat", {}, problem)


def _open(path: Path) -> BinaryIO:
    """Open a regular file: rows are read twice, which a pipe does not allow."""
    try:
        if not stat.S_ISREG(path.stat().st_mode):
            raise BadFileError(path, "is not a regular file", hint="save the rows into a file")
        return path.open("rb")
    except FileNotFoundError:
        raise NotFoundError(f"no such file: {path}") from None
    except OSError as error:
        raise LocalV4Error(f"cannot read {path}: {error.strerror}") from error
    except ValueError as error:  # a NUL in the name
        raise UsageError(f"not a file name: {path}") from error


def _scan_lines(path: Path) -> Iterator[tuple[int, int, int, bytes, bytes]]:
    """Yield (line, offset, bytes, content, digest) of each line that is not blank.

    Of a line that is too long the content is cut behind the limit, the digest is of all of it.
    """
    with _open(path) as file:
        start = file.read(8)
        for magic, what in _FOREIGN.items():
            if start.startswith(magic):
                raise BadFileError(path, f"{what}, expected rows as UTF-8 text")
        file.seek(offset := len(_UTF8_MARK) if start.startswith(_UTF8_MARK) else 0)
        line = 0
        while data := file.readline(MAX_LINE_BYTES + 2):
            line += 1
            content = _content(data)
            digest = _digest(content)
            if len(content) > MAX_LINE_BYTES:
                digest = _skip_line(file, data)
            end = file.tell()
            if content.strip():
                yield line, offset, end - offset, content, digest
            offset = end


def _content(data: bytes) -> bytes:
    """Return a line without its end."""
    return data.removesuffix(b"\n").removesuffix(b"\r")


def _digest(content: bytes) -> bytes:
    return hashlib.sha256(content).digest()


def _skip_line(file: BinaryIO, data: bytes) -> bytes:
    """Go to the end of a line that began with `data`; return the digest of all of it."""
    digest = hashlib.sha256(data)
    while data and not data.endswith(b"\n"):
        data = file.readline(_SKIPPED_BYTES)
        digest.update(data)
    return digest.digest()


def _decoded(line: int, data: bytes) -> str:
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        where = f"line {line}, byte {error.start}"
        raise RowError("invalid_text", f"{where}: not valid UTF-8") from None


def _object(line: int, text: str) -> dict[str, Any]:
    """Parse a JSON object whose numbers are all numbers."""
    try:
        value = json.loads(text, parse_constant=_refuse_number, parse_float=_finite)
    except RecursionError:
        raise RowError("invalid_json", f"line {line}: JSON is nested too deeply") from None
    except ValueError as error:
        raise RowError("invalid_json", f"line {line}: not valid JSON: {error}") from None
    if not isinstance(value, dict):
        raise RowError("invalid_json", f"line {line}: not a JSON object")
    return value


def _refuse_number(name: str) -> NoReturn:
    raise ValueError(f"{name} is not a JSON number")


def _finite(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        _refuse_number(text[:40])
    return value


def _custom_id(line: int, fields: dict[str, Any]) -> str:
    """Return the row's own name, or one made of its line number."""
    given = fields.get("custom_id")
    if given is None:
        return f"line-{line}"
    if not isinstance(given, str) or not 0 < len(given) <= MAX_ID_CHARS:
        limit = f"a string of 1 to {MAX_ID_CHARS} characters"
        raise RowError("invalid_request", f"line {line}: custom_id must be {limit}")
    return given


def _kind(line: int, fields: dict[str, Any]) -> Kind:
    """Return what the row's method and url ask for."""
    method, url = fields.get("method", "POST"), fields.get("url", "/v1/chat/completions")
    if method != "POST":
        raise RowError("invalid_request", f"line {line}: method must be POST")
    if not isinstance(url, str) or url not in _URLS:
        raise RowError("unknown_url", f"line {line}: url must be {' or '.join(_URLS)}")
    return _URLS[url]


def _body(line: int, fields: dict[str, Any]) -> dict[str, Any]:
    """Return the request; in the short forms the row is the request itself."""
    if "body" not in fields:
        return {name: value for name, value in fields.items() if name not in _ENVELOPE}
    body = fields["body"]
    if not isinstance(body, dict):
        raise RowError("invalid_request", f"line {line}: body must be an object")
    return body
