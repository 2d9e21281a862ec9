"""The decoder state of one token sequence, laid out so that going back costs nothing.

Everything that the next token needs is either append-only (compressed rows) or a ring indexed by
position (window rows, projections of the compressors). Rings hold more positions than are ever
read, so dropping the last tokens only means to lower `position`: nothing is moved or recomputed.
"""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Protocol
from weakref import WeakSet

import numpy as np
from numpy.typing import NDArray

from localv4.errors import LocalV4Error
from localv4.kernels import row_operations
from localv4.kernels.row_forms import RowForm
from localv4.kernels.row_operations import RowFormat
from localv4.model.config import LayerKind, ModelConfig
from localv4.model.matrix import F32, Floats
from localv4.model.rings import Ring, ring_shapes
from localv4.paging.row_memory import PAGE, RowArray, RowMemory, Wanted, view

Stored = NDArray[np.float32] | NDArray[np.uint8]


class Rows:
    """Append-only rows (n, any) at an address that does not change (`paging.row_memory`).

    They have `width` channels, the last `rope` of them rotated, in a form of
    `kernels.row_forms`: float32, or bytes. `is_sparse`: a token reads only a chosen few of them.
    """

    def __init__(self, form: RowForm, width: int, rope: int, *, is_sparse: bool) -> None:
        if form.is_plain:
            self.values: Stored = np.empty((0, width), F32)
        else:
            self.values = np.empty((0, form.nbytes(width, rope)), np.uint8)
        self.is_sparse = is_sparse
        self.memory: RowArray | None = None

    @property
    def floats(self) -> Floats:
        """The rows (n, width), where they are float32."""
        if self.values.dtype != F32:
            raise ValueError("compressed rows are no float32 here")
        return self.values.view(F32)

    @property
    def row_bytes(self) -> int:
        """Size of a row."""
        return int(self.values.shape[1]) * self.values.dtype.itemsize

    def most_pages(self, chosen: int, added: int) -> int:
        """Return the bytes of the most pages that hold so many chosen rows and new ones."""
        some = chosen * ((self.row_bytes - 2) // PAGE + 2) + added * self.row_bytes // PAGE + 2
        return PAGE * min(some, len(self.values) * self.row_bytes // PAGE + 2)

    def reserve(self, count: int) -> None:
        """Make `count` rows in all usable; raises MemoryError or DoesNotFitError."""
        if self.memory is not None and count > len(self.values):
            self.memory.commit(count * self.row_bytes)
            self.values = view(self.memory, count, self.values.shape[1], self.values.dtype)

    def move(self, memory: RowArray, count: int, make_way: Callable[[int], None]) -> None:
        """Go on in other memory with the first `count` rows; forks keep the old one.

        `make_way` is told of bytes of sparse rows before they come into memory.
        """
        before, self.memory = self.values[:count], memory
        self.values = self.values[:0]
        self.reserve(count)
        step = max(1, _COPIED // self.row_bytes)
        for first in range(0, count, step):
            make_way(2 * (_COPIED + 2 * PAGE) if self.is_sparse else 0)
            self.values[first : first + step] = before[first : first + step]

    def write(self, first: int, rows: Floats) -> None:
        """Put rows of float32 at index `first` and after, over whatever was there."""
        self.floats[first : first + rows.shape[0]] = rows


@dataclass(frozen=True, slots=True)
class CompressorState:
    """Projections by position, and the finished entries that they were pooled into."""

    keys: Ring
    gates: Ring
    entries: Rows


@dataclass(frozen=True, slots=True)
class LayerState:
    """Key rows of the raw window, and of the compressed branches where the layer has them."""

    window: Ring
    compressor: CompressorState | None
    indexer: CompressorState | None
    ratio: int

    @property
    def entries(self) -> Iterator[Rows]:
        """The append-only rows of the layer: one for every `ratio` positions."""
        for part in (self.compressor, self.indexer):
            if part is not None:
                yield part.entries

    @property
    def rings(self) -> Iterator[Ring]:
        """All rings of the layer."""
        yield self.window
        for part in (self.compressor, self.indexer):
            if part is not None:
                yield from (part.keys, part.gates)

    @property
    def addresses(self) -> tuple[int, ...]:
        """Where the arrays are, in the order of CELLS; 0 for what the layer does not have."""
        found = [self.window.values.ctypes.data]
        for part in (self.compressor, self.indexer):
            arrays = (part.keys, part.gates, part.entries) if part is not None else ()
            found += [array.values.ctypes.data for array in arrays] or [0, 0, 0]
        return tuple(found)


class DeviceCopy(Protocol):
    """Copies of a state's arrays in the memory of a device, where programs read and write them."""

    def read_back(self) -> None:
        """Bring what the device has written into the arrays."""

    def outdate(self) -> None:
        """Note that the arrays have been written to: the device is to get them again."""


_COPIED = 4 << 20
"""Bytes of rows that are copied between two looks at the memory for them."""


class Passer(Protocol):
    """Told when tokens of a chunk have passed a layer."""

    def note(self, layer: LayerState, first: int, end: int) -> None:
        """The rings of a layer end with the tokens at positions first ... end - 1."""


SLACK_TOKENS = 256
"""How far a sequence can be taken back; no fewer than attention takes at a time."""

BLOCK = 128
"""Positions for whose entries room is made at a time."""

CELLS = 7
"""Addresses of a layer: window; keys, gates, entries of the compressor; those of the indexer."""


class State:
    """One sequence: `position` tokens have been processed.

    At most `slack` of the newest tokens can be taken back, and at most `slack` tokens can be
    processed in one call, unless the caller puts back with `hold` what a call had overwritten that
    did not end; both follow from the size of the rings. `addresses` (layers, CELLS) i64 says where
    the arrays of the layers are, as of the last `begin`. `rows` is the format of the compressed
    rows; `exact` takes float32 only. `memory` says where they are kept. `device` has copies of the
    arrays, if programs run elsewhere; else `passer` is told of the parts of a chunk.
    """

    device: DeviceCopy | None = None
    passer: Passer | None = None

    def __init__(
        self,
        config: ModelConfig,
        slack: int,
        rows: RowFormat = row_operations.F32,
        memory: RowMemory | None = None,
    ) -> None:
        self.config, self.slack, self.rows = config, slack, rows
        self.memory = RowMemory() if memory is None else memory
        self.position = 0
        self._written = 0  # one past the furthest position that was ever put into the rings
        self._oldest = 0  # the first position that the rings let us go back to
        self._held = 0  # one past the last position whose entries are ours: forks spare them
        self._sharing: WeakSet[State] = WeakSet([self])  # whose entries our arrays have
        self._reserved = 0  # positions whose entries have room
        self._capacity = 0  # positions whose entries have addresses
        self.layers = [_layer_state(config, layer, slack, rows) for layer in range(config.n_layers)]
        self.addresses = np.zeros((config.n_layers, CELLS), np.int64)

    def begin(self, tokens: int) -> None:
        """Make room for the next `tokens` positions; note that they are going to be written.

        Raises MemoryError or DoesNotFitError, and leaves the state as it was.
        """
        end = self.position + tokens
        self._open_rows(self.position, end)
        self._written = max(self._written, end)

    @property
    def reserved(self) -> int:
        """Positions whose entries have memory, be they processed or not."""
        return self._reserved

    def read_back(self) -> None:
        """Bring what a device has written into the arrays of the layers."""
        if self.device is not None:
            self.device.read_back()

    def _outdate(self) -> None:
        if self.device is not None:
            self.device.outdate()

    def open_rows(self, first: int, end: int) -> None:
        """Let the caller write the entries of positions first ... end - 1; those before stay."""
        self.read_back()
        self._open_rows(first, end)
        self._outdate()

    def _open_rows(self, first: int, end: int) -> None:
        if len(self._sharing) > 1 and self._is_held_by_others(first):
            self._leave_others(first)
        if end > self._reserved:
            self._reserve(end)
        self._held = end
        self.memory.check()

    def reads(self, tokens: int, layer: int | None = None) -> int:
        """Return the most bytes of rows in files that come into memory with the next tokens.

        They are those that the tokens read and write in one layer, or in all.
        """
        layers = self.layers if layer is None else self.layers[layer : layer + 1]
        chosen = tokens * self.config.index_top_k
        return sum(
            rows.most_pages(chosen, tokens // each.ratio + 1)
            for each in layers
            for rows in each.entries
            if rows.is_sparse
        )

    def make_way(self, tokens: int, layer: int | None = None) -> None:
        """Keep the memory for rows within its bound while the next tokens read, and write, them."""
        self.memory.make_way(self.reads(tokens, layer))

    def make_way_to_copy(self, positions: int) -> None:
        """The same while all rows of so many positions are copied, here or from here."""
        sparse = [(e.ratio, r) for e in self.layers for r in e.entries if r.is_sparse]
        self.memory.make_way(sum(r.most_pages(0, positions // ratio) for ratio, r in sparse))

    def _is_held_by_others(self, position: int) -> bool:
        """Say whether a fork has entries of its own at `position` or after in our arrays."""
        return any(other._held > position for other in self._sharing if other is not self)

    def _leave_others(self, position: int) -> None:
        """Copy the entries of the positions before `position` into arrays of our own."""
        self.read_back()
        self._move(self._capacity, position)
        self._sharing.discard(self)
        self._sharing = WeakSet([self])

    def _reserve(self, positions: int) -> None:
        """Make room for the entries of so many positions, and of the rest of their block."""
        positions = -(-positions // BLOCK) * BLOCK
        if any(state.device is not None for state in self._sharing):
            # a device knows an array by its address: one that grows needs another
            positions = max(positions, 2 * self._reserved)
            self._move(positions, self._reserved)
        elif positions > self._capacity:
            try:
                self._move(max(positions, self.config.max_positions), self._reserved)
            except MemoryError:  # not even addresses: go by steps, and copy
                self._move(max(positions, 2 * self._reserved), self._reserved)
        for layer in self.layers:
            for rows in layer.entries:
                rows.reserve(positions // layer.ratio)
        self._reserved = positions
        self._note_addresses()

    def _move(self, capacity: int, position: int) -> None:
        """Go on in new arrays with the entries of the positions before `position`."""
        parts = [(layer.ratio, rows) for layer in self.layers for rows in layer.entries]
        arrays = self.memory.make(
            [
                Wanted(max(1, capacity // ratio * rows.row_bytes), rows.is_sparse)
                for ratio, rows in parts
            ]
        )
        for (ratio, rows), array in zip(parts, arrays, strict=True):
            rows.move(array, position // ratio, self.memory.make_way)
            rows.reserve(self._reserved // ratio)
        self._capacity = capacity
        self._note_addresses()

    def _note_addresses(self) -> None:
        for layer, addresses in zip(self.layers, self.addresses, strict=True):
            addresses[:] = layer.addresses

    def hold(self) -> Callable[[], None]:
        """Copy the rings. Returns the function that puts them back as they are now."""
        self.read_back()
        rings = [ring for layer in self.layers for ring in layer.rings if self._written > 0]
        copies = [ring.values.copy() for ring in rings]
        written = self._written

        def put_back() -> None:
            for ring, values in zip(rings, copies, strict=True):
                ring.values[:] = values
            self._written = written
            self._outdate()

        return put_back

    def advance(self, tokens: int) -> None:
        """Count `tokens` positions that every layer has processed."""
        self.position += tokens

    def can_roll_back(self, position: int) -> bool:
        """Say whether the rings still hold what position `position` needs."""
        return self._oldest <= position <= self.position and self._written - position <= self.slack

    def roll_back(self, position: int) -> None:
        """Forget the tokens at `position` and after; raise LocalV4Error when they are too many."""
        if position == 0:
            self._written = self._oldest = 0
        elif not self.can_roll_back(position):
            raise LocalV4Error(f"cannot go back from token {self.position} to {position}")
        self.position = self._held = position

    def replace_rings(self, position: int, rows: Iterable[Floats]) -> None:
        """Go to `position` with what the rings held there; the entries before must be in place.

        `rows` are, for each ring of each layer in order, those of the positions from
        `Ring.first_needed(position)` on.
        """
        self.read_back()
        rings = [ring for layer in self.layers for ring in layer.rings]
        for ring, values in zip(rings, rows, strict=True):
            ring.write(ring.first_needed(position), values)
        self.position = self._held = self._written = self._oldest = position
        self._outdate()

    def share_entries(self, other: "State") -> None:
        """Have the entries of `other` in its own arrays, until one writes over the other's."""
        other.read_back()
        for mine, theirs in zip(self.layers, other.layers, strict=True):
            for rows, source in zip(mine.entries, theirs.entries, strict=True):
                rows.values, rows.memory = source.values, source.memory
        self._sharing = other._sharing
        self._sharing.add(self)
        self._reserved, self._capacity = other._reserved, other._capacity
        self._note_addresses()

    @property
    def nbytes(self) -> int:
        """Bytes of memory that the state holds: of rows in a file those that are in memory."""
        rings = sum(ring.values.nbytes for layer in self.layers for ring in layer.rings)
        entries = [rows for layer in self.layers for rows in layer.entries]
        return rings + sum(min(rows.values.nbytes, _resident(rows)) for rows in entries)


def _resident(rows: Rows) -> int:
    return rows.memory.resident if rows.memory is not None else 0


def _layer_state(config: ModelConfig, layer: int, slack: int, rows: RowFormat) -> LayerState:
    kind, rope = config.layer_kinds[layer], config.rope_dim
    window, *others = (Ring(shape, slack) for shape in ring_shapes(config, layer))
    compressor, indexer = None, None
    if kind is not LayerKind.SLIDING:
        chosen = kind is LayerKind.CSA  # the indexer chooses which of them a token reads
        entries = Rows(rows.keys, config.head_dim, rope, is_sparse=chosen)
        compressor = CompressorState(others[0], others[1], entries)
    if kind is LayerKind.CSA:
        entries = Rows(rows.index, config.index_head_dim, rope, is_sparse=False)
        indexer = CompressorState(others[2], others[3], entries)
    return LayerState(window, compressor, indexer, config.ratios[layer])
