"""Where records lie in files, and reading them from there: the source of `Readers`."""

import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from localv4.errors import BadFileError
from localv4.paging.raw_file import ALIGNMENT, Io
from localv4.paging.readers import Key, ReadError
from localv4.paging.record_file import RecordFile

PART_BYTES = 2 << 20
"""The least that is worth a read of its own."""

RETRY_PAUSES_S = (0.0, 0.01, 0.1)
"""Times to wait before reading again what could not be read."""

OpenFile = Callable[[Path, Io], RecordFile]


@dataclass(frozen=True, slots=True)
class Piece:
    """Bytes of a file that are a record, or a matrix of one."""

    path: Path
    offset: int
    nbytes: int


class FileReads:
    """Reads records by key. Safe in any number of threads.

    A record is one piece (packed folders) or several (gate, up and down of other files), which are
    read to one address, one behind the other as `places` says. Raises what `RecordFile.open` does,
    and BadFileError for a piece that its file does not hold. `io` says how files are read, which is
    "buffered" if one of them has to be; `refusal` why, if "direct" was asked for.
    """

    def __init__(
        self, table: Mapping[Key, Sequence[Piece]], io: Io, open_file: OpenFile = RecordFile.open
    ) -> None:
        self._table = table
        self._open = open_file
        self._files: dict[Path, RecordFile] = {}
        self._by_cache: dict[Path, RecordFile] = {}
        self._lock = threading.Lock()
        try:
            for piece in (piece for pieces in table.values() for piece in pieces):
                self._check(piece, io)
        except BaseException:
            self.close()
            raise
        refusals = (file.refusal for file in self._files.values())
        self.refusal = next(filter(None, refusals), None)
        self.io: Io = "buffered" if self.refusal else io

    def load(self, key: Key, address: int) -> int:
        """Read a record; return its bytes. Raises ReadError, BadFileError if a file has changed."""
        return sum(self._read(key, *span) for span in self._spans(key, address, None))

    def split(self, key: Key, address: int, parts: int) -> list[Callable[[], int]]:
        """Return calls that together read a record, about `parts` of them."""
        nbytes = sum(piece.nbytes for piece in self._table[key])
        longest = max(PART_BYTES, -(-nbytes // (parts * ALIGNMENT)) * ALIGNMENT)
        return [partial(self._read, key, *span) for span in self._spans(key, address, longest)]

    def places(self, key: Key) -> list[int]:
        """Return where each piece begins behind the address (a multiple of ALIGNMENT).

        A piece whose offset is not aligned begins as far behind a block as it does in its file:
        only then can the system read it to its place.
        """
        places, end = [], 0
        for piece in self._table[key]:
            begin = end + (piece.offset - end) % ALIGNMENT
            places.append(begin)
            end = begin + piece.nbytes
        return places

    def room(self, key: Key) -> int:
        """Return how many bytes a record needs behind its address, gaps between pieces included."""
        return self.places(key)[-1] + self._table[key][-1].nbytes

    def check_unchanged(self) -> None:
        """Raise BadFileError when one of the files was written to since it was opened."""
        for file in self._files.values():
            file.check_unchanged()

    def close(self) -> None:
        """Close the files. No read may be under way."""
        for file in (*self._files.values(), *self._by_cache.values()):
            file.close()
        self._files.clear()
        self._by_cache.clear()

    def _check(self, piece: Piece, io: Io) -> None:
        """Open the file of a piece, if it is the first one there, and see that it ends behind."""
        file = self._files.get(piece.path)
        if file is None:
            file = self._files[piece.path] = self._open(piece.path, io)
        if piece.offset < 0 or piece.nbytes <= 0 or piece.offset + piece.nbytes > file.size:
            detail = f"{piece.nbytes} bytes of an expert at {piece.offset}: it has {file.size}"
            raise BadFileError(piece.path, detail)

    def _spans(
        self, key: Key, address: int, longest: int | None
    ) -> Iterator[tuple[Path, int, int, int]]:
        """Yield file, address, offset, bytes of what is read at a time; cuts are aligned."""
        for piece, place in zip(self._table[key], self.places(key), strict=True):
            at, end = piece.offset, piece.offset + piece.nbytes
            while at < end:
                stop = end if longest is None else (at + longest) // ALIGNMENT * ALIGNMENT
                stop = min(stop, end)
                yield piece.path, address + place + at - piece.offset, at, stop - at
                at = stop

    def _read(self, key: Key, path: Path, address: int, offset: int, nbytes: int) -> int:
        """Read part of a record, again through the page cache if it fails; return its bytes."""
        file = self._files[path]
        try:
            file.read(address, offset, nbytes)
            return nbytes
        except (OSError, EOFError) as error:
            failure = error
        for pause_s in RETRY_PAUSES_S:
            file.check_unchanged()
            time.sleep(pause_s)
            try:
                self._cached(path).read(address, offset, nbytes)
                return nbytes
            except (OSError, EOFError) as error:
                failure = error
        layer, expert = key
        reason = getattr(failure, "strerror", None) or str(failure)
        where = f"{path} at offset {offset}: {reason}"
        raise ReadError(f"expert {expert} of layer {layer} cannot be read ({where})") from failure

    def _cached(self, path: Path) -> RecordFile:
        """Return a file for reads through the page cache, opened when first needed."""
        with self._lock:
            if path not in self._by_cache:
                self._by_cache[path] = self._open(path, "buffered")
            return self._by_cache[path]
