"""Pieces of a timeline as files: 128 tokens with their compressed entries, and snapshots.

A piece is named by everything that it follows from: a chain of digests over the model, the way of
computing, and all token ids up to its end. So equal beginnings of different sessions are the same
files. Files are safetensors; since the name tells what must be in them, every byte of the header is
known before one is opened, and a file either has exactly this header and this size or is not used.
"""

import hashlib
import json
import math
import os
import stat
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from localv4.errors import BadFileError
from localv4.finished_file import finished_file
from localv4.model.rungs import STEP_TOKENS
from localv4.model.snapshot import Snapshot, rings_of
from localv4.model.state import Rows, State

BLOCK_TOKENS = STEP_TOKENS
"""Tokens of a block, so that every snapshot of a ladder stands at the end of one."""

NAME_BYTES = 20
"""Of a digest: enough that no two beginnings ever share a name."""

VERSION = 1
"""Of the files; a part of every name, so that other versions are never found."""

_TYPES = {"float32": "F32", "int32": "I32", "uint16": "U16", "uint8": "U8", "int8": "I8"}
_CHECKSUM = "crc32"
_CHECKSUM_BYTES = 4

Array = NDArray[Any]


@dataclass(frozen=True)
class Form:
    """The names, types and shapes of the arrays in a file; the checksum of all of them ends it."""

    arrays: tuple[tuple[str, np.dtype[Any], tuple[int, ...]], ...]

    @cached_property
    def header(self) -> bytes:
        """The bytes before the first array."""
        entries: dict[str, Any] = {"__metadata__": {"localv4-session": str(VERSION)}}
        checksum = (_CHECKSUM, np.dtype(np.uint8), (_CHECKSUM_BYTES,))
        end = 0
        for name, dtype, shape in (*self.arrays, checksum):
            begin, end = end, end + _nbytes(dtype, shape)
            kind, offsets = _TYPES[dtype.name], [begin, end]
            entries[name] = {"dtype": kind, "shape": list(shape), "data_offsets": offsets}
        text = json.dumps(entries, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        return len(text).to_bytes(8, "little") + text

    @cached_property
    def nbytes(self) -> int:
        """Size of the file."""
        data = sum(_nbytes(dtype, shape) for _, dtype, shape in self.arrays)
        return len(self.header) + data + _CHECKSUM_BYTES


def _nbytes(dtype: np.dtype[Any], shape: tuple[int, ...]) -> int:
    return math.prod(shape) * dtype.itemsize


def layout_of(state: State) -> str:
    """Describe how rows are stored: files of one layout are of no use for another."""
    parts = [ring.values for ring in rings_of(state)] + [rows.values for _, rows in _rows_of(state)]
    return " ".join(f"{values.dtype.name}:{values.shape[1]}" for values in parts)


def chain(root: str, token_ids: Sequence[int]) -> list[str]:
    """Return the names of the whole blocks of a token sequence, in order.

    `root` tells the model, the way of computing and the layout. The name of the last block of a
    prefix is the name of its snapshot, too.
    """
    link = hashlib.sha256(f"localv4 session {VERSION}\n{root}".encode()).digest()[:NAME_BYTES]
    ids, names = np.asarray(token_ids, "<i4"), []
    for end in range(BLOCK_TOKENS, len(ids) + 1, BLOCK_TOKENS):
        data = link + ids[end - BLOCK_TOKENS : end].tobytes()
        link = hashlib.sha256(data).digest()[:NAME_BYTES]
        names.append(link.hex())
    return names


@lru_cache(maxsize=16)
def _form(shapes: tuple[tuple[str, np.dtype[Any], tuple[int, ...]], ...]) -> Form:
    """Return a form; those of all blocks of a session are the same and take time to describe."""
    return Form(shapes)


def block_form(arrays: Sequence[Array]) -> Form:
    """Return the form of the file of a block with these arrays."""
    names = ("ids", *(f"entries.{number}" for number in range(len(arrays) - 1)))
    pairs = zip(names, arrays, strict=True)
    return _form(tuple((name, array.dtype, array.shape) for name, array in pairs))


def block_arrays(state: State, index: int, token_ids: Sequence[int]) -> list[Array]:
    """Return the arrays of block `index`: its ids, and views of the entries that they complete.

    A state without room for the entries yields shorter views.
    """
    state.read_back()
    first, end = index * BLOCK_TOKENS, (index + 1) * BLOCK_TOKENS
    ids = np.asarray(token_ids[first:end], np.int32)
    return [ids, *(rows.values[first // rate : end // rate] for rate, rows in _rows_of(state))]


def put_block(path: Path, state: State, index: int, token_ids: Sequence[int]) -> int:
    """Read the file of block `index` into a state that has room; return the bytes read.

    Raises BadFileError when the file is not what it must be, OSError when it cannot be read.
    """
    targets = block_arrays(state, index, token_ids)
    form = block_form(targets)
    values = read_file(path, form)
    if not np.array_equal(values[0], targets[0]):
        raise BadFileError(path, "holds other tokens than its name says")
    for target, value in zip(targets[1:], values[1:], strict=True):
        target[:] = value
    return form.nbytes


def snapshot_form(state: State, position: int) -> Form:
    """Return the form of the file of a snapshot."""
    parts = [(ring.values, position - ring.first_needed(position)) for ring in rings_of(state)]
    return _form(
        tuple(
            (f"rings.{index}", values.dtype, (count, values.shape[1]))
            for index, (values, count) in enumerate(parts)
        )
    )


def read_snapshot(path: Path, state: State, position: int) -> Snapshot:
    """Read the file of a snapshot; raises as `put_block` does."""
    return Snapshot(position, tuple(read_file(path, snapshot_form(state, position))))


def _rows_of(state: State) -> Iterator[tuple[int, Rows]]:
    """Yield the entries of all layers with their rates."""
    for layer in state.layers:
        for rows in layer.entries:
            yield layer.ratio, rows


def write_file(path: Path, form: Form, arrays: Sequence[Array]) -> None:
    """Write arrays of a form; the file has its name once all of it is on the disk.

    Raises LocalV4Error if that fails.
    """
    checksum = 0
    with finished_file(path) as file:
        file.write(form.header)
        for array in arrays:
            data = np.ascontiguousarray(array).reshape(-1).view(np.uint8).data
            checksum = zlib.crc32(data, checksum)
            file.write(data)
        file.write(checksum.to_bytes(_CHECKSUM_BYTES, "little"))


def read_file(path: Path, form: Form) -> list[Array]:
    """Return the arrays of a file of this form.

    The size is looked at before a byte is read. Raises BadFileError when anything differs, OSError
    when the file cannot be read.
    """
    data = _read_exactly(path, form.nbytes)
    start, end = len(form.header), form.nbytes - _CHECKSUM_BYTES
    if data[:start].tobytes() != form.header:
        raise BadFileError(path, "has another header than files of this version")
    if zlib.crc32(data[start:end].data) != int.from_bytes(data[end:].tobytes(), "little"):
        raise BadFileError(path, "the checksum is wrong")
    arrays, offset = [], start
    for _, dtype, shape in form.arrays:
        arrays.append(np.ndarray(shape, dtype, data.data, offset))
        offset += arrays[-1].nbytes
    return arrays


def _read_exactly(path: Path, nbytes: int) -> NDArray[np.uint8]:
    """Return the bytes of a regular file of just this size."""
    # without O_NONBLOCK, opening a pipe that somebody put there would wait for a writer
    flags = os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0)
    with os.fdopen(os.open(path, flags), "rb", buffering=0) as file:
        status = os.fstat(file.fileno())
        if not stat.S_ISREG(status.st_mode):
            raise BadFileError(path, "is not a regular file")
        if status.st_size != nbytes:
            raise BadFileError(path, f"has {status.st_size} bytes, {nbytes} were due")
        data = np.empty(nbytes, np.uint8)
        done = 0
        while done < nbytes:
            count = file.readinto(data[done:].data)
            if not count:
                raise BadFileError(path, "became shorter while it was being read")
            done += count
    return data
