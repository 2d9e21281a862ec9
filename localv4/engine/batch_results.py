"""The result file of a batch: rows in OpenAI's shape, each on disk as soon as it is known.

A row names the run that it belongs to: its `id` is made of what was asked, of which model and how.
So a later run sees which rows are done, drops the one that was cut, and refuses the results of
another input, model or setting. Rows hold no times: the same rows give the same bytes.
"""

import hashlib
import json
import os
import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from filelock import FileLock, Timeout

from localv4.engine.batch_input import BatchInput, Place, RowError
from localv4.engine.batch_request import Request
from localv4.engine.batch_rows import Answer
from localv4.errors import LocalV4Error, UsageError
from localv4.finished_file import sync_folder
from localv4.text.completion import Completion

Document = dict[str, Any]
"""A row of the output, as a JSON object."""

MAX_RESULT_BYTES = 64 * 2**20
"""An answer of a million tokens has about 5 MB; escapes make it a few times longer."""

_KEY_DIGITS = 24
_OPENING = b'{"id": "batch_req_'
_FOREIGN_HINT = "choose another --output, or discard what is there with --overwrite"
# JSON leaves them as they are, and some programs end a line there.
_LINE_ENDS = {ord(char): f"\\u{ord(char):04x}" for char in "\x85\u2028\u2029"}
_SURROGATE = re.compile("[\ud800-\udfff]")


class Results:
    """Makes the rows of the output of one run; `identity` tells runs apart."""

    def __init__(self, identity: str, model: str) -> None:
        self.identity, self._model = identity, model

    def key(self, custom_id: str, digest: bytes) -> str:
        """Return the name of a row's result: of this run, this id and this content."""
        facts = f"{self.identity}\n{custom_id}\n".encode("utf-8", "surrogatepass")
        return hashlib.sha256(facts + digest).hexdigest()[:_KEY_DIGITS]

    def answered(self, request: Request, answer: Answer) -> Document:
        """Return the row of an answer."""
        key = self.key(request.custom_id, request.digest)
        read = len(request.job.prompt_ids)
        choice = {
            "index": 0,
            **_content(request, answer.completion, key),
            "logprobs": None,
            "finish_reason": answer.finish_reason,
        }
        is_chat = request.kind == "chat"
        body = {
            "id": f"{'chatcmpl' if is_chat else 'cmpl'}-{key}",
            "object": "chat.completion" if is_chat else "text_completion",
            "created": 0,
            "model": self._model,
            "system_fingerprint": f"fp_{self.identity[:12]}",
            "choices": [choice],
            "usage": {
                "prompt_tokens": read,
                "completion_tokens": len(answer.token_ids),
                "total_tokens": read + len(answer.token_ids),
            },
        }
        response = {"status_code": 200, "request_id": f"req_{key}", "body": body}
        return _document(key, request.custom_id, response, None)

    def failed(self, custom_id: str, digest: bytes, error: LocalV4Error) -> Document:
        """Return the row of a request that has no answer."""
        code = error.code if isinstance(error, RowError) else _code_of(error)
        detail = {"code": code, "message": error.message}
        return _document(self.key(custom_id, digest), custom_id, None, detail)


def _document(
    key: str, custom_id: str, response: Document | None, error: Document | None
) -> Document:
    return {
        "id": f"batch_req_{key}",
        "custom_id": custom_id,
        "response": response,
        "error": error,
    }


def _code_of(error: LocalV4Error) -> str:
    """Return the name of the kind of an error: DoesNotFitError is `does_not_fit`."""
    words = re.findall("[A-Z][a-z]+", type(error).__name__.removesuffix("Error"))
    return "_".join(words).lower() or "failed"


def _content(request: Request, completion: Completion, key: str) -> Document:
    """Return what was said, in the field where the endpoint has it."""
    text = completion.content + (completion.raw_tool_text or "")
    if request.kind == "completion":
        return {"text": text}
    message: Document = {"role": "assistant", "content": text}
    if completion.reasoning is not None:
        message["reasoning_content"] = completion.reasoning
    if completion.tool_calls:
        message["content"] = text or None
        message["tool_calls"] = [
            {
                "id": f"call_{key}_{index}",
                "type": "function",
                "function": {"name": call.name, "arguments": call.arguments},
            }
            for index, call in enumerate(completion.tool_calls)
        ]
    return {"message": message}


def encoded(document: Document) -> bytes:
    """Return a row as a line of UTF-8."""
    text = json.dumps(document, ensure_ascii=False)
    if _SURROGATE.search(text):  # half of a character in a custom_id: only an escape can say it
        text = json.dumps(document)
    return text.translate(_LINE_ENDS).encode() + b"\n"


