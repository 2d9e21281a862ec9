"""What the user hands in: prompt text from arguments, files and stdin; small JSON files."""

import codecs
import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO

from localv4.cli import terminal
from localv4.errors import BadFileError, DoesNotFitError, LocalV4Error, NotFoundError, UsageError

# Bytes. A prompt that fills a context of a million tokens has about 5 MB.
MAX_PROMPT_BYTES = 32 * 2**20
MAX_JSON_BYTES = 32 * 2**20

# The longer marks come first: the UTF-32 one begins like the UTF-16 one.
BYTE_ORDER_MARKS = (
    (codecs.BOM_UTF8, "utf-8"),
    (codecs.BOM_UTF32_LE, "utf-32-le"),
    (codecs.BOM_UTF32_BE, "utf-32-be"),
    (codecs.BOM_UTF16_LE, "utf-16-le"),
    (codecs.BOM_UTF16_BE, "utf-16-be"),
)

Warn = Callable[[str], None]


def read_prompt(argument: str | None, file: Path | None, *, exact: bool = False, warn: Warn) -> str:
    """Join the prompt given as an argument, in a file and on stdin by blank lines.

    `exact` keeps every line end as it is; otherwise line ends become newlines and those at the end
    of a part are dropped. Raises UsageError when nothing is left.
    """
    parts = []
    if argument is not None:
        # what the shell passed may hold bytes that are not text in any encoding
        parts.append(decode_text(os.fsencode(argument), "the prompt", warn))
    if file is not None and str(file) != "-":
        parts.append(decode_text(read_limited(file, MAX_PROMPT_BYTES), str(file), warn))
    if sys.stdin is not None and not terminal.is_terminal(sys.stdin):
        data = _take(sys.stdin.buffer, MAX_PROMPT_BYTES, "stdin")
        parts.append(decode_text(data, "stdin", warn))
    if not exact:
        parts = [part.replace("\r\n", "\n").rstrip("\n") for part in parts]
    prompt = "\n\n".join(part for part in parts if part)
    if not prompt.strip():
        raise UsageError("there is no prompt", hint='localv4 run "Why is the sky blue?"')
    return prompt


def read_text_file(path: Path, warn: Warn) -> str:
    """Return the text of a file that the user named, at most MAX_PROMPT_BYTES of it."""
    return decode_text(read_limited(path, MAX_PROMPT_BYTES), str(path), warn)


def decode_text(data: bytes, name: str, warn: Warn) -> str:
    """Decode UTF-8, or what a byte order mark announces; warn about bytes that are not text."""
    encoding = "utf-8"
    for mark, marked in BYTE_ORDER_MARKS:
        if data.startswith(mark):
            data, encoding = data[len(mark) :], marked
            break
    text = data.decode(encoding, errors="replace")
    if "\0" in text:
        raise UsageError(f"{name} holds NUL bytes: it is a binary file, not text")
    try:
        data.decode(encoding)
    except UnicodeDecodeError as error:
        place = f"{name} is not valid {encoding.upper()} from byte {error.start} on"
        warn(f"{place}: replaced by U+FFFD")
    return text


def read_limited(path: Path, limit: int) -> bytes:
    """Return the bytes of a file, or raise a plain error: missing, unreadable or above `limit`."""
    try:
        with path.open("rb") as file:
            return _take(file, limit, str(path))
    except FileNotFoundError as error:
        raise NotFoundError(f"no such file: {path}") from error
    except OSError as error:
        raise LocalV4Error(f"cannot read {path}: {error.strerror}") from error
    except ValueError as error:  # a NUL in the name
        raise UsageError(f"not a file name: {path}") from error


def read_json(path: Path) -> Any:
    """Return the JSON value in a file of at most MAX_JSON_BYTES. Raises BadFileError."""
    return parse_json(path, read_limited(path, MAX_JSON_BYTES))


def parse_json(path: Path, data: bytes) -> Any:
    """Return the JSON value that `data`, the content of `path`, stands for. Raises BadFileError."""
    try:
        return json.loads(data, parse_constant=_refuse_constant)
    except RecursionError as error:
        raise BadFileError(path, "JSON is nested too deeply") from error
    except (ValueError, UnicodeError) as error:
        raise BadFileError(path, f"not valid JSON: {error}") from error


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is not a JSON number")


def _take(stream: BinaryIO, limit: int, name: str) -> bytes:
    """Read a stream to its end, but never more than `limit` bytes."""
    data = stream.read(limit + 1)
    if len(data) > limit:
        raise DoesNotFitError(
            f"{name} is larger than {limit // 2**20} MiB", hint="give a part of it"
        )
    return data
