"""Write a packed model folder: shards of weights as the kernels read them, the manifest last.

docs/packed_format.md describes the format. Only NumPy and the standard library are needed here.
"""

import hashlib
import json
import math
import os
import struct
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

FORMAT = "localv4-packed"
VERSION = 1
MANIFEST_NAME = "manifest.json"
PAGE = 4096
LINE = 64
"""Bytes of a line of cache: every packed matrix starts on one."""

ITEM_BYTES = {
    **{"I64": 8, "F32": 4, "I32": 4, "F16": 2, "BF16": 2},
    **{"I8": 1, "F8_E4M3": 1, "F8_E8M0": 1},
}
"""The types that a shard may hold; I8 is also that of packed bytes."""

PACKED_BYTES = "I8"
"""The type of packed bytes: the official release stores its FP4 weights under that name."""

_LARGEST_WRITE = 1 << 26
"""One call to the system writes no more: Linux stops at 2 GiB, and the digest keeps pace."""

Part = bytes | NDArray[Any]
OnBytes = Callable[[int], None]


@dataclass(frozen=True, slots=True)
class ShardTensor:
    """A tensor to be written; `parts` yields its bytes in order, when it is its turn."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    parts: Callable[[], Iterable[Part]]

    @property
    def nbytes(self) -> int:
        """Size of all parts together."""
        return math.prod(self.shape) * ITEM_BYTES[self.dtype]


@dataclass(frozen=True, slots=True)
class WrittenFile:
    """What the manifest says about a finished file."""

    bytes: int
    sha256: str


@dataclass(frozen=True, slots=True)
class MatrixEntry:
    """What the manifest says about a matrix, or about experts in records.

    Of records, rows, cols and format are those of the gate projection.
    """

    layout: Literal["packed", "rows", "records"]
    format: str
    rows: int
    cols: int
    down_format: str = ""
    records: int = 0
    record_bytes: int = 0

    def as_json(self) -> dict[str, Any]:
        """Return the entry; the fields of records are left out of other layouts."""
        fields = asdict(self)
        if self.layout != "records":
            del fields["down_format"], fields["records"], fields["record_bytes"]
        return fields


def rounded_up(nbytes: int, unit: int) -> int:
    """Return the next multiple of `unit`."""
    return -(-nbytes // unit) * unit


def stored_array(name: str, dtype: str, values: NDArray[Any]) -> ShardTensor:
    """Return a tensor that is an array in memory; `dtype` names what its bytes mean."""
    return ShardTensor(name, dtype, values.shape, lambda: (np.ascontiguousarray(values),))


def packed_bytes_tensor(name: str, nbytes: int, parts: Callable[[], Iterable[Part]]) -> ShardTensor:
    """Return a tensor of `nbytes` packed bytes."""
    return ShardTensor(name, PACKED_BYTES, (nbytes,), parts)


def records_tensor(
    name: str, records: int, record_bytes: int, parts: Callable[[], Iterable[Part]]
) -> ShardTensor:
    """Return a tensor of expert records; `record_bytes` is a multiple of PAGE."""
    return ShardTensor(name, PACKED_BYTES, (records, record_bytes), parts)


def write_shard(
    path: Path, tensors: Sequence[ShardTensor], on_bytes: OnBytes | None = None
) -> WrittenFile:
    """Write a safetensors file; what is a whole number of pages (lines) long starts on one."""
    placed = sorted(tensors, key=_place)
    return write_file(path, _shard_parts(placed), on_bytes)


def _place(tensor: ShardTensor) -> tuple[int, int, str]:
    """Whole pages come first, then whole lines, then the rest by falling size of its numbers."""
    nbytes = tensor.nbytes
    kind = 0 if nbytes % PAGE == 0 else 1 if nbytes % LINE == 0 else 2
    return kind, -ITEM_BYTES[tensor.dtype], tensor.name


def _shard_parts(placed: Sequence[ShardTensor]) -> Iterator[Part]:
    entries: dict[str, Any] = {}
    end = 0
    for tensor in placed:
        begin, end = end, end + tensor.nbytes
        entries[tensor.name] = {
            "dtype": tensor.dtype,
            "shape": list(tensor.shape),
            "data_offsets": [begin, end],
        }
    text = json.dumps(entries, separators=(",", ":")).encode()
    length = rounded_up(len(text) + 8, PAGE) - 8
    yield struct.pack("<Q", length) + text.ljust(length)
    for tensor in placed:
        given = 0
        for part in tensor.parts():
            given += _view(part).nbytes
            yield part
        if given != tensor.nbytes:
            raise ValueError(f"{tensor.name} has {given} bytes, not {tensor.nbytes}")


def write_file(path: Path, parts: Iterable[Part], on_bytes: OnBytes | None = None) -> WrittenFile:
    """Write a file under another name and give it its own when every byte is on the disk.

    `on_bytes` is told the number of bytes after every piece.
    """
    digest, total = hashlib.sha256(), 0
    partial = path.with_name(f".{path.name}.partial")
    with partial.open("wb", buffering=0) as file:
        for part in parts:
            raw = _view(part)
            for start in range(0, len(raw), _LARGEST_WRITE):
                piece = raw[start : start + _LARGEST_WRITE]
                digest.update(piece)
                _write_all(file.fileno(), piece)
                if on_bytes is not None:
                    on_bytes(len(piece))
            total += len(raw)
        os.fsync(file.fileno())
    partial.replace(path)
    _sync_folder(path.parent)
    return WrittenFile(total, digest.hexdigest())


def _view(part: Part) -> memoryview:
    array = np.frombuffer(part, np.uint8) if isinstance(part, bytes) else part
    return array.reshape(-1).view(np.uint8).data


def _write_all(descriptor: int, piece: memoryview) -> None:
    while piece:
        piece = piece[os.write(descriptor, piece) :]


def _sync_folder(folder: Path) -> None:
    """Make a rename last; systems that cannot open a folder keep their own order."""
    if os.name == "nt":
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_manifest(
    folder: Path,
    source: str,
    files: Mapping[str, WrittenFile],
    matrices: Mapping[str, MatrixEntry],
) -> None:
    """Write the manifest, which makes the folder a model; all `files` must be finished."""
    manifest = {
        "container": {"format": FORMAT, "version": VERSION},
        "source": source,
        "files": {name: asdict(files[name]) for name in sorted(files)},
        "matrices": {name: matrices[name].as_json() for name in sorted(matrices)},
    }
    write_file(folder / MANIFEST_NAME, [json.dumps(manifest, indent=1).encode()])