class ResultFile:
    """A result file that this process alone adds rows to.

    `done` are the ids of the rows that are in it, `failed` is the number of those without an
    answer. As a context manager it lets go of the file in the end.
    """

    def __init__(self, path: Path, rows: BatchInput, results: Results, *, overwrite: bool) -> None:
        """Open or begin the file. Raises UsageError when it holds anything but this run's rows."""
        self.path = path
        self.done: set[str] = set()
        self.failed = 0
        _check_paths(rows.path, path)
        self._lock = _claim(path)
        try:
            self._file = path.open("r+b" if path.exists() and not overwrite else "w+b", buffering=0)
            end = self._read(rows.places, results)
            self._file.truncate(end)
            self._file.seek(end)
            sync_folder(path.parent)
        except OSError as error:
            self._lock.release()
            raise LocalV4Error(f"cannot write {path}: {error.strerror}") from error
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def append(self, document: Document) -> None:
        """Add a row; it is on disk when this returns."""
        rest = memoryview(encoded(document))
        try:
            while rest:
                rest = rest[self._file.write(rest) :]
            os.fsync(self._file.fileno())
        except OSError as error:
            raise LocalV4Error(f"cannot write {self.path}: {error.strerror}") from error
        self.done.add(document["custom_id"])
        self.failed += document["error"] is not None

    def close(self) -> None:
        """Let others have the file."""
        self._file.close()
        self._lock.release()

    def _read(self, places: Iterable[Place], results: Results) -> int:
        """Note which rows are done; return where the next one belongs."""
        digests = {place.custom_id: place.digest for place in places}
        end = 0
        for line, data in enumerate(_lines(self.path), 1):
            if not data.endswith(b"\n"):
                if not _may_be_cut_row(data):
                    raise self._foreign(f"line {line} is no row of results")
                break
            document = self._document(line, data)
            custom_id = document["custom_id"]
            digest = digests.get(custom_id)
            if digest is None:
                raise self._foreign(f"line {line}: {custom_id[:80]!r} is not in the input")
            if document["id"] != f"batch_req_{results.key(custom_id, digest)}":
                detail = "was asked otherwise, of another model or with other options"
                raise self._foreign(f"line {line}: {custom_id[:80]!r} {detail}")
            if custom_id in self.done:
                raise self._foreign(f"line {line}: {custom_id[:80]!r} is there twice")
            self.done.add(custom_id)
            self.failed += document.get("error") is not None
            end += len(data)
        return end

    def _document(self, line: int, data: bytes) -> Mapping[str, Any]:
        """Parse a row that is to have an id and a custom_id."""
        try:
            document = json.loads(data)
        except (ValueError, RecursionError):
            document = None
        if not isinstance(document, dict) or not all(
            isinstance(document.get(name), str) for name in ("id", "custom_id")
        ):
            raise self._foreign(f"line {line} is no row of results")
        return document

    def _foreign(self, detail: str) -> UsageError:
        return UsageError(f"{self.path} is not of this run: {detail}", hint=_FOREIGN_HINT)


def _check_paths(given: Path, path: Path) -> None:
    """Refuse to write the results over the input, or where no file can be."""
    if path.exists() and path.samefile(given):
        raise UsageError(f"{path} is the input: results need a file of their own")
    if path.exists() and not path.is_file():
        raise UsageError(f"{path} is not a regular file")
    if not path.parent.is_dir():
        raise UsageError(f"there is no folder {path.parent}")


def _claim(path: Path) -> FileLock:
    """Keep other processes from the file until the lock is released or we end."""
    lock = FileLock(path.with_name(f".{path.name}.lock"))
    try:
        lock.acquire(timeout=0)
    except Timeout:
        raise UsageError(
            f"{path} is being written by another localv4", hint="give each run its own --output"
        ) from None
    except OSError as error:
        raise LocalV4Error(f"cannot write in {path.parent}: {error.strerror}") from error
    return lock


def _lines(path: Path) -> Iterator[bytes]:
    """Yield the lines of a file from its beginning; the last may have no end."""
    with path.open("rb") as reader:
        while data := reader.readline(MAX_RESULT_BYTES + 1):
            if len(data) > MAX_RESULT_BYTES:
                raise UsageError(f"{path} has a line that is too long for a result")
            yield data


def _may_be_cut_row(data: bytes) -> bool:
    """Say whether the end of a file may be a row that a crash has cut; some leave zeros there."""
    start = data.rstrip(b"\0")[: len(_OPENING)]
    return _OPENING.startswith(start)
