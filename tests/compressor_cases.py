"""Compressors with full rings, and room for the entries that an operation writes."""

import numpy as np
import pytest
from operation_runs import F32, Floats, cell
from reference_packed import Bytes, address

from localv4.kernels import compression, elementwise
from localv4.kernels.compiler import Entry
from localv4.kernels.operation import float_bits
from localv4.kernels.row_forms import RowForm
from localv4.kernels.row_operations import RowFormat

EPS = 1e-6

Sizes = tuple[int, bool, int, int, int, int, int]
"""Ratio, overlap, channels, capacity, rotated pairs, first position, tokens."""


class Compressor:
    """Full rings, a norm, a rotation; `tokens` from `start` on make entries first ... end - 1."""

    def __init__(
        self, ratio: int, overlap: bool, n: int, capacity: int, pairs: int, start: int, tokens: int
    ) -> None:
        rng = np.random.default_rng(ratio)
        self.ratio, self.n, self.pairs = ratio, n, pairs
        self.start, self.tokens = start, tokens
        self.first, self.end = start // ratio, (start + tokens) // ratio
        width = 2 * n if overlap else n
        self.keys = rng.standard_normal((capacity, width), F32)
        self.gates = rng.standard_normal((capacity, width), F32) * 4
        self.weight = rng.standard_normal(n, F32)
        self.frequencies = rng.random(pairs, F32)
        self.cells = [cell(self.keys), cell(self.gates)]

    def room(self, nbytes: int) -> tuple[Bytes, np.ndarray]:
        """Memory for the new entries of so many bytes and one more, and a cell.

        The cell points to where entry 0 would be: only the new ones are in memory.
        """
        entries = np.full((self.end - self.first + 1, nbytes), 7, np.uint8)
        return entries, cell(entries) - nbytes * self.first

    def words(self, entries: np.ndarray, position: np.ndarray, tokens: int) -> list[int]:
        """Operands of `pool`; entries: their cell."""
        return [
            *(address(self.cells[0]), address(self.cells[1]), *self.keys.shape, self.ratio),
            *(address(self.weight), float_bits(EPS), address(self.frequencies), self.pairs),
            *(address(entries), self.n, address(position), tokens),
        ]

    def expected(self) -> Floats:
        """The new entries."""
        first, end = self.first, self.end
        out = np.empty((end - first, self.n), F32)
        compression.pool(out, self.keys, self.gates, first, self.ratio)
        elementwise.rms_norm(out, out, self.weight, F32(EPS))
        starts = (np.arange(first, end) * self.ratio).astype(F32)[:, None]
        wide = (starts * self.frequencies).astype(np.float64)
        cos, sin = np.cos(wide).astype(F32), np.sin(wide).astype(F32)
        elementwise.rotate(out[:, None, :], cos, sin, F32(1))
        return out


CASES: list[Sizes] = [
    (4, True, 128, 40, 32, 0, 19),
    (4, True, 512, 24, 32, 6, 11),
    (4, True, 32, 24, 3, 1_000_002, 10),
    (128, False, 96, 300, 8, 100, 170),
    (128, False, 512, 140, 32, 255, 1),
    (5, False, 32, 12, 16, 3, 7),
]
all_compressors = pytest.mark.parametrize(
    "sizes", CASES, ids=lambda sizes: "-".join(map(str, sizes))
)


def part_of(rows: RowFormat, part: str) -> tuple[RowForm, Entry]:
    """Return the form of keys or of rows of the indexer, and the operation that writes them."""
    return (rows.keys, rows.pool) if part == "keys" else (rows.index, rows.index_pool)
