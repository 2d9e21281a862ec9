"""A packed model: a folder whose tensors are what the kernels read; nothing is done at load.

Its shards are safetensors files. The manifest says what the packed bytes in them stand for.
"""

import math
from collections.abc import Mapping, Sequence
from contextlib import ExitStack, closing
from dataclasses import replace
from pathlib import Path

from localv4.errors import BadFileError
from localv4.storage.checkpoint import Checkpoint, MetaValue, StoredTensor
from localv4.storage.dtypes import GGML_DTYPES, DType
from localv4.storage.gguf import open_gguf
from localv4.storage.manifest import Manifest, MatrixEntry, read_manifest
from localv4.storage.mapped_file import MappedFile, plain_errors
from localv4.storage.names import listed, quoted
from localv4.storage.safetensors import MAX_SHARDS, SUFFIX
from localv4.storage.safetensors_header import MAX_TENSORS, read_tensors

PACKED_BYTES = "I8"
"""The type of packed bytes; official files keep their FP4 weights under that name."""

METADATA_NAME = "metadata.gguf"
"""The header of the GGUF file that a folder was made from: its metadata and no tensors."""

PAGE = 4096
LINE = 64

_GGML_BY_NAME = {dtype.name: dtype for dtype in GGML_DTYPES.values()}


class PackedFolder(Checkpoint):
    """An opened packed folder.

    A tensor that the manifest lists as "packed" is one block of the type that its format names and
    has the shape of its matrix, (rows, cols). Records are one block, too, with the shape (experts,
    weights of an expert). What is listed as "rows" has the ggml type of its rows. `metadata` is
    that of the GGUF file that the folder was made from, if it was one.
    """

    def __init__(
        self,
        manifest: Manifest,
        files: Sequence[MappedFile],
        tensors: Mapping[str, StoredTensor],
        metadata: Mapping[str, MetaValue],
    ) -> None:
        """Map `files`, whose `tensors` have been validated."""
        super().__init__("safetensors", manifest.path.parent, files, tensors, metadata)
        self.manifest = manifest
        for name, entry in manifest.matrices.items():
            if entry.layout != "rows":  # of which a token reads one
                tensor = tensors[name]
                files[tensor.file].prefer_large_pages(tensor.offset, tensor.nbytes)


def open_packed_folder(folder: Path) -> PackedFolder:
    """Open a packed model and check names, sizes and places; digests are left to `localv4 verify`.

    Raises NotFoundError where there is none, BadFileError for a damaged or incomplete one.
    """
    with plain_errors(folder), ExitStack() as opened:
        manifest = read_manifest(folder)
        _check_files(manifest)
        shards = [name for name in manifest.files if name.endswith(SUFFIX)]
        if not 0 < len(shards) <= MAX_SHARDS:
            raise BadFileError(
                manifest.path, f"names {len(shards)} shards, expected 1 to {MAX_SHARDS}"
            )
        files: list[MappedFile] = []
        tensors: dict[str, StoredTensor] = {}
        for shard in shards:
            file = opened.enter_context(closing(MappedFile(folder / shard)))
            for tensor in read_tensors(file, len(files)):
                if tensors.setdefault(tensor.name, tensor) is not tensor:
                    raise BadFileError(file.path, f"{quoted(tensor.name)} is in two shards")
            files.append(file)
            if len(tensors) > MAX_TENSORS:
                raise BadFileError(folder, f"more than {MAX_TENSORS} tensors")
        _interpret(manifest, tensors, files)
        packed = PackedFolder(manifest, files, tensors, _metadata(manifest))
        opened.pop_all()
    return packed


def _check_files(manifest: Manifest) -> None:
    """Check that all files are there in full size."""
    folder = manifest.path.parent
    missing = [name for name in manifest.files if not (folder / name).exists()]
    if missing:
        raise BadFileError(
            manifest.path,
            f"{len(missing)} of {len(manifest.files)} files are missing: {listed(missing)}",
            hint="copy or convert the model again",
        )
    for name, entry in manifest.files.items():
        size = (folder / name).stat().st_size
        if size != entry.nbytes:
            raise BadFileError(
                folder / name, f"has {size} bytes, but the manifest says {entry.nbytes}"
            )


def _metadata(manifest: Manifest) -> Mapping[str, MetaValue]:
    if METADATA_NAME not in manifest.files:
        return {}
    with open_gguf(manifest.path.parent / METADATA_NAME) as header:
        return dict(header.metadata)


def _interpret(
    manifest: Manifest, tensors: dict[str, StoredTensor], files: Sequence[MappedFile]
) -> None:
    """Give the tensors that the manifest describes their types and shapes."""
    for name, entry in manifest.matrices.items():
        tensor = tensors.get(name)
        if tensor is None:
            raise BadFileError(manifest.path, f"matrices, {quoted(name)}: no shard holds it")
        try:
            tensors[name] = _described(tensor, entry)
        except ValueError as error:
            path = files[tensor.file].path
            raise BadFileError(path, f"tensor {quoted(name)}: {error}") from error


def _described(tensor: StoredTensor, entry: MatrixEntry) -> StoredTensor:
    """Return a tensor of packed bytes as what it holds; raises ValueError where that cannot be."""
    if tensor.dtype.name != PACKED_BYTES:
        raise ValueError(f"has type {tensor.dtype.name}, expected packed bytes ({PACKED_BYTES})")
    if entry.layout == "records":
        if tensor.shape != (entry.records, entry.record_bytes):
            raise ValueError(
                f"has shape {tensor.shape}, expected {(entry.records, entry.record_bytes)}"
            )
        if tensor.offset % PAGE or entry.record_bytes % PAGE:
            raise ValueError(f"its records do not start on pages of {PAGE} bytes")
        formats = dict.fromkeys((entry.format, entry.down_format))
        return _one_block(tensor, "+".join(formats), (entry.records, 3 * entry.rows * entry.cols))
    shape = (entry.rows, entry.cols)
    if entry.layout == "rows":
        dtype = _GGML_BY_NAME.get(entry.format)
        if dtype is None or entry.cols % dtype.block:
            raise ValueError(f"{entry.format} is no type of rows of {entry.cols} columns")
        nbytes = dtype.nbytes(entry.rows * entry.cols)
        if tensor.nbytes != nbytes:
            raise ValueError(
                f"has {tensor.nbytes} bytes, but {entry.format} {shape} needs {nbytes}"
            )
        return replace(tensor, dtype=dtype, shape=shape)
    if tensor.offset % LINE:
        raise ValueError(f"does not start on a line of {LINE} bytes")
    return _one_block(tensor, entry.format, shape)


def _one_block(tensor: StoredTensor, name: str, shape: tuple[int, int]) -> StoredTensor:
    """Return the tensor as a single block of a type: its elements have no bytes of their own."""
    dtype = DType(name, math.prod(shape), tensor.nbytes)
    return replace(tensor, dtype=dtype, shape=shape)
