"""The manifest of a packed folder: which files belong to it, and which tensors hold packed bytes.

docs/packed_format.md describes it. A manifest may come from a stranger: every field is checked.
"""

import re
from collections.abc import Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal, TypeAlias, get_args

from localv4.errors import BadFileError
from localv4.storage.mapped_file import MappedFile, plain_errors
from localv4.storage.names import member_path, quoted
from localv4.storage.strict_json import StrictJson

MANIFEST_NAME = "manifest.json"
FORMAT = "localv4-packed"
VERSION = 2
"""Version 1 has no layers whose experts are in records of several forms."""

MAX_MANIFEST_BYTES = 16 << 20
MAX_FILES = 1024
MAX_MATRICES = 1 << 18
MAX_ENTRY_BYTES = 8192
MAX_EXPERTS = 1 << 16
MAX_NUMBER = 1 << 48
"""Sizes and counts are smaller; products of two of them still are exact."""

Layout: TypeAlias = Literal["packed", "rows", "records"]
_LAYOUTS = get_args(Layout)
_DIGEST = re.compile(r"[0-9a-f]{64}")
_FORMAT_NAME = re.compile(r"[A-Za-z0-9_]{1,16}")
_FILE_FIELDS = {"bytes", "sha256"}
_MATRIX_FIELDS = {"layout", "format", "rows", "cols"}
_RECORD_FIELDS = _MATRIX_FIELDS | {"down_format", "records", "record_bytes"}


@dataclass(frozen=True, slots=True)
class FileEntry:
    """One file of the folder."""

    nbytes: int
    sha256: str


@dataclass(frozen=True, slots=True)
class MatrixEntry:
    """What a tensor of packed bytes holds.

    Layouts: "packed" is a matrix in the packed format of that name; "rows" are its rows in blocks
    of a ggml type; "records" are experts of a layer, rows and cols those of the gate projection,
    whose down projection has a format of its own. `experts` are the numbers of the experts that the
    records hold, ascending; () means all of the layer, in order. Whether formats are known, and
    whether sizes agree, the model judges.
    """

    layout: Layout
    format: str
    rows: int
    cols: int
    down_format: str = ""
    records: int = 0
    record_bytes: int = 0
    experts: tuple[int, ...] = ()

    @property
    def numbers(self) -> Sequence[int]:
        """The numbers of the experts in the records, in their order."""
        return self.experts or range(self.records)


@dataclass(frozen=True, slots=True)
class Manifest:
    """The whole manifest; `source` tells in words what the folder was made from."""

    path: Path
    source: str
    files: Mapping[str, FileEntry]
    matrices: Mapping[str, MatrixEntry]


def is_packed_folder(folder: Path) -> bool:
    """Tell whether a folder has a manifest that says it is a packed model."""
    path = folder / MANIFEST_NAME
    with plain_errors(path):
        if not path.is_file():
            return False
        with path.open("rb") as file:
            head = file.read(256)
    return b'"container"' in head


def read_manifest(folder: Path) -> Manifest:
    """Read and check the manifest of a folder; raises NotFoundError or BadFileError."""
    path = member_path(folder, MANIFEST_NAME, folder)
    with closing(MappedFile(path)) as file:
        if file.size > MAX_MANIFEST_BYTES:
            raise BadFileError(path, f"{file.size} bytes, but {MAX_MANIFEST_BYTES} are the limit")
        text = StrictJson(path, file.read(file.size, "manifest"), "manifest")
    found: dict[str, Any] = {}
    for key in text.keys(8):
        if not found and key != "container":
            raise BadFileError(path, "is not the manifest of a packed model")
        if key == "container":
            found[key] = _checked_container(path, text.small_object(MAX_ENTRY_BYTES))
        elif key == "source":
            found[key] = text.string()
        elif key == "files":
            found[key] = _files(path, text)
        elif key == "matrices":
            found[key] = _matrices(path, text)
        else:
            raise BadFileError(path, f"the key {quoted(key)} is not known")
    text.finish()
    missing = {"container", "source", "files", "matrices"} - found.keys()
    if missing:
        raise BadFileError(path, f"{sorted(missing)[0]} is missing")
    return Manifest(path, found["source"], found["files"], found["matrices"])


