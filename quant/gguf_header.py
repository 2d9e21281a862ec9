"""The header of a GGUF file without its tensors: metadata and tokenizer, byte for byte."""

import struct
from contextlib import closing
from pathlib import Path

from localv4.storage.gguf import MAGIC
from localv4.storage.gguf_values import MAX_KEY_BYTES, GgufValues
from localv4.storage.mapped_file import MappedFile

SPLIT_PREFIX = "split."


def header_without_tensors(path: Path) -> bytes:
    """Return a GGUF file with the metadata of `path` and no tensors; raises BadFileError."""
    version, kept = keys_of(path)
    return MAGIC + struct.pack("<IQQ", version, 0, len(kept)) + b"".join(kept)


def keys_of(path: Path, dropped: tuple[str, ...] = ()) -> tuple[int, list[bytes]]:
    """Return the version of a GGUF file and its keys, each with its value, byte for byte.

    What says that `path` is one file of several is left out, and what is `dropped`. Raises
    BadFileError; `path` has been opened as a model before, so magic and version are known to be
    good.
    """
    with closing(MappedFile(path)) as file:
        values = GgufValues(file)
        values.raw(len(MAGIC), "magic")
        version = values.u32("version")
        values.u64("tensor count")
        spans = [_span(values) for _ in range(values.u64("key count"))]
    with path.open("rb") as raw:
        kept = []
        for key, begin, end in spans:
            if not key.startswith(SPLIT_PREFIX) and key not in dropped:
                raw.seek(begin)
                kept.append(raw.read(end - begin))
    return version, kept


def _span(values: GgufValues) -> tuple[str, int, int]:
    """Read over a key and its value; return the key and where both lie."""
    begin = values.position
    key = values.string("key", MAX_KEY_BYTES)
    values.value(values.u32(key), key)
    return key, begin, values.position
