"""A JSON reader for headers from strangers: what it builds is bounded, keys are unique, no NaN.

The `json` module builds the whole value first: 100 MB of `[[],[],...` become gigabytes, and deep
nesting ends the interpreter's stack. Here the outer levels are walked key by key, and only small
objects are handed to `json`.
"""

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NoReturn

from localv4.errors import BadFileError
from localv4.storage.names import quoted

MAX_STRING_BYTES = 1 << 20
"""Names have some 100 bytes; only notes in the metadata of a file come near."""

_SPACE = rb"[ \t\n\r]*+"
_STRING = re.compile(_SPACE + rb'"((?:[^"\\\x00-\x1f]++|\\.)*+)"')
_SMALL_OBJECT = re.compile(_SPACE + rb"(\{[^{}]*+\})")
_PUNCTUATION = {char: re.compile(_SPACE + re.escape(char)) for char in (b"{", b"}", b":", b",")}
_END = re.compile(_SPACE + rb"\Z")


class StrictJson:
    """A position in a JSON text that moves forward as values are read.

    Every method raises BadFileError when the text is not what it reads.
    """

    def __init__(self, path: Path, text: bytes, what: str) -> None:
        """Read `text`, which is the part of the file `path` that messages call `what`."""
        self._path = path
        self._text = text
        self._what = what
        self._position = 0

    def keys(self, limit: int) -> Iterator[str]:
        """Yield the keys of the object here, `limit` at most; the caller reads each value."""
        self._expect(b"{")
        seen: set[str] = set()
        more = not self._accept(b"}")
        while more:
            key = self.string()
            if key in seen:
                self._fail(f"the key {quoted(key)} occurs twice")
            if len(seen) == limit:
                self._fail(f"more than {limit} keys")
            seen.add(key)
            self._expect(b":")
            yield key
            more = not self._accept(b"}")
            if more:
                self._expect(b",")

    def string(self) -> str:
        """Read a string of at most MAX_STRING_BYTES."""
        match = _STRING.match(self._text, self._position)
        if match is None or len(match[1]) > MAX_STRING_BYTES:
            self._fail(f"a string of at most {MAX_STRING_BYTES} bytes was due")
        raw = match[1]
        try:
            text = raw.decode("utf-8")
            if "\\" in text:
                text = json.loads(f'"{text}"')
                text.encode("utf-8")  # fails for half of a surrogate pair, which names no character
        except ValueError:
            self._fail("a string is not valid")
        self._position = match.end()
        return text

    def small_object(self, limit: int) -> dict[str, Any]:
        """Read an object of at most `limit` bytes that holds no other object."""
        match = _SMALL_OBJECT.match(self._text, self._position)
        if match is None or len(match[1]) > limit:
            self._fail(f"an object of at most {limit} bytes without objects inside was due")
        try:
            fields = _DECODER.decode(match[1].decode("utf-8"))
        except (ValueError, RecursionError) as error:
            self._fail(f"not valid JSON: {error}")
        self._position = match.end()
        assert isinstance(fields, dict)
        return fields

    def finish(self) -> None:
        """Check that only white space is left."""
        if not _END.match(self._text, self._position):
            self._fail("the end was due")

    def _accept(self, char: bytes) -> bool:
        match = _PUNCTUATION[char].match(self._text, self._position)
        if match is None:
            return False
        self._position = match.end()
        return True

    def _expect(self, char: bytes) -> None:
        if not self._accept(char):
            self._fail(f"{char.decode()!r} was due")

    def _fail(self, detail: str) -> NoReturn:
        raise BadFileError(self._path, f"{self._what}, byte {self._position}: {detail}")


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    fields = dict(pairs)
    if len(fields) != len(pairs):
        raise ValueError("a key occurs twice")
    return fields


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is no JSON number")


_DECODER = json.JSONDecoder(object_pairs_hook=_unique, parse_constant=_refuse_constant)
