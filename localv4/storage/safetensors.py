"""safetensors models: one file, a folder of files, or shards listed in an index file."""

import re
from collections.abc import Iterable, Sequence
from contextlib import ExitStack, closing
from pathlib import Path

from localv4.errors import BadFileError, NotFoundError
from localv4.storage.checkpoint import Checkpoint, StoredTensor
from localv4.storage.mapped_file import MappedFile, plain_errors
from localv4.storage.names import listed, member_path, names_ending, quoted
from localv4.storage.safetensors_header import MAX_TENSORS, read_tensors
from localv4.storage.strict_json import StrictJson

INDEX_NAME = "model.safetensors.index.json"
INDEX_SUFFIX = ".safetensors.index.json"
SUFFIX = ".safetensors"

MAX_INDEX_BYTES = 100_000_000
"""The index of the largest V4 model has 15 MB."""
MAX_INDEX_METADATA_BYTES = 65_536
MAX_SHARDS = 512
"""The largest V4 model has 66; each takes two open files."""

_NUMBERED = re.compile(r"(?P<stem>.+)-[0-9]{5}-of-(?P<count>[0-9]{5})\.safetensors")


def open_safetensors(path: Path) -> Checkpoint:
    """Open a folder with an index file, a folder of `*.safetensors`, an index file, or one file.

    Raises BadFileError for damaged or incomplete models, NotFoundError where there is none.
    """
    with plain_errors(path):
        if path.name.endswith(INDEX_SUFFIX):
            return _open_indexed(path.parent, path)
        if not path.is_dir():
            return _open_shards(path, [path])
        if (path / INDEX_NAME).exists():
            return _open_indexed(path, member_path(path, INDEX_NAME, path))
        names = names_ending(path, SUFFIX)
        if not names:
            raise NotFoundError(
                f"there are no safetensors files in {path}", hint="is this the folder of a model?"
            )
        _check_numbering(path, names)
        return _open_shards(path, [member_path(path, name, path) for name in names])


def _open_shards(path: Path, shards: Sequence[Path]) -> Checkpoint:
    """Open `shards` as one checkpoint that the user called `path`."""
    _check_shard_count(path, len(shards))
    with ExitStack() as opened:
        files: list[MappedFile] = []
        tensors: dict[str, StoredTensor] = {}
        for shard in shards:
            file = opened.enter_context(closing(MappedFile(shard)))
            _add_tensors(tensors, read_tensors(file, len(files)), path, shards)
            files.append(file)
        checkpoint = Checkpoint("safetensors", path, files, tensors, {})
        opened.pop_all()
    return checkpoint


def _add_tensors(
    tensors: dict[str, StoredTensor],
    found: Iterable[StoredTensor],
    path: Path,
    shards: Sequence[Path],
) -> None:
    for tensor in found:
        other = tensors.setdefault(tensor.name, tensor)
        if other is not tensor:
            raise BadFileError(
                path,
                f"the tensor {quoted(tensor.name)} is in {quoted(shards[other.file].name)} "
                f"and in {quoted(shards[tensor.file].name)}",
            )
    if len(tensors) > MAX_TENSORS:
        raise BadFileError(path, f"{len(tensors)} tensors, but {MAX_TENSORS} are the limit")


def _open_indexed(folder: Path, index: Path) -> Checkpoint:
    """Open the shards that an index file names, and check that it agrees with their headers."""
    weight_map, total_size = _read_index(index)
    names = sorted(set(weight_map.values()))
    _check_shard_count(index, len(names))
    shards = [member_path(folder, name, index) for name in names]
    _refuse_missing(index, [shard.name for shard in shards if not shard.exists()], len(names))
    checkpoint = _open_shards(folder, shards)
    try:
        _check_agreement(index, checkpoint, weight_map, total_size)
    except BadFileError:
        checkpoint.close()
        raise
    return checkpoint


def _read_index(index: Path) -> tuple[dict[str, str], int | None]:
    """Return the shard of each tensor, and the bytes of all tensors where the index says so."""
    with closing(MappedFile(index)) as file:
        if file.size > MAX_INDEX_BYTES:
            raise BadFileError(
                index, f"the index has {file.size} bytes, but {MAX_INDEX_BYTES} are the limit"
            )
        text = StrictJson(index, file.read(file.size, "index"), "index")
    weight_map: dict[str, str] | None = None
    total_size: int | None = None
    for key in text.keys(2):
        if key == "weight_map":
            shared: dict[str, str] = {}  # one object per shard name, not one per tensor
            weight_map = {}
            for name in text.keys(MAX_TENSORS):
                shard = text.string()
                weight_map[name] = shared.setdefault(shard, shard)
        elif key == "metadata":
            total_size = _total_size(
                index, text.small_object(MAX_INDEX_METADATA_BYTES).get("total_size")
            )
        else:
            raise BadFileError(index, f"the key {quoted(key)} is not known")
    text.finish()
    if not weight_map:
        raise BadFileError(index, "weight_map: missing or empty")
    return weight_map, total_size


def _total_size(index: Path, value: object) -> int | None:
    """Check `total_size`; some writers store a whole number as a float."""
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    if value is not None and (type(value) is not int or value < 0):
        raise BadFileError(index, "metadata: total_size is not a number of bytes")
    return value


def _check_agreement(
    index: Path, checkpoint: Checkpoint, weight_map: dict[str, str], total_size: int | None
) -> None:
    files = [file.name for file in checkpoint.files]
    found = {name: files[tensor.file] for name, tensor in checkpoint.tensors.items()}
    if found != weight_map:
        absent = [name for name, shard in weight_map.items() if found.get(name) != shard]
        if absent:
            shard = weight_map[absent[0]]
            fault = f"{quoted(shard)} lacks {listed(absent)}, which weight_map puts there"
        else:
            extra = [name for name in found if name not in weight_map]
            fault = f"{quoted(found[extra[0]])} holds {listed(extra)}, not in weight_map"
        raise BadFileError(index, fault)
    nbytes = sum(tensor.nbytes for tensor in checkpoint.tensors.values())
    if total_size is not None and total_size != nbytes:
        raise BadFileError(
            index, f"total_size is {total_size}, but the tensors have {nbytes} bytes"
        )


def _check_shard_count(path: Path, count: int) -> None:
    if count > MAX_SHARDS:
        raise BadFileError(path, f"{count} shards, but {MAX_SHARDS} are the limit")


def _check_numbering(folder: Path, names: Sequence[str]) -> None:
    """Check that no shard of a `STEM-00001-of-00003.safetensors` series is missing."""
    matches = filter(None, map(_NUMBERED.fullmatch, names))
    for stem, digits in sorted({(match["stem"], match["count"]) for match in matches}):
        count = int(digits)
        _check_shard_count(folder, count)
        series = {f"{stem}-{number:05}-of-{digits}{SUFFIX}" for number in range(1, count + 1)}
        _refuse_missing(folder, sorted(series.difference(names)), count)


def _refuse_missing(path: Path, missing: Sequence[str], count: int) -> None:
    if missing:
        raise BadFileError(
            path,
            f"{len(missing)} of {count} shards are missing: {listed(missing)}",
            hint="copy or download the missing files",
        )
