"""Importance matrices in llama.cpp's GGUF format: sums of squares of what each matrix reads.

For each matrix NAME the file has two F32 tensors: NAME.in_sum2 (matrices, columns), the squares of
the inputs summed over tokens, and NAME.counts (matrices, 1), the number of tokens. Fused experts
are as many matrices as there are experts; block-diagonal ones have a row for each block.
"""

import struct
from collections.abc import Iterator, Mapping
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from localv4.errors import BadFileError
from localv4.finished_file import finished_file
from localv4.storage.checkpoint import Checkpoint, MetaValue
from localv4.storage.dtypes import GGML_DTYPES
from localv4.storage.gguf import DEFAULT_ALIGNMENT, MAGIC, open_gguf
from localv4.storage.gguf_values import ARRAY, STRING, UINT32
from localv4.storage.imatrix_names import place_of
from localv4.storage.mapped_file import MappedFile

SUMS, COUNTS = ".in_sum2", ".counts"

_VERSION = 3
_F32 = next(number for number, dtype in GGML_DTYPES.items() if dtype.name == "F32")

Floats = NDArray[np.float32]


@dataclass(frozen=True, slots=True)
class TensorStatistics:
    """Statistics of a matrix's inputs.

    sums (matrices, cols): squares of each column summed over tokens; a fused tensor has a matrix
    for each expert, a block-diagonal one for each block. counts (matrices,) or (1,): the tokens.
    """

    sums: Floats
    counts: Floats

    def mean_squares(self) -> Floats:
        """Return (matrices, cols); a matrix that no token met has the mean of all that were."""
        counts = np.broadcast_to(self.counts.astype(np.float64), (len(self.sums),))[:, None]
        total = counts.sum()
        everyone = self.sums.sum(0, dtype=np.float64) / total if total else 1.0
        means = np.where(counts > 0, self.sums / np.maximum(counts, 1.0), everyone)
        return means.astype(np.float32)


@dataclass(frozen=True, slots=True)
class ImatrixFile:
    """An importance matrix; `tensors` by their GGUF names, such as `blk.3.attn_q_a.weight`.

    It was made from `datasets` in `chunk_count` windows of `chunk_size` tokens.
    """

    tensors: Mapping[str, TensorStatistics]
    datasets: tuple[str, ...] = ()
    chunk_count: int = 0
    chunk_size: int = 0

    def weights_for(self, official: str, cols: int | None = None) -> Floats | None:
        """Return the mean squares of the inputs of a matrix by its official name.

        (cols,), or (blocks, cols) for a block-diagonal matrix; None without statistics. Files of
        llama.cpp have blocks side by side in one row: `cols` takes them apart.
        """
        place = place_of(official)
        found = None if place is None else self.tensors.get(place.name)
        if place is None or found is None:
            return None
        means = found.mean_squares()
        if place.expert is not None:
            return means[place.expert] if place.expert < len(means) else None
        if cols is not None and means.shape[1] > cols and means.shape[1] % cols == 0:
            means = means.reshape(-1, cols)
        return means[0] if len(means) == 1 else means

    def expert_counts(self, layer: int) -> Floats | None:
        """Return how many tokens chose each expert of a layer (experts,), None if not known."""
        found = self.tensors.get(f"blk.{layer}.ffn_gate_exps.weight")
        return None if found is None or len(found.counts) != len(found.sums) else found.counts


def read_imatrix(path: Path) -> ImatrixFile:
    """Read an importance matrix, also one by llama.cpp.

    Raises NotFoundError, or BadFileError for a damaged file or one that is something else.
    """
    with closing(MappedFile(path)) as file:
        if file.size < len(MAGIC) or file.read(len(MAGIC), "magic") != MAGIC:
            raise BadFileError(
                path,
                "not a GGUF file",
                hint="convert the older form with: llama-imatrix --in-file OLD -o NEW.gguf",
            )
    with open_gguf(path) as opened:
        tensors = dict(_statistics(opened))
        if not tensors:
            raise BadFileError(path, "holds no importance matrix")
        metadata = opened.metadata
        datasets = metadata.get("imatrix.datasets", [])
        return ImatrixFile(
            tensors,
            tuple(map(str, datasets)) if isinstance(datasets, list) else (),
            _number(metadata, "imatrix.chunk_count"),
            _number(metadata, "imatrix.chunk_size"),
        )


