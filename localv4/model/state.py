"""The decoder state of one token sequence, laid out so that going back costs nothing.

Everything that the next token needs is either append-only (compressed rows) or a ring indexed by
position (window rows, projections of the compressors). Rings hold more positions than are ever
read, so dropping the last tokens only means to lower `position`: nothing is moved or recomputed.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from localv4.errors import LocalV4Error
from localv4.model.config import LayerKind, ModelConfig
from localv4.model.matrix import F32, Floats


class Rows:
    """Append-only rows (n, width) in an array that doubles when it is full."""

    def __init__(self, width: int) -> None:
        self.values = np.empty((0, width), F32)

    def reserve(self, count: int) -> None:
        """Make room for `count` rows in all."""
        held = self.values.shape[0]
        if count > held:
            grown = np.empty((max(64, count, 2 * held), self.values.shape[1]), F32)
            grown[:held] = self.values
            self.values = grown

    def write(self, first: int, rows: Floats) -> None:
        """Put `rows` at index `first` and after, over whatever was there."""
        end = first + rows.shape[0]
        self.reserve(end)
        self.values[first:end] = rows


class Ring:
    """Rows by position: position p lies in slot p % capacity."""

    def __init__(self, capacity: int, width: int) -> None:
        self.values = np.zeros((capacity, width), F32)

    def write(self, first: int, rows: Floats) -> None:
        """Store the rows of positions first, first + 1, ..."""
        self.values[self._slots(first, first + rows.shape[0])] = rows

    def read(self, first: int, end: int) -> Floats:
        """Return a copy of the rows of positions first ... end - 1."""
        rows: Floats = self.values[self._slots(first, end)]
        return rows

    def _slots(self, first: int, end: int) -> NDArray[np.int64]:
        slots: NDArray[np.int64] = np.arange(first, end) % self.values.shape[0]
        return slots


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

    def reserve(self, positions: int) -> None:
        """Make room for the entries of so many positions in all."""
        for part in (self.compressor, self.indexer):
            if part is not None:
                part.entries.reserve(positions // self.ratio)

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


CELLS = 7
"""Addresses of a layer: window; keys, gates, entries of the compressor; those of the indexer."""


class State:
    """One sequence: `position` tokens have been processed.

    At most `slack` of the newest tokens can be taken back, and at most `slack` tokens can be
    processed in one call, unless the caller puts back with `hold` what a call had overwritten that
    did not end; both follow from the size of the rings. `addresses` (layers, CELLS) i64 says where
    the arrays of the layers are.
    """

    def __init__(self, config: ModelConfig, slack: int) -> None:
        self.slack = slack
        self.position = 0
        self._written = 0  # one past the furthest position that was ever put into the rings
        self._reserved = 0
        self.layers = [_layer_state(config, layer, slack) for layer in range(config.n_layers)]
        self.addresses = np.zeros((config.n_layers, CELLS), np.int64)
        self._reach = max(config.window, 2 * max(config.ratios, default=0))
        self._reserve(1)

    def begin(self, tokens: int) -> None:
        """Make room for the next `tokens` positions; note that they are going to be written."""
        end = self.position + tokens
        self._written = max(self._written, end)
        if end > self._reserved:
            self._reserve(max(end, 2 * self._reserved, 256))

    def _reserve(self, positions: int) -> None:
        self._reserved = positions
        for layer, addresses in zip(self.layers, self.addresses, strict=True):
            layer.reserve(positions)
            addresses[:] = layer.addresses

    def hold(self) -> Callable[[], None]:
        """Copy what the rings hold of the positions before `position` that will be read again.

        Returns the function that puts it back, as if no later position had ever been written.
        """
        first, position = max(0, self.position - self._reach), self.position
        rings = [ring for layer in self.layers for ring in layer.rings]
        copies = [ring.read(max(first, position - len(ring.values)), position) for ring in rings]

        def put_back() -> None:
            for ring, rows in zip(rings, copies, strict=True):
                ring.write(position - len(rows), rows)
            self._written = position

        return put_back

    def advance(self, tokens: int) -> None:
        """Count `tokens` positions that every layer has processed."""
        self.position += tokens

    def can_roll_back(self, position: int) -> bool:
        """Say whether the rings still hold what position `position` needs."""
        return 0 <= position <= self.position and self._written - position <= self.slack

    def roll_back(self, position: int) -> None:
        """Forget the tokens at `position` and after; raise LocalV4Error when they are too many."""
        if position == 0:
            self._written = 0
        elif not self.can_roll_back(position):
            raise LocalV4Error(f"cannot go back from token {self.position} to {position}")
        self.position = position

    @property
    def nbytes(self) -> int:
        """Bytes of memory that the state holds."""
        arrays = []
        for layer in self.layers:
            arrays.append(layer.window.values)
            for part in (layer.compressor, layer.indexer):
                if part is not None:
                    arrays += [part.keys.values, part.gates.values, part.entries.values]
        return sum(array.nbytes for array in arrays)


def window_capacity(window: int, slack: int) -> int:
    """Return the positions that the ring of a raw window holds."""
    return window + slack


def compressor_capacity(reach: int, ratio: int, slack: int) -> int:
    """Return the positions that a compressor's rings hold; it pools `reach` windows of `ratio`."""
    return reach * ratio + slack


def _layer_state(config: ModelConfig, layer: int, slack: int) -> LayerState:
    kind, ratio = config.layer_kinds[layer], config.ratios[layer]
    compressor, indexer = None, None
    if kind is not LayerKind.SLIDING:
        reach = 2 if kind is LayerKind.CSA else 1
        compressor = _compressor_state(config.head_dim, ratio, reach, slack)
    if kind is LayerKind.CSA:
        indexer = _compressor_state(config.index_head_dim, ratio, 2, slack)
    window = Ring(window_capacity(config.window, slack), config.head_dim)
    return LayerState(window, compressor, indexer, ratio)


def _compressor_state(width: int, ratio: int, reach: int, slack: int) -> CompressorState:
    """`reach` windows are pooled into an entry, each with its own `width` channels."""
    capacity = compressor_capacity(reach, ratio, slack)
    return CompressorState(
        keys=Ring(capacity, reach * width),
        gates=Ring(capacity, reach * width),
        entries=Rows(width),
    )
