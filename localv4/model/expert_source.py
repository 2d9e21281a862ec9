"""From files to records in memory: read as they are, or read in parts and packed."""

import ctypes
import threading
from collections.abc import Iterator
from dataclasses import replace

import numpy as np

from localv4.kernels.buffers import aligned_bytes
from localv4.model.experts import Experts, UnpackableError
from localv4.model.matrix import Matrix, Packed
from localv4.model.packing import PackedExpert, pack_expert
from localv4.model.weights import Expert
from localv4.paging.arena import Arena
from localv4.paging.file_reads import FileReads, OpenFile, Piece
from localv4.paging.options import PagingOptions
from localv4.paging.paged_store import PagedStore
from localv4.paging.policy import make_policy
from localv4.paging.raw_file import Io
from localv4.paging.readers import Key, Load, Readers, Split
from localv4.paging.record_file import RecordFile
from localv4.paging.store import ExpertStore
from localv4.paging.uses import Uses
from localv4.storage import Checkpoint


def open_store(experts: Experts, checkpoint: Checkpoint, options: PagingOptions) -> ExpertStore:
    """Return the store of the records of some experts, which are in the files of a checkpoint.

    With `io` "map" records of a packed folder stay in the files; others are packed into an arena.
    Raises LocalV4Error or BadFileError when a file cannot be read, MemoryError without memory.
    """
    if options.io == "map" and experts.are_mapped:
        return experts.mapped_store()
    open_file = options.faults.open_file if options.faults else RecordFile.open
    load, split = _loader(experts, checkpoint, options.io, open_file)
    start = options.faults.readers if options.faults else Readers
    uses = Uses(*experts.nbytes.shape)
    total = int(experts.nbytes.sum())
    arena = Arena(min(options.capacity_bytes, total + ARENA_SPARE_BYTES))
    readers = start(load, options.readers, split)
    return PagedStore(experts.nbytes, arena, readers, make_policy(options.policy), uses)


ARENA_SPARE_BYTES = 1 << 26
"""What an arena with room for every record has beyond them, for whole granules."""


def _loader(
    experts: Experts, checkpoint: Checkpoint, io: str, open_file: OpenFile
) -> tuple[Load, Split | None]:
    if io == "map":
        return MappedPacker(experts).load, None
    chosen: Io = "direct" if io == "direct" else "buffered"
    table = {key: list(_pieces(expert, checkpoint)) for key, expert in _all(experts)}
    reads = FileReads(table, chosen, open_file)
    if experts.are_mapped:
        return reads.load, reads.split
    return StagedPacker(experts, reads).load, None


def _all(experts: Experts) -> Iterator[tuple[Key, Expert]]:
    for index, layer in enumerate(experts.layers):
        if experts.forms[index]:
            for number, expert in enumerate(layer):
                yield (index, number), expert


def _pieces(expert: Expert, checkpoint: Checkpoint) -> Iterator[Piece]:
    """Yield where an expert lies: its record, or the parts of its matrices."""
    arrays = [expert.record] if isinstance(expert, PackedExpert) else _parts(expert)
    for array in arrays:
        path, offset = checkpoint.place_of(array)
        yield Piece(path, offset, array.nbytes)


def _parts(expert: Expert) -> list[Packed]:
    """Return the stored arrays of the matrices of an expert, in a fixed order."""
    matrices = (expert.w1, expert.w3, expert.w2)
    return [part for m in matrices for part in (m.data, m.scale) if part.size > 1]


class MappedPacker:
    """Packs experts out of mapped files."""

    def __init__(self, experts: Experts) -> None:
        self._experts = experts

    def load(self, key: Key, address: int) -> int:
        """Pack an expert to an address; return the bytes that it has in its file."""
        expert = self._experts.layers[key[0]][key[1]]
        _pack_to(address, self._experts, key, expert)
        return sum(part.nbytes for part in _parts(expert))


class StagedPacker:
    """Reads the stored parts of an expert to memory of the reading thread, and packs them."""

    def __init__(self, experts: Experts, reads: FileReads) -> None:
        self._experts, self._reads = experts, reads
        self._staging = threading.local()

    def load(self, key: Key, address: int) -> int:
        """Read an expert and pack it to an address; return the bytes that were read."""
        staging = self._buffer(self._reads.room(key))
        nbytes = self._reads.load(key, staging.ctypes.data)
        places = iter(self._reads.places(key))
        stored = self._experts.layers[key[0]][key[1]]
        matrices = [_staged(m, staging, places) for m in (stored.w1, stored.w3, stored.w2)]
        _pack_to(address, self._experts, key, Expert(matrices[0], matrices[2], matrices[1]))
        return nbytes

    def _buffer(self, nbytes: int) -> Packed:
        """Return memory on a page boundary that this thread alone uses."""
        held: Packed | None = getattr(self._staging, "buffer", None)
        if held is None or held.nbytes < nbytes:
            raw = aligned_bytes(nbytes + _PAGE)
            held = raw[-raw.ctypes.data % _PAGE :]
            self._staging.buffer = held
        return held


_PAGE = 4096


def _staged(matrix: Matrix, staging: Packed, places: Iterator[int]) -> Matrix:
    """Return a matrix whose parts are at the next places of a buffer."""

    def at_next_place(part: Packed) -> Packed:
        if part.size <= 1:
            return part
        start = next(places)
        return staging[start : start + part.nbytes].reshape(part.shape)

    return replace(matrix, data=at_next_place(matrix.data), scale=at_next_place(matrix.scale))


def _pack_to(address: int, experts: Experts, key: Key, expert: Expert) -> None:
    form = experts.form(*key)
    bytes_there = (ctypes.c_uint8 * form.nbytes).from_address(address)
    if not pack_expert(np.frombuffer(bytes_there, np.uint8), expert, form):
        raise UnpackableError(f"expert {key[1]} of layer {key[0]} holds a NaN")
