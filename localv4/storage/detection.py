"""Which form a model on disk has."""

from contextlib import closing
from pathlib import Path

from localv4.errors import BadFileError, NotFoundError, UsageError
from localv4.storage.checkpoint import Checkpoint
from localv4.storage.gguf import MAGIC, open_gguf
from localv4.storage.gguf_split import first_of_each
from localv4.storage.manifest import is_packed_folder
from localv4.storage.mapped_file import MappedFile, plain_errors
from localv4.storage.names import listed, member_path, names_ending
from localv4.storage.packed_folder import open_packed_folder
from localv4.storage.safetensors import INDEX_NAME, INDEX_SUFFIX, SUFFIX, open_safetensors

GGUF_SUFFIX = ".gguf"

_HEAD_BYTES = 9
"""A safetensors file begins with 8 bytes of length and the brace of its header."""


def open_checkpoint(path: Path) -> Checkpoint:
    """Open a model in any supported form: a folder, a single file, or one file of several.

    Raises NotFoundError where there is no model, BadFileError for a damaged one, UsageError for a
    folder of several GGUF models.
    """
    with plain_errors(path):
        if not path.is_dir():
            return open_gguf(path) if _is_gguf(path) else open_safetensors(path)
        if is_packed_folder(path):
            return open_packed_folder(path)
        if (path / INDEX_NAME).exists() or names_ending(path, SUFFIX):
            return open_safetensors(path)
        return open_gguf(_only_gguf(path))


def _is_gguf(path: Path) -> bool:
    """Judge a file by its first bytes, else by its name: in the hub cache names have no suffix."""
    with closing(MappedFile(path)) as file:
        head = file.read(min(file.size, _HEAD_BYTES), "first bytes")
    if head.startswith(MAGIC) or path.name.endswith(GGUF_SUFFIX):
        return True
    if path.name.endswith((SUFFIX, INDEX_SUFFIX)) or head.endswith(b"{"):
        return False
    raise BadFileError(
        path,
        "neither a GGUF nor a safetensors file",
        hint="name a .gguf or .safetensors file, or the folder of a model",
    )


def _only_gguf(folder: Path) -> Path:
    """Return the file of the only GGUF model in a folder."""
    models = first_of_each(names_ending(folder, GGUF_SUFFIX))
    if not models:
        raise NotFoundError(
            f"there is no model in {folder}",
            hint="a model folder holds .safetensors or .gguf files",
        )
    if len(models) > 1:
        raise UsageError(
            f"there are {len(models)} models in {folder}: {listed(models)}", hint="name one of them"
        )
    return member_path(folder, models[0], folder)
