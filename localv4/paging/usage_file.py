"""What is kept of the use of experts from one session to the next: counts, no text.

A file has a head, then half floats, little-endian:

    8 bytes   LV4USAGE
    u32       version, 1
    u32       CRC-32 of all that follows
    32 bytes  fingerprint of the model
    u32 x 3   layers, experts, topics
    f16       scores at the end of the session (layers, experts)
    f16       scores of topics that were met before (topics, layers, experts), the last at the end
"""

import struct
import zlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from localv4 import paths
from localv4.errors import BadFileError, NotFoundError
from localv4.finished_file import finished_file
from localv4.paging.topics import MOST_TOPICS, TopicMemory
from localv4.paging.uses import Heat, Uses
from localv4.small_file import read_small_file

MAGIC = b"LV4USAGE"
VERSION = 1
MAX_BYTES = 1 << 25
"""A file of 512 layers of 512 experts with all topics has 9 MB."""

KEPT = 0.5
"""What a use of an earlier session counts in the next: it is a beginning, not an argument."""

_FIXED = struct.Struct("<8sII")
_BODY = struct.Struct("<32sIII")
_HALF = np.dtype("<f2")
_LARGEST = float(np.finfo(np.float16).max)


@dataclass(frozen=True, slots=True)
class Usage:
    """Scores (layers, experts) at the end of a session, and those of its topics."""

    scores: Heat
    topics: tuple[Heat, ...] = ()

    @classmethod
    def of(cls, uses: Uses, memory: TopicMemory) -> "Usage":
        """Return what is worth keeping of a session; its last topic is remembered now."""
        memory.remember(uses)
        return cls(uses.scores(), tuple(memory.topics))

    def begin(self, uses: Uses, memory: TopicMemory) -> None:
        """Let a new session count on from here."""
        uses.restart(KEPT * self.scores)
        memory.topics = list(self.topics)

    def hottest(self, nbytes: NDArray[np.int64], room: int) -> list[tuple[int, int]]:
        """Return the experts to read ahead into `room` bytes, the hottest first.

        `nbytes` (layers, experts) are the bytes of records, 0 for those that are none.
        """
        order = np.argsort(-self.scores, axis=None, kind="stable")
        wanted = order[((self.scores > 0) & (nbytes > 0)).ravel()[order]]
        count = int(np.searchsorted(np.cumsum(nbytes.ravel()[wanted]), room, side="right"))
        layers, numbers = np.divmod(wanted[:count], self.scores.shape[1])
        return list(zip(layers.tolist(), numbers.tolist(), strict=True))


def usage_path(fingerprint: str) -> Path:
    """Return where the usage of a model is kept: in the user's data, whatever holds the model."""
    return paths.home_dir() / "usage" / f"{fingerprint[:32]}.usage"


def save_usage(path: Path, fingerprint: str, usage: Usage) -> None:
    """Write a file that appears all at once. LocalV4Error if that fails."""
    paths.private_dir(path.parent)
    shape = usage.scores.shape
    arrays = [usage.scores, *usage.topics[-MOST_TOPICS:]]
    head = _BODY.pack(bytes.fromhex(fingerprint), *shape, len(arrays) - 1)
    body = head + b"".join(np.minimum(a, _LARGEST).astype(_HALF).tobytes() for a in arrays)
    with finished_file(path) as file:
        file.write(_FIXED.pack(MAGIC, VERSION, zlib.crc32(body)) + body)


def load_usage(path: Path, fingerprint: str, shape: tuple[int, int]) -> Usage | None:
    """Return what a file keeps of a model with (layers, experts), None if there is no file.

    Raises BadFileError for a file that is damaged, of another version or of another model. It can
    be ignored then, and will be written anew.
    """
    try:
        data = read_small_file(path, MAX_BYTES)
    except NotFoundError:
        return None
    if len(data) < _FIXED.size + _BODY.size or not data.startswith(MAGIC):
        raise BadFileError(path, "is no record of the use of experts")
    _, version, checksum = _FIXED.unpack_from(data)
    if version != VERSION:
        raise BadFileError(path, f"version {version}, this localv4 reads {VERSION}")
    body = data[_FIXED.size :]
    if zlib.crc32(body) != checksum:
        raise BadFileError(path, "is damaged")
    owner, layers, experts, topics = _BODY.unpack_from(body)
    if owner != bytes.fromhex(fingerprint) or (layers, experts) != shape:
        raise BadFileError(path, "belongs to another model")
    if topics > MOST_TOPICS:
        raise BadFileError(path, f"has {topics} topics, at most {MOST_TOPICS}")
    return _read_scores(path, body[_BODY.size :], (1 + topics, layers, experts))


def _read_scores(path: Path, data: bytes, shape: tuple[int, int, int]) -> Usage:
    if len(data) != int(np.prod(shape)) * _HALF.itemsize:
        raise BadFileError(path, f"holds {len(data)} bytes of scores, not those of {shape}")
    values = np.frombuffer(data, _HALF).astype(np.float32).reshape(shape)
    if not (np.isfinite(values) & (values >= 0)).all():
        raise BadFileError(path, "holds something else than counts")
    return Usage(values[0], tuple(values[1:]))
