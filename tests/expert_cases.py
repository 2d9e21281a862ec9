"""Packed experts and the tokens that come to each, as products of many tokens take them."""

from dataclasses import dataclass

import numpy as np
from cuda_products import random_packed
from numpy.typing import NDArray
from reference_packed import address, aligned

from localv4.kernels import packed
from localv4.kernels.formats import OPERATIONS, Operations
from localv4.kernels.packed import PackedFormat


@dataclass
class Experts:
    """Experts of some tokens each, those of none absent; the slots of tokens begin at `first`."""

    fmt: PackedFormat
    hidden: int
    inner: int
    counts: tuple[int, ...]
    first: int = 0

    def __post_init__(self) -> None:
        shapes = ((2 * self.inner, self.hidden), (self.hidden, self.inner))
        self.packed = [
            aligned(np.concatenate([random_packed(seed, self.fmt, *shape) for shape in shapes]))
            for seed in range(len(self.counts))
        ]
        self.records = np.array([address(expert) for expert in self.packed])
        self.records[np.array(self.counts) == 0] = 0
        self.starts = np.cumsum([self.first, *self.counts])
        self.slots = int(self.starts[-1])

    @property
    def operations(self) -> Operations:
        """Those of the format."""
        return OPERATIONS[self.fmt.name]

    @property
    def words(self) -> tuple[int, int, int]:
        """The operands that name the experts and their slots."""
        return address(self.records), len(self.counts), address(self.starts)

    @property
    def down(self) -> int:
        """Where the second matrix is in a record."""
        return packed.down_offset(self.fmt, self.hidden, self.inner)

    def of_each_token(self) -> NDArray[np.int64]:
        """The record of the expert of each token."""
        return np.repeat(self.records, self.counts)
