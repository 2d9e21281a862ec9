"""GGUF models, version 2 and 3: one file, or a set of split files."""

import math
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass, replace
from pathlib import Path

from localv4.errors import BadFileError
from localv4.storage.checkpoint import Checkpoint, MetaValue, StoredTensor
from localv4.storage.dtypes import GGML_DTYPES
from localv4.storage.gguf_split import check_split, split_number, split_paths
from localv4.storage.gguf_values import MAX_KEY_BYTES, UINT32, GgufValues
from localv4.storage.mapped_file import MappedFile, plain_errors
from localv4.storage.names import quoted

MAGIC = b"GGUF"
VERSIONS = (2, 3)
MAX_KEYS = 1 << 16
MAX_TENSORS = 1 << 17
MAX_TENSOR_NAME_BYTES = 63
"""ggml keeps a name in 64 bytes with a NUL at the end."""
MAX_DIMS = 4
DEFAULT_ALIGNMENT = 32
MAX_ALIGNMENT = 4096

_MIN_KEY_VALUE_BYTES = 8 + 1 + 4 + 1
_MIN_TENSOR_INFO_BYTES = 8 + 4 + 8 + 4 + 8


@dataclass(frozen=True, slots=True)
class _Part:
    """What the header of one file says."""

    file: MappedFile
    metadata: dict[str, MetaValue]
    tensors: list[StoredTensor]


def open_gguf(path: Path) -> Checkpoint:
    """Open a GGUF file, or the whole set when `path` is one of `STEM-00001-of-00003.gguf`.

    `Checkpoint.path` is the first file and `Checkpoint.metadata` is what that file holds. Raises
    BadFileError for damaged or incomplete models, NotFoundError where there is none.
    """
    with plain_errors(path), ExitStack() as opened:
        paths = split_paths(path)
        parts = []
        for index, part_path in enumerate(paths):
            file = opened.enter_context(closing(MappedFile(part_path)))
            parts.append(_read_part(file, index))
            check_split(part_path, parts[index].metadata, index, len(paths))
        tensors = _merge(parts)
        files = [part.file for part in parts]
        checkpoint = Checkpoint("gguf", paths[0], files, tensors, parts[0].metadata)
        opened.pop_all()
    return checkpoint


