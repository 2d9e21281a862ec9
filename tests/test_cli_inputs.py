"""Prompts from arguments, files and stdin; small JSON files."""

import io
import json
import sys
from pathlib import Path

import pytest

from localv4.cli import inputs
from localv4.errors import BadFileError, DoesNotFitError, LocalV4Error, NotFoundError, UsageError


class Stdin:
    """A stdin that is a pipe with these bytes."""

    def __init__(self, data: bytes) -> None:
        self.buffer = io.BytesIO(data)

    def isatty(self) -> bool:
        return False


def read(
    monkeypatch: pytest.MonkeyPatch,
    argument: str | None = None,
    file: Path | None = None,
    stdin: bytes = b"",
    *,
    exact: bool = False,
    warnings: list[str] | None = None,
) -> str:
    monkeypatch.setattr(sys, "stdin", Stdin(stdin))
    warn = (warnings if warnings is not None else []).append
    return inputs.read_prompt(argument, file, exact=exact, warn=warn)


def test_parts_are_joined_by_empty_lines(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    file = tmp_path / "notes.txt"
    file.write_bytes(b"from\r\na file\r\n\n")
    assert read(monkeypatch, "asked", file, b"piped\n") == "asked\n\nfrom\na file\n\npiped"
    assert read(monkeypatch, "asked") == "asked"
    assert read(monkeypatch, stdin=b"piped\n\n") == "piped"
    assert read(monkeypatch, stdin=b"a\r\n", exact=True) == "a\r\n"


def test_dash_is_stdin(monkeypatch: pytest.MonkeyPatch) -> None:
    assert read(monkeypatch, "asked", Path("-"), b"piped") == "asked\n\npiped"


@pytest.mark.parametrize("argument", [None, "", " ", "\n"])
def test_nothing_to_ask(monkeypatch: pytest.MonkeyPatch, argument: str | None) -> None:
    with pytest.raises(UsageError, match="no prompt"):
        read(monkeypatch, argument, stdin=b"\n")


def test_closed_stdin(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdin", None)
    assert inputs.read_prompt("asked", None, warn=print) == "asked"


def test_file_errors(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    with pytest.raises(NotFoundError, match=r"missing\.txt"):
        read(monkeypatch, file=tmp_path / "missing.txt")
    with pytest.raises(LocalV4Error, match="cannot read"):
        read(monkeypatch, file=tmp_path)
    with pytest.raises(LocalV4Error, match=r"not a file name|no such file"):
        read(monkeypatch, file=tmp_path / "a\0b")


@pytest.mark.parametrize(
    ("data", "text"),
    [
        (b"plain", "plain"),
        (b"\xef\xbb\xbfmarked", "marked"),
        ("é€😀".encode(), "é€😀"),
        (b"\xff\xfe" + "é😀".encode("utf-16-le"), "é😀"),
        (b"\xfe\xff" + "é😀".encode("utf-16-be"), "é😀"),
        (b"\xff\xfe\0\0" + "é😀".encode("utf-32-le"), "é😀"),
        (b"\0\0\xfe\xff" + "é😀".encode("utf-32-be"), "é😀"),
    ],
)
def test_encodings(data: bytes, text: str) -> None:
    warnings: list[str] = []
    assert inputs.decode_text(data, "x", warnings.append) == text
    assert warnings == []


@pytest.mark.parametrize(
    ("data", "text"),
    [(b"a\xffb", "a\ufffdb"), (b"\xff\xfea", "\ufffd"), (b"\xed\xa0\x80", "\ufffd" * 3)],
)
def test_bytes_that_are_no_text(data: bytes, text: str) -> None:
    warnings: list[str] = []
    assert inputs.decode_text(data, "the file", warnings.append) == text
    assert len(warnings) == 1
    assert "the file is not valid UTF-" in warnings[0]


def test_binary() -> None:
    with pytest.raises(UsageError, match="NUL"):
        inputs.decode_text(b"\x7fELF\0\0", "stdin", print)


def test_argument_with_bytes_that_are_no_text(monkeypatch: pytest.MonkeyPatch) -> None:
    if sys.getfilesystemencodeerrors() != "surrogateescape":
        pytest.skip("arguments are always text here")
    warnings: list[str] = []
    assert read(monkeypatch, "a\udcff", warnings=warnings) == "a\ufffd"
    assert len(warnings) == 1


def test_too_large(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(inputs, "MAX_PROMPT_BYTES", 2**20)
    assert len(read(monkeypatch, stdin=b"a" * 2**20)) == 2**20
    with pytest.raises(DoesNotFitError, match="stdin is larger than 1 MiB"):
        read(monkeypatch, stdin=b"a" * (2**20 + 1))
    file = tmp_path / "large.txt"
    file.write_bytes(b"a" * (2**20 + 1))
    with pytest.raises(DoesNotFitError, match=r"large\.txt"):
        read(monkeypatch, file=file)


def test_read_json(tmp_path: Path) -> None:
    file = tmp_path / "list.json"
    file.write_text(json.dumps([1, {"a": None}]))
    assert inputs.read_json(file) == [1, {"a": None}]


@pytest.mark.parametrize(
    "data", [b"", b"[1,", b"[NaN]", b"[Infinity]", b"\xff", b"[" * 100_000, b"1" * 5000]
)
def test_bad_json(tmp_path: Path, data: bytes) -> None:
    file = tmp_path / "bad.json"
    file.write_bytes(data)
    with pytest.raises(BadFileError, match=r"bad\.json") as caught:
        inputs.read_json(file)
    assert "\n" not in caught.value.message
