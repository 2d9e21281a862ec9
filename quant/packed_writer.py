"""Write a packed model folder: shards of weights as the kernels read them, the manifest last.

docs/packed_format.md describes the format. Only NumPy and the standard library are needed here.
"""

import json
import math
import struct
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Executor
from dataclasses import asdict, dataclass
from itertools import chain, groupby
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from quant.output_file import Job, Part, Watch, WrittenFile, in_order, nbytes_of, write_file

__all__ = ["WrittenFile", "write_file"]

FORMAT = "localv4-packed"
VERSION = 2
FIRST_VERSION = 1
"""Of folders in which all experts of a layer have one form; older readers know it."""

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


@dataclass(frozen=True, slots=True)
class ShardTensor:
    """A tensor to be written; `parts` yields its bytes in order, or what computes them."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    parts: Callable[[], Iterable[Job]]

    @property
    def nbytes(self) -> int:
        """Size of all parts together."""
        return math.prod(self.shape) * ITEM_BYTES[self.dtype]


@dataclass(frozen=True, slots=True)
class MatrixEntry:
    """What the manifest says about a matrix, or about experts in records.

    Of records, rows, cols and format are those of the gate projection; `experts` are the numbers of
    the experts in them where they are not all of the layer.
    """

    layout: Literal["packed", "rows", "records"]
    format: str
    rows: int
    cols: int
    down_format: str = ""
    records: int = 0
    record_bytes: int = 0
    experts: tuple[int, ...] = ()

    def as_json(self) -> dict[str, Any]:
        """Return the entry; fields of records are left out of other layouts."""
        fields = asdict(self)
        if self.layout != "records":
            del fields["down_format"], fields["records"], fields["record_bytes"]
        if not self.experts:
            del fields["experts"]
        return fields


def rounded_up(nbytes: int, unit: int) -> int:
    """Return the next multiple of `unit`."""
    return -(-nbytes // unit) * unit


def stored_array(name: str, dtype: str, values: NDArray[Any]) -> ShardTensor:
    """Return a tensor that is an array in memory; `dtype` names what its bytes mean."""
    return ShardTensor(name, dtype, values.shape, lambda: (np.ascontiguousarray(values),))


def packed_bytes_tensor(name: str, nbytes: int, parts: Callable[[], Iterable[Job]]) -> ShardTensor:
    """Return a tensor of `nbytes` packed bytes."""
    return ShardTensor(name, PACKED_BYTES, (nbytes,), parts)


def records_tensor(
    name: str, records: int, record_bytes: int, parts: Callable[[], Iterable[Job]]
) -> ShardTensor:
    """Return a tensor of expert records; `record_bytes` is a multiple of PAGE."""
    return ShardTensor(name, PACKED_BYTES, (records, record_bytes), parts)


def write_shard(
    path: Path,
    tensors: Sequence[ShardTensor],
    watch: Watch | None = None,
    pool: Executor | None = None,
    ahead: int = 0,
) -> WrittenFile:
    """Write a safetensors file; what is a whole number of pages (lines) long starts on one.

    Bytes that have to be computed are computed by `pool`, `ahead` parts before it is their turn.
    Raises ValueError for a tensor that has not the bytes that its shape says.
    """
    header, placed = _layout(tensors)
    parts = _parts(placed, pool, ahead, watch)
    return write_file(path, chain([header], parts), None if watch is None else watch.add_bytes)


def shard_bytes(tensors: Sequence[ShardTensor]) -> int:
    """Return the size of the file that `write_shard` writes."""
    header, placed = _layout(tensors)
    return len(header) + sum(tensor.nbytes for tensor in placed)


def _layout(tensors: Sequence[ShardTensor]) -> tuple[bytes, Sequence[ShardTensor]]:
    """Return the header of a shard, and its tensors in their order."""
    placed = sorted(tensors, key=_place)
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
    return struct.pack("<Q", length) + text.ljust(length), placed


def _place(tensor: ShardTensor) -> tuple[int, int, str]:
    """Whole pages come first, then whole lines, then the rest by falling size of its numbers."""
    nbytes = tensor.nbytes
    kind = 0 if nbytes % PAGE == 0 else 1 if nbytes % LINE == 0 else 2
    return kind, -ITEM_BYTES[tensor.dtype], tensor.name


def _parts(
    placed: Sequence[ShardTensor], pool: Executor | None, ahead: int, watch: Watch | None
) -> Iterator[Part]:
    jobs = ((number, job) for number, tensor in enumerate(placed) for job in tensor.parts())
    given = [0] * len(placed)
    for number, parts in groupby(in_order(jobs, pool, ahead), key=lambda item: item[0]):
        for _, part in parts:
            given[number] += nbytes_of(part)
            yield part
        tensor = placed[number]
        if given[number] != tensor.nbytes:
            raise ValueError(f"{tensor.name} has {given[number]} bytes, not {tensor.nbytes}")
        if watch is not None:
            watch.add_tensor()


def write_manifest(
    folder: Path,
    source: str,
    files: Mapping[str, WrittenFile],
    matrices: Mapping[str, MatrixEntry],
) -> None:
    """Write the manifest, which makes the folder a model; all `files` must be finished."""
    mixed = any(entry.experts for entry in matrices.values())
    manifest = {
        "container": {"format": FORMAT, "version": VERSION if mixed else FIRST_VERSION},
        "source": source,
        "files": {name: asdict(files[name]) for name in sorted(files)},
        "matrices": {name: matrices[name].as_json() for name in sorted(matrices)},
    }
    write_file(folder / MANIFEST_NAME, [json.dumps(manifest, indent=1).encode()])
