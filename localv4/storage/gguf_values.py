"""The key/value part of a GGUF file, read value by value with every length checked first."""

from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from localv4.errors import BadFileError
from localv4.storage.checkpoint import MetaValue
from localv4.storage.mapped_file import MappedFile

MAX_HEADER_BYTES = 1 << 25
"""All before the tensor data; the vocabulary of V4 with its merges takes 6 MB."""
PIECE_BYTES = 1 << 20
"""How much of a header is read at once."""
MAX_STRING_BYTES = 1 << 20
"""The longest strings are chat templates, of some 10 kB."""
MAX_KEY_BYTES = 65_535
"""The limit in the description of the format."""
MAX_ARRAY_ITEMS = 1 << 24
MAX_OBJECTS = 1 << 20
"""Items of all arrays of a file that become Python objects; each takes 32 bytes or more."""
LIST_ITEMS = 1024
"""Longer arrays of numbers stay NumPy arrays."""

UINT32, BOOL, STRING, ARRAY = 4, 7, 8, 9
_NUMBERS = {
    0: "<u1",
    1: "<i1",
    2: "<u2",
    3: "<i2",
    UINT32: "<u4",
    5: "<i4",
    6: "<f4",
    BOOL: "<u1",
    10: "<u8",
    11: "<i8",
    12: "<f8",
}
"""The little-endian layout of each number type of GGUF."""


class GgufValues:
    """A position in a GGUF header that moves forward as values are read.

    Every method raises BadFileError, naming `what` it read, when the file does not hold it.
    """

    def __init__(self, file: MappedFile) -> None:
        self._file = file
        self._objects_left = MAX_OBJECTS
        # Values are cut out of a piece of the file: a vocabulary is 500,000 reads of a few bytes.
        self._piece = b""
        self._used = 0

    @property
    def path(self) -> Path:
        """The file that is read."""
        return self._file.path

    @property
    def position(self) -> int:
        """Bytes read so far."""
        return self._file.position - len(self._piece) + self._used

    @property
    def left(self) -> int:
        """Bytes from here to the end of the file."""
        return self._file.size - self.position

    def u32(self, what: str) -> int:
        """Read a 32-bit count."""
        return int.from_bytes(self.raw(4, what), "little")

    def u64(self, what: str) -> int:
        """Read a 64-bit count."""
        return int.from_bytes(self.raw(8, what), "little")

    def string(self, what: str, limit: int = MAX_STRING_BYTES) -> str:
        """Read a string of at most `limit` bytes."""
        length = self.u64(what)
        if length > limit:
            raise self.fault(what, f"a string of {length} bytes, but {limit} are the limit")
        try:
            return self.raw(length, what).decode("utf-8")
        except UnicodeDecodeError as error:
            raise self.fault(what, f"not valid UTF-8 ({error.reason})") from error

    def value(self, type_id: int, what: str) -> MetaValue:
        """Read a value of a GGUF type."""
        if type_id == STRING:
            return self.string(what)
        if type_id == ARRAY:
            return self._array(what)
        number: MetaValue = self._numbers(type_id, 1, what)[0].item()
        return number

    def raw(self, count: int, what: str) -> bytes:
        """Read `count` bytes."""
        end = self._used + count
        if end > len(self._piece):
            self._read_piece(count, what)
            end = count
        data = self._piece[self._used : end]
        self._used = end
        return data

    def fault(self, what: str, detail: str) -> BadFileError:
        """Return the error to raise about `what`."""
        return BadFileError(self.path, f"{what}: {detail}")

    def _read_piece(self, count: int, what: str) -> None:
        """Make the piece begin here and hold `count` bytes or more."""
        if count > self.left:
            raise self.fault(what, f"needs {count} bytes, but the file has {self.left} left")
        if self.position + count > MAX_HEADER_BYTES:
            raise self.fault(what, f"the header is over the limit of {MAX_HEADER_BYTES} bytes")
        rest = self._piece[self._used :]
        unread = min(self._file.size, MAX_HEADER_BYTES) - self._file.position
        more = max(count - len(rest), min(PIECE_BYTES, unread))
        self._piece = rest + self._file.read(more, what)
        self._used = 0

    def _array(self, what: str) -> MetaValue:
        type_id = self.u32(what)
        count = self.u64(what)
        if type_id == ARRAY:
            raise self.fault(what, "an array of arrays is not supported")
        if type_id == STRING:
            return self._strings(count, what)
        numbers = self._numbers(type_id, count, what)
        if count > min(LIST_ITEMS, self._objects_left):
            return numbers
        self._objects_left -= count
        items: MetaValue = numbers.tolist()
        return items

    def _strings(self, count: int, what: str) -> list[str]:
        if count * 8 > self.left:
            raise self.fault(what, f"{count} strings do not fit into the {self.left} bytes left")
        if count > self._objects_left:
            raise self.fault(what, f"{count} strings: over the limit of {MAX_OBJECTS} in a file")
        self._objects_left -= count
        return [self.string(what) for _ in range(count)]

    def _numbers(self, type_id: int, count: int, what: str) -> NDArray[Any]:
        layout = _NUMBERS.get(type_id)
        if layout is None:
            raise self.fault(what, f"unknown value type {type_id}")
        if count > MAX_ARRAY_ITEMS:
            raise self.fault(what, f"{count} items, but {MAX_ARRAY_ITEMS} are the limit")
        dtype = np.dtype(layout)
        numbers = np.frombuffer(self.raw(count * dtype.itemsize, what), dtype)
        if type_id == BOOL:
            if count and numbers.max() > 1:
                raise self.fault(what, "a bool that is neither 0 nor 1")
            return numbers.astype(np.bool_)
        return numbers