def _read_part(file: MappedFile, index: int) -> _Part:
    """Read the header of `file`, which is file number `index` of its checkpoint."""
    values = GgufValues(file)
    if values.raw(4, "magic") != MAGIC:
        raise BadFileError(file.path, "magic: not a GGUF file")
    _check_version(values)
    tensor_count = values.u64("tensor count")
    key_count = values.u64("key count")
    _check_count(values, "tensor count", tensor_count, MAX_TENSORS, _MIN_TENSOR_INFO_BYTES)
    _check_count(values, "key count", key_count, MAX_KEYS, _MIN_KEY_VALUE_BYTES)
    metadata, alignment = _read_metadata(values, key_count)
    tensors: dict[str, StoredTensor] = {}
    for _ in range(tensor_count):
        tensor = _read_tensor_info(values, index, alignment)
        if tensors.setdefault(tensor.name, tensor) is not tensor:
            raise BadFileError(file.path, f"the tensor {quoted(tensor.name)} occurs twice")
    data_start = -(-values.position // alignment) * alignment
    return _Part(file, metadata, list(_place(file, list(tensors.values()), data_start)))


def _check_version(values: GgufValues) -> None:
    version = values.u32("version")
    if version in VERSIONS:
        return
    if int.from_bytes(version.to_bytes(4, "little"), "big") in VERSIONS:
        raise values.fault("version", "a big-endian file; only little-endian ones are supported")
    raise values.fault("version", f"{version} is not supported, only 2 and 3 are")


def _check_count(values: GgufValues, what: str, count: int, limit: int, least_bytes: int) -> None:
    if count * least_bytes > values.left:
        raise values.fault(what, f"{count} do not fit into the {values.left} bytes left")
    if count > limit:
        raise values.fault(what, f"{count}, but {limit} are the limit")


def _read_metadata(values: GgufValues, count: int) -> tuple[dict[str, MetaValue], int]:
    """Return the key/value pairs and the alignment of the tensor data."""
    metadata: dict[str, MetaValue] = {}
    alignment = DEFAULT_ALIGNMENT
    for number in range(count):
        key = values.string(f"key {number}", MAX_KEY_BYTES)
        what = f"key {quoted(key)}"
        if not key:
            raise values.fault(f"key {number}", "is empty")
        if key in metadata:
            raise values.fault(what, "occurs twice")
        type_id = values.u32(what)
        value = values.value(type_id, what)
        metadata[key] = value
        if key == "general.alignment":
            if type_id != UINT32 or not isinstance(value, int):
                raise values.fault(what, "is not of the type uint32")
            alignment = value
            if not 0 < alignment <= MAX_ALIGNMENT or alignment & (alignment - 1):
                raise values.fault(what, f"{alignment} is not a power of two up to {MAX_ALIGNMENT}")
    return metadata, alignment


def _read_tensor_info(values: GgufValues, file: int, alignment: int) -> StoredTensor:
    """Read one tensor info; its offset still counts from the start of the tensor data."""
    name = values.string("tensor name", MAX_TENSOR_NAME_BYTES)
    what = f"tensor {quoted(name)}"
    rank = values.u32(what)
    if not 1 <= rank <= MAX_DIMS:
        raise values.fault(what, f"{rank} dimensions, but 1 to {MAX_DIMS} are possible")
    dims = [values.u64(what) for _ in range(rank)]
    if 0 in dims:
        raise values.fault(what, f"a dimension of {dims} is 0")
    type_id = values.u32(what)
    dtype = GGML_DTYPES.get(type_id)
    if dtype is None:
        raise _unsupported(values.path, name, type_id)
    if dims[0] % dtype.block:
        raise values.fault(
            what, f"a row of {dims[0]} elements is not made of {dtype.name} blocks of {dtype.block}"
        )
    offset = values.u64(what)
    if offset % alignment:
        raise values.fault(what, f"the offset {offset} is no multiple of {alignment}")
    nbytes = dtype.nbytes(math.prod(dims))
    return StoredTensor(name, dtype, tuple(reversed(dims)), file, offset, nbytes)


def _place(
    file: MappedFile, tensors: Sequence[StoredTensor], data_start: int
) -> Iterator[StoredTensor]:
    """Yield the tensors with offsets from the start of the file, where none may overlap another."""
    filled = 0
    for tensor in sorted(tensors, key=lambda tensor: tensor.offset):
        what = f"tensor {quoted(tensor.name)}"
        if tensor.offset < filled:
            raise BadFileError(
                file.path,
                f"{what}: overlaps another tensor: begins at byte {tensor.offset} of the data, "
                f"where {filled} are taken",
            )
        filled = tensor.offset + tensor.nbytes
        if data_start + filled > file.size:
            raise BadFileError(
                file.path,
                f"{what}: ends at byte {data_start + filled}, but the file has {file.size}",
            )
        yield replace(tensor, offset=data_start + tensor.offset)


def _merge(parts: Sequence[_Part]) -> dict[str, StoredTensor]:
    """Return the tensors of all parts, in file order."""
    tensors: dict[str, StoredTensor] = {}
    for part in parts:
        for tensor in part.tensors:
            if tensors.setdefault(tensor.name, tensor) is not tensor:
                other = parts[tensors[tensor.name].file].file.path.name
                raise BadFileError(
                    part.file.path,
                    f"the tensor {quoted(tensor.name)} is also in {quoted(other)}",
                )
    for part in parts:
        expected = split_number(part.file.path, part.metadata, "split.tensors.count")
        if expected not in (None, len(tensors)):
            raise BadFileError(
                part.file.path,
                f"split.tensors.count: {expected}, but the set has {len(tensors)} tensors",
            )
    if len(tensors) > MAX_TENSORS:
        raise BadFileError(
            parts[0].file.path, f"{len(tensors)} tensors, but {MAX_TENSORS} are the limit"
        )
    return tensors


def _unsupported(path: Path, name: str, type_id: int) -> BadFileError:
    from gguf import GGMLQuantizationType  # a fifth of a second, and only needed for this message

    try:
        known = f"{GGMLQuantizationType(type_id).name} (id {type_id})"
    except ValueError:
        known = f"with the unknown id {type_id}"
    return BadFileError(
        path,
        f"tensor {quoted(name)}: the type {known} is not supported",
        hint="supported types: " + ", ".join(dtype.name for dtype in GGML_DTYPES.values()),
    )
