"""Files that record which experts tokens chose: numbers of experts, no text and no token ids.

A file is a head, then one row for each token, so that what was written before a crash can be read:

    8 bytes   LV4ROUTE
    u32       version, 1
    u32       bytes of the JSON object that follows (`TraceHead`)
    rows      u8: 1 for a token of a prompt, 0 for one that was generated;
              u8 or, beyond 256 experts, u16: layers x k numbers of experts

Integers are little-endian.
"""

import json
import struct
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from types import TracebackType
from typing import Self

import numpy as np
from numpy.typing import NDArray

from localv4.errors import BadFileError, LocalV4Error, NotFoundError

MAGIC = b"LV4ROUTE"
VERSION = 1
_FIXED = struct.Struct("<8sII")

MAX_HEAD_BYTES = 1 << 16
MAX_LAYERS, MAX_EXPERTS = 512, 1024
MAX_TOKENS = 1 << 20
"""Tokens that are read of a file; 270 MB for Flash."""

MAX_RECORD_BYTES = 1 << 40

Chosen = NDArray[np.int16]
"""Numbers of experts: (layers, k) of a token, (tokens, layers, k) of several."""


@dataclass(frozen=True, slots=True)
class TraceHead:
    """Whose routes these are.

    `fingerprint` tells the model, `model` is what its user calls it; `record_bytes` are the bytes
    of an expert by layer, 0 for a layer whose experts are never read.
    """

    fingerprint: str
    model: str
    layers: int
    experts: int
    k: int
    record_bytes: tuple[int, ...]

    @property
    def dtype(self) -> np.dtype[np.void]:
        """The row of a token."""
        number = np.dtype("<u1" if self.experts <= 256 else "<u2")
        return np.dtype([("is_prompt", "<u1"), ("chosen", number, (self.layers, self.k))])


@dataclass(frozen=True, slots=True)
class Trace:
    """The routes of a file: `chosen` (tokens, layers, k), `is_prompt` (tokens,)."""

    head: TraceHead
    chosen: Chosen
    is_prompt: NDArray[np.bool_]


class TraceWriter:
    """Appends the routes of tokens to a file. LocalV4Error if it cannot be written."""

    def __init__(self, path: Path, head: TraceHead) -> None:
        self.path, self.head = path, head
        text = json.dumps(asdict(head)).encode()
        try:
            self._file = path.open("wb")
        except OSError as error:
            raise self._failure(error) from error
        self._write(_FIXED.pack(MAGIC, VERSION, len(text)) + text)

    def append(self, chosen: NDArray[np.integer], is_prompt: bool) -> None:
        """Add a token (layers, k), or several (tokens, layers, k)."""
        routes = chosen.reshape(-1, self.head.layers, self.head.k)
        rows = np.zeros(len(routes), self.head.dtype)
        rows["is_prompt"] = is_prompt
        rows["chosen"] = routes
        self._write(rows.tobytes())

    def _write(self, data: bytes) -> None:
        try:
            self._file.write(data)
            self._file.flush()  # a crash of this process loses nothing
        except OSError as error:
            raise self._failure(error) from error

    def _failure(self, error: OSError) -> LocalV4Error:
        return LocalV4Error(f"cannot write {self.path}: {error.strerror or error}")

    def close(self) -> None:
        """Close the file."""
        self._file.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()


def read_trace(path: Path) -> Trace:
    """Return the routes of a file; a row that was cut off by a crash does not count.

    Raises NotFoundError when there is no file, BadFileError when it is something else.
    """
    try:
        if not path.is_file():
            raise NotFoundError(f"no trace {path}")
        with path.open("rb") as file:
            start = file.read(_FIXED.size)
            head = _read_head(path, file.read(_head_bytes(path, start)))
            data = file.read(MAX_TOKENS * head.dtype.itemsize + 1)
    except OSError as error:
        raise LocalV4Error(f"cannot read {path}: {error.strerror or error}") from error
    if len(data) > MAX_TOKENS * head.dtype.itemsize:
        raise BadFileError(path, f"more than {MAX_TOKENS} tokens")
    rows = np.frombuffer(data, head.dtype, len(data) // head.dtype.itemsize)
    _check_rows(path, head, rows)
    return Trace(head, rows["chosen"].astype(np.int16), rows["is_prompt"] == 1)


def _head_bytes(path: Path, start: bytes) -> int:
    """Return the length of the JSON object, after checking what stands before it."""
    if len(start) < _FIXED.size or not start.startswith(MAGIC):
        raise BadFileError(path, "is no trace of routes", hint="localv4 run --trace-routes FILE")
    _, version, length = _FIXED.unpack(start)
    if version != VERSION:
        raise BadFileError(path, f"version {version} of traces, this localv4 reads {VERSION}")
    if length > MAX_HEAD_BYTES:
        raise BadFileError(path, f"its head has {length} bytes, at most {MAX_HEAD_BYTES}")
    return int(length)


def _read_head(path: Path, text: bytes) -> TraceHead:
    try:
        fields = json.loads(text.decode())
    except (ValueError, RecursionError) as error:
        raise BadFileError(path, "its head is damaged") from error
    if not isinstance(fields, Mapping):
        raise BadFileError(path, "its head is no object")
    layers = _whole(path, fields, "layers", MAX_LAYERS)
    experts = _whole(path, fields, "experts", MAX_EXPERTS)
    k = _whole(path, fields, "k", experts)
    sizes = fields.get("record_bytes")
    if not isinstance(sizes, list) or len(sizes) != layers or not any(sizes):
        raise BadFileError(path, f"record_bytes is not a list of {layers} sizes")
    if any(type(size) is not int or not 0 <= size <= MAX_RECORD_BYTES for size in sizes):
        raise BadFileError(path, "record_bytes holds something else than sizes")
    names = [fields.get("fingerprint"), fields.get("model")]
    if not all(isinstance(name, str) for name in names):
        raise BadFileError(path, "its head does not name the model")
    return TraceHead(str(names[0]), str(names[1]), layers, experts, k, tuple(sizes))


def _whole(path: Path, fields: Mapping[str, object], name: str, largest: int) -> int:
    value = fields.get(name)
    if type(value) is not int or not 1 <= value <= largest:
        raise BadFileError(path, f"{name} is {value!r}, expected 1 to {largest}")
    return value


def _check_rows(path: Path, head: TraceHead, rows: NDArray[np.void]) -> None:
    if len(rows) == 0:
        raise BadFileError(path, "holds no token")
    if rows["is_prompt"].max() > 1:
        raise BadFileError(path, f"row {int(np.argmax(rows['is_prompt'] > 1))} is damaged")
    chosen = np.sort(rows["chosen"], axis=2)
    wrong = (chosen[:, :, -1] >= head.experts) | (np.diff(chosen.astype(np.int32)) == 0).any(2)
    if wrong.any():
        token, layer = np.argwhere(wrong)[0].tolist()
        raise BadFileError(path, f"row {token} is damaged: the experts of layer {layer}")