def _checked_container(path: Path, fields: dict[str, Any]) -> dict[str, Any]:
    if fields.get("format") != FORMAT:
        raise BadFileError(path, "is not the manifest of a packed model")
    version = fields.get("version")
    if type(version) is not int or version < 1:
        raise BadFileError(path, "container: version is not a number")
    if version > VERSION:
        raise BadFileError(
            path,
            f"made by a newer version: format version {version}, this one reads {VERSION}",
            hint="update localv4, or convert the model again",
        )
    return fields


def _files(path: Path, text: StrictJson) -> dict[str, FileEntry]:
    files = {}
    for name in text.keys(MAX_FILES):
        member_path(path.parent, name, path)
        fields = text.small_object(MAX_ENTRY_BYTES)
        what = f"files, {quoted(name)}"
        _check_fields(path, what, fields, _FILE_FIELDS)
        digest = fields["sha256"]
        if not isinstance(digest, str) or not _DIGEST.fullmatch(digest):
            raise BadFileError(path, f"{what}: sha256 is not 64 hexadecimal digits")
        files[name] = FileEntry(_number(path, what, fields, "bytes"), digest)
    return files


def _matrices(path: Path, text: StrictJson) -> dict[str, MatrixEntry]:
    matrices = {}
    for name in text.keys(MAX_MATRICES):
        fields = text.small_object(MAX_ENTRY_BYTES)
        what = f"matrices, {quoted(name)}"
        layout: Any = fields.get("layout")
        if layout not in _LAYOUTS:
            raise BadFileError(path, f"{what}: layout is not one of {', '.join(_LAYOUTS)}")
        expected = _RECORD_FIELDS if layout == "records" else _MATRIX_FIELDS
        _check_fields(path, what, fields, expected | (fields.keys() & _optional(layout)))
        entry = MatrixEntry(
            layout,
            _format(path, what, fields, "format"),
            _number(path, what, fields, "rows"),
            _number(path, what, fields, "cols"),
        )
        if layout == "records":
            entry = replace(
                entry,
                down_format=_format(path, what, fields, "down_format"),
                records=_number(path, what, fields, "records"),
                record_bytes=_number(path, what, fields, "record_bytes"),
                experts=_experts(path, what, fields),
            )
        matrices[name] = entry
    return matrices


def _optional(layout: Layout) -> set[str]:
    return {"experts"} if layout == "records" else set()


def _experts(path: Path, what: str, fields: dict[str, Any]) -> tuple[int, ...]:
    """Return the numbers of the experts of records: as many as records, in ascending order."""
    if "experts" not in fields:
        return ()
    numbers = fields["experts"]
    if (
        not isinstance(numbers, list)
        or len(numbers) != fields["records"]
        or any(type(number) is not int or not 0 <= number < MAX_EXPERTS for number in numbers)
        or any(later <= earlier for earlier, later in pairwise(numbers))
    ):
        raise BadFileError(
            path, f"{what}: experts is not a list of its records' numbers, ascending"
        )
    return tuple(numbers)


def _check_fields(path: Path, what: str, fields: dict[str, Any], expected: set[str]) -> None:
    if fields.keys() != expected:
        shown = ", ".join(sorted(expected))
        raise BadFileError(path, f"{what}: expected the fields {shown}")


def _format(path: Path, what: str, fields: dict[str, Any], key: str) -> str:
    value = fields[key]
    if not isinstance(value, str) or not _FORMAT_NAME.fullmatch(value):
        raise BadFileError(path, f"{what}: {key} is not the name of a format")
    return value


def _number(path: Path, what: str, fields: dict[str, Any], key: str) -> int:
    value = fields[key]
    if type(value) is not int or not 0 < value <= MAX_NUMBER:
        raise BadFileError(path, f"{what}: {key} is not a number of 1 to 2^48")
    return value
