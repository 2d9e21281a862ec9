"""The decoder state of one token sequence, laid out so that going back costs nothing.

Everything that the next token needs is either append-only (compressed rows) or a ring indexed by
position (window rows, projections of the compressors). Rings hold more positions than are ever
read, so dropping the last tokens only means to lower `position`: nothing is moved or recomputed.
"""

from dataclasses import dataclass

import numpy as np

from localv4.errors import LocalV4Error
from localv4.model.config import LayerKind, ModelConfig
from localv4.model.matrix import F32, Floats


class Rows:
    """Append-only rows (n, width) in an array that doubles when it is full."""

    def __init__(self, width: int) -> None:
        self.values = np.empty((0, width), F32)

    def write(self, first: int, rows: Floats) -> None:
        """Put `rows` at index `first` and after, over whatever was there."""
        end = first + rows.shape[0]
        if end > self.values.shape[0]:
            grown = np.empty((max(64, end, 2 * self.values.shape[0]), rows.shape[1]), F32)
            grown[:first] = self.values[:first]
            self.values = grown
        self.values[first:end] = rows


class Ring:
    """Rows by position: position p lies in slot p % capacity."""

    def __init__(self, capacity: int, width: int) -> None:
        self.values = np.zeros((capacity, width), F32)

    def write(self, first: int, rows: Floats) -> None:
        """Store the rows of positions first, first + 1, ..."""
        slots = np.arange(first, first + rows.shape[0]) % self.values.shape[0]
        self.values[slots] = rows


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


class State:
    """One sequence: `position` tokens have been processed.

    At most `slack` tokens can be processed in one call, and at most `slack` of the newest tokens
    can be taken back; both follow from the size of the rings.
    """

    def __init__(self, config: ModelConfig, slack: int) -> None:
        self.slack = slack
        self.position = 0
        self._written = 0  # one past the furthest position that was ever put into the rings
        self.layers = [_layer_state(config, layer, slack) for layer in range(config.n_layers)]

    def begin(self, tokens: int) -> None:
        """Note that the next `tokens` positions are going to be written, finished or not."""
        self._written = max(self._written, self.position + tokens)

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


def _layer_state(config: ModelConfig, layer: int, slack: int) -> LayerState:
    kind, ratio = config.layer_kinds[layer], config.ratios[layer]
    compressor, indexer = None, None
    if kind is not LayerKind.SLIDING:
        reach = 2 if kind is LayerKind.CSA else 1
        compressor = _compressor_state(config.head_dim, ratio, reach, slack)
    if kind is LayerKind.CSA:
        indexer = _compressor_state(config.index_head_dim, ratio, 2, slack)
    return LayerState(Ring(config.window + slack, config.head_dim), compressor, indexer)


def _compressor_state(width: int, ratio: int, reach: int, slack: int) -> CompressorState:
    """`reach` windows are pooled into an entry, each with its own `width` channels."""
    capacity = reach * ratio + slack
    return CompressorState(
        keys=Ring(capacity, reach * width),
        gates=Ring(capacity, reach * width),
        entries=Rows(width),
    )
