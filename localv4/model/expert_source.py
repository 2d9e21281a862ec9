"""From files to records in memory: read as they are, or read in parts and packed."""

import ctypes
import threading
from collections.abc import Iterator
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from localv4.kernels.buffers import aligned_bytes
from localv4.model.experts import Experts, UnpackableError
from localv4.model.matrix import Matrix, Packed
from localv4.model.packing import PackedExpert, pack_expert
from localv4.model.weights import Expert
from localv4.paging.arena import GRANULE_BYTES, Arena
from localv4.paging.file_reads import FileReads, Piece
from localv4.paging.options import PagingOptions
from localv4.paging.paged_store import PagedStore
from localv4.paging.policy import make_policy
from localv4.paging.pressure import open_gauge
from localv4.paging.raw_file import Io
from localv4.paging.readers import Key, Load, Readers, Split
from localv4.paging.record_file import RecordFile
from localv4.paging.store import ExpertStore
from localv4.paging.uses import Uses
from localv4.storage import Checkpoint


def open_store(
    experts: Experts, options: PagingOptions, checkpoint: Checkpoint | None = None
) -> ExpertStore:
    """Return the store of the records of some experts.

    With `io` "map" records of a packed folder stay in the mapped files, and others are packed out
    of them. Otherwise they are read from the files of `checkpoint`. Raises LocalV4Error or
    BadFileError when a file cannot be read, MemoryError without memory.
    """
    is_packed = any(experts.forms)
    if not is_packed or (options.io == "map" and experts.are_mapped):
        fits = options.capacity_bytes >= int(experts.nbytes.sum())
        return experts.mapped_store(populates=fits)
    load, split, refusal = _loader(experts, options, checkpoint)
    start = options.faults.readers if options.faults else Readers
    sizes = np.maximum(footprints(experts.nbytes), GRANULE_BYTES)
    readers = start(load, options.readers, split)
    arena = Arena(arena_bytes(experts.nbytes, footprints(experts.nbytes), options.capacity_bytes))
    uses = Uses(*sizes.shape)
    store = PagedStore(sizes, arena, readers, make_policy(options.policy, uses), uses)
    store.refusal = refusal
    if arena.capacity >= GOVERNED_BYTES:
        store.govern(options.floor_bytes, open_gauge())
    return store


GOVERNED_BYTES = 1 << 28
"""From this size on an arena is worth giving back."""


def footprints(nbytes: NDArray[np.int64]) -> NDArray[np.int64]:
    """Return what records of some sizes take in an arena."""
    return -(-nbytes // GRANULE_BYTES) * GRANULE_BYTES


def arena_bytes(nbytes: NDArray[np.int64], sizes: NDArray[np.int64], capacity_bytes: int) -> int:
    """Return the size of an arena for the same share of all records.

    Records of released models are whole granules; those of toys are smaller than one.
    """
    total, room = int(nbytes.sum()), int(sizes.sum())
    return room if capacity_bytes >= total else capacity_bytes * room // max(1, total)


def _loader(
    experts: Experts, options: PagingOptions, checkpoint: Checkpoint | None
) -> tuple[Load, Split | None, str | None]:
    if options.io == "map":
        return MappedPacker(experts, checkpoint).load, None, None
    assert checkpoint is not None, "records are read from the files of a checkpoint"
    open_file = options.faults.open_file if options.faults else RecordFile.open
    chosen: Io = options.io
    table = {key: list(_pieces(expert, checkpoint)) for key, expert in _all(experts)}
    reads = FileReads(table, chosen, open_file)
    if experts.are_mapped:
        return reads.load, reads.split, reads.refusal
    return StagedPacker(experts, reads).load, None, reads.refusal


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
    """Packs experts out of mapped files, those of `checkpoint` if there is one."""

    def __init__(self, experts: Experts, checkpoint: Checkpoint | None) -> None:
        self._experts, self._checkpoint = experts, checkpoint

    def load(self, key: Key, address: int) -> int:
        """Pack an expert to an address; return the bytes that it has in its file."""
        expert = self._experts.layers[key[0]][key[1]]
        parts = _parts(expert)
        _pack_to(address, self._experts, key, expert)
        if self._checkpoint is not None:
            for part in parts:  # what was copied need not be in this process twice
                self._checkpoint.drop_pages_of(part)
        return sum(part.nbytes for part in parts)


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
    place = np.ctypeslib.as_array((ctypes.c_uint8 * form.nbytes).from_address(address))
    if not pack_expert(place, expert, form):
        raise UnpackableError(f"expert {key[1]} of layer {key[0]} holds a NaN")
