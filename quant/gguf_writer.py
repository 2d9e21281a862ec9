"""Write GGUF files of version 3: header first, then tensors whose bytes are computed on the way."""

import math
import struct
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain, groupby
from pathlib import Path

from localv4.storage.dtypes import GGML_DTYPES
from quant.output_file import Job, Part, Watch, WrittenFile, nbytes_of, write_file

MAGIC = b"GGUF"
VERSION = 3
ALIGNMENT = 32

U16, U32, I32, F32, BOOL, STRING, ARRAY = 2, 4, 5, 6, 7, 8, 9
_FORMATS = {U16: "<H", U32: "<I", I32: "<i", F32: "<f", BOOL: "<?"}

TYPE_IDS = {dtype.name: number for number, dtype in GGML_DTYPES.items()}


@dataclass(frozen=True, slots=True)
class GgufTensor:
    """A tensor of a ggml type; `shape` is row-major, `parts` yields or computes its bytes."""

    name: str
    type_name: str
    shape: tuple[int, ...]
    parts: Callable[[], Iterable[Job]]

    @property
    def nbytes(self) -> int:
        """Size without what fills it up to the next tensor."""
        return GGML_DTYPES[TYPE_IDS[self.type_name]].nbytes(math.prod(self.shape))


def key_value(key: str, kind: int, value: object) -> bytes:
    """Return a key with its value in bytes; lists are arrays of values of that kind."""
    head = _string(key)
    if isinstance(value, list):
        values = b"".join(_value(kind, item) for item in value)
        return head + struct.pack("<IIQ", ARRAY, kind, len(value)) + values
    return head + struct.pack("<I", kind) + _value(kind, value)


def header(metadata: Sequence[bytes], tensors: Sequence[GgufTensor]) -> bytes:
    """Return everything before the data of the first tensor."""
    infos, end = [], 0
    for tensor in tensors:
        dims = tuple(reversed(tensor.shape))
        infos.append(
            _string(tensor.name)
            + struct.pack(f"<I{len(dims)}Q", len(dims), *dims)
            + struct.pack("<IQ", TYPE_IDS[tensor.type_name], end)
        )
        end += padded(tensor.nbytes)
    counts = struct.pack("<IQQ", VERSION, len(tensors), len(metadata))
    text = b"".join((MAGIC, counts, *metadata, *infos))
    return text.ljust(padded(len(text)), b"\0")


def gguf_bytes(metadata: Sequence[bytes], tensors: Sequence[GgufTensor]) -> int:
    """Return the size of the file that `write_gguf` writes."""
    return len(header(metadata, tensors)) + sum(padded(tensor.nbytes) for tensor in tensors)


def write_gguf(
    path: Path,
    metadata: Sequence[bytes],
    tensors: Sequence[GgufTensor],
    data: Iterable[tuple[int, Part]],
    watch: Watch | None = None,
) -> WrittenFile:
    """Write a file; `data` yields the bytes of the tensors in order, each with its number.

    Raises ValueError for a tensor that has not the bytes that its shape says.
    """
    parts = chain([header(metadata, tensors)], _filled(tensors, data, watch))
    return write_file(path, parts, None if watch is None else watch.add_bytes)


def _filled(
    tensors: Sequence[GgufTensor], data: Iterable[tuple[int, Part]], watch: Watch | None
) -> Iterator[Part]:
    """Yield the bytes of each tensor and what fills it up to the next one."""
    given = [0] * len(tensors)
    for number, parts in groupby(data, key=lambda item: item[0]):
        for _, part in parts:
            given[number] += nbytes_of(part)
            yield part
        wanted = tensors[number].nbytes
        if given[number] != wanted:
            raise ValueError(f"{tensors[number].name} has {given[number]} bytes, not {wanted}")
        yield bytes(padded(wanted) - wanted)
        if watch is not None:
            watch.add_tensor()


def padded(nbytes: int) -> int:
    """Return where the next tensor begins."""
    return -(-nbytes // ALIGNMENT) * ALIGNMENT


def _value(kind: int, value: object) -> bytes:
    return _string(str(value)) if kind == STRING else struct.pack(_FORMATS[kind], value)


def _string(text: str) -> bytes:
    raw = text.encode("utf-8")
    return struct.pack("<Q", len(raw)) + raw
