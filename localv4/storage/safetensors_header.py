"""The header of a safetensors file: 8 bytes of length, then JSON that says where each tensor lies.

`{"NAME": {"dtype": "BF16", "shape": [2, 3], "data_offsets": [0, 12]}, "__metadata__": {...}}`; the
offsets count from the end of the header. Tensors fill the rest of the file without gap or overlap.
"""

import math
from typing import Any

from safetensors import safe_open

from localv4.errors import BadFileError
from localv4.storage.checkpoint import StoredTensor
from localv4.storage.dtypes import SAFETENSORS_DTYPES, DType
from localv4.storage.mapped_file import MappedFile
from localv4.storage.names import quoted
from localv4.storage.strict_json import StrictJson

LENGTH_BYTES = 8
MAX_HEADER_BYTES = 100_000_000
"""The limit of the safetensors library."""
MAX_TENSORS = 1 << 18
"""In one checkpoint; the largest V4 model has about 150,000."""
MAX_METADATA_KEYS = 1 << 16
MAX_ENTRY_BYTES = 4096
"""One tensor's entry; 8 dimensions of 20 digits in generous spacing take less than 1,000."""
MAX_RANK = 8
"""Tensors of language models have at most 4 dimensions; NumPy ends at 64."""

_METADATA = "__metadata__"
_FIELDS = frozenset({"dtype", "shape", "data_offsets"})


def read_tensors(file: MappedFile, index: int) -> list[StoredTensor]:
    """Read the header of `file`, which is file number `index` of its checkpoint.

    Raises BadFileError unless every tensor lies inside the file and together they fill it.
    """
    header = _read_header(file)
    data_start = file.position
    text = StrictJson(file.path, header, "header")
    tensors = []
    for name in text.keys(MAX_TENSORS):
        if name == _METADATA:
            for _ in text.keys(MAX_METADATA_KEYS):
                text.string()
        else:
            fields = text.small_object(MAX_ENTRY_BYTES)
            try:
                tensors.append(_stored_tensor(name, fields, index, data_start))
            except ValueError as error:
                raise BadFileError(file.path, f"tensor {quoted(name)}: {error}") from error
    text.finish()
    _check_layout(file, tensors, data_start)
    _ask_library(file)
    return tensors


def _read_header(file: MappedFile) -> bytes:
    length = int.from_bytes(file.read(LENGTH_BYTES, "header length"), "little")
    if length > MAX_HEADER_BYTES:
        raise BadFileError(
            file.path, f"header length: {length} bytes, but {MAX_HEADER_BYTES} are the limit"
        )
    return file.read(length, "header")


def _stored_tensor(name: str, fields: dict[str, Any], file: int, data_start: int) -> StoredTensor:
    """Check one entry by itself; raises ValueError."""
    if fields.keys() != _FIELDS:
        raise ValueError(f"has the fields {sorted(fields)}, not {sorted(_FIELDS)}"[:200])
    dtype = _dtype(fields["dtype"])
    shape = tuple(_numbers("shape", fields["shape"]))
    if len(shape) > MAX_RANK:
        raise ValueError(f"shape: {len(shape)} dimensions, but {MAX_RANK} are the limit")
    offsets = _numbers("data_offsets", fields["data_offsets"])
    if len(offsets) != 2 or offsets[0] > offsets[1]:
        raise ValueError("data_offsets: not a begin and an end")
    begin, end = offsets
    nbytes = dtype.nbytes(math.prod(shape))
    if nbytes != end - begin:
        raise ValueError(
            f"{dtype.name} of shape {list(shape)} needs {nbytes} bytes, "
            f"but data_offsets hold {end - begin}"
        )
    return StoredTensor(name, dtype, shape, file, data_start + begin, nbytes)


def _dtype(name: object) -> DType:
    if not isinstance(name, str):
        raise ValueError("dtype: not a string")
    dtype = SAFETENSORS_DTYPES.get(name)
    if dtype is None:
        raise ValueError(f"dtype: {quoted(name)} is not supported")
    return dtype


def _numbers(field: str, values: object) -> list[int]:
    """Check for a list of 64-bit counts."""
    if type(values) is not list:
        raise ValueError(f"{field}: not a list")
    for value in values:
        # Not isinstance: True is an int too.
        if type(value) is not int or not 0 <= value < 1 << 63:
            raise ValueError(f"{field}: not a list of 64-bit counts")
    return values


def _check_layout(file: MappedFile, tensors: list[StoredTensor], data_start: int) -> None:
    """Check that the tensors fill the file from the end of the header on."""
    filled = data_start
    for tensor in sorted(tensors, key=lambda tensor: (tensor.offset, tensor.nbytes)):
        if tensor.offset != filled:
            fault = "overlaps another tensor" if tensor.offset < filled else "follows a hole"
            raise BadFileError(
                file.path,
                f"tensor {quoted(tensor.name)}: {fault}: begins at byte "
                f"{tensor.offset - data_start} of the data, where {filled - data_start} was due",
            )
        filled += tensor.nbytes
    if filled != file.size:
        fault = "is cut" if filled > file.size else "has bytes after its last tensor"
        raise BadFileError(
            file.path,
            f"the file {fault}: the header needs {filled} bytes, the file has {file.size}",
        )


def _ask_library(file: MappedFile) -> None:
    """Let the safetensors library judge the file too."""
    try:
        with safe_open(file.path, framework="numpy"):
            pass
    except Exception as error:  # whatever the library has against it, it is not to be trusted
        detail = " ".join(str(error).split())
        raise BadFileError(file.path, f"the safetensors library refuses it: {detail}") from error