def _number(metadata: Mapping[str, MetaValue], key: str) -> int:
    value = metadata.get(key, 0)
    return value if isinstance(value, int) else 0


def _statistics(opened: Checkpoint) -> Iterator[tuple[str, TensorStatistics]]:
    """Yield the statistics of all matrices; what is neither sums nor counts is left out."""
    for stored in opened.tensors:
        if not stored.endswith(SUMS):
            continue
        name = stored.removesuffix(SUMS)
        sums, counts = _floats(opened, stored), _floats(opened, name + COUNTS).ravel()
        if counts.size > 1:
            if sums.size % counts.size:
                raise BadFileError(
                    opened.path, f"{name}: {sums.size} sums are not of {counts.size} matrices"
                )
            sums = sums.reshape(counts.size, -1)
        yield name, TensorStatistics(sums.reshape(-1, sums.shape[-1]), counts)


def _floats(opened: Checkpoint, name: str) -> Floats:
    """Return a tensor of finite numbers that are not negative."""
    data = opened.bytes(name)
    tensor = opened.tensors[name]
    if tensor.dtype.name != "F32":
        raise BadFileError(opened.path, f"{name} has type {tensor.dtype.name}, expected F32")
    values = np.frombuffer(data.tobytes(), "<f4").astype(np.float32).reshape(tensor.shape)
    if not (np.isfinite(values).all() and values.min() >= 0):
        raise BadFileError(opened.path, f"{name} has values that are no sums of squares")
    return values


def write_imatrix(path: Path, imatrix: ImatrixFile) -> None:
    """Write an importance matrix; the file appears when all of it is on disk.

    Tensors are in the order of their names, as llama.cpp has them. Raises LocalV4Error.
    """
    parts: list[tuple[str, Floats]] = []
    for name in sorted(imatrix.tensors):
        found = imatrix.tensors[name]
        counts = np.broadcast_to(found.counts, (len(found.sums),))
        parts += [(name + SUMS, found.sums), (name + COUNTS, counts[:, None])]
    keys = [
        _key("general.type", STRING, _string("imatrix")),
        _key("imatrix.datasets", ARRAY, _strings(imatrix.datasets)),
        _key("imatrix.chunk_count", UINT32, struct.pack("<I", imatrix.chunk_count)),
        _key("imatrix.chunk_size", UINT32, struct.pack("<I", imatrix.chunk_size)),
    ]
    header = MAGIC + struct.pack("<IQQ", _VERSION, len(parts), len(keys)) + b"".join(keys)
    offset = 0
    for name, values in parts:
        dims = struct.pack("<QQ", values.shape[1], values.shape[0])
        header += _string(name) + struct.pack("<I", 2) + dims + struct.pack("<IQ", _F32, offset)
        offset += _padded(values.nbytes)
    with finished_file(path, len(header) + offset) as file:
        file.write(header.ljust(_padded(len(header)), b"\0"))
        for _, values in parts:
            file.write(values.astype("<f4").tobytes().ljust(_padded(values.nbytes), b"\0"))


def _padded(nbytes: int) -> int:
    return -(-nbytes // DEFAULT_ALIGNMENT) * DEFAULT_ALIGNMENT


def _key(name: str, type_id: int, value: bytes) -> bytes:
    return _string(name) + struct.pack("<I", type_id) + value


def _string(text: str) -> bytes:
    data = text.encode()
    return struct.pack("<Q", len(data)) + data


def _strings(texts: tuple[str, ...]) -> bytes:
    return struct.pack("<IQ", STRING, len(texts)) + b"".join(map(_string, texts))
