"""What each format can hold and how wide its search is.

Fractions, spans and ranges are the starting points that the searches try in turn (`scales`,
`lines`, `signed_scales`, `affine_scales`). They were chosen by measuring on Gaussian and
heavy-tailed weights: several times as many points make the error smaller by one percent at most.
The first point of each is the scale that maps the largest value to the last code, which is all that
plain rounding has.
"""

from dataclasses import dataclass, replace

import numpy as np

from localv4.kernels.arrays import Floats

BLOCK = 32
SUPERBLOCK = 256
LARGEST_HALF = 65504.0


@dataclass(frozen=True, slots=True)
class SingleGrid:
    """Blocks with one half-precision scale: codes low ... high."""

    low: int
    high: int
    fractions: Floats
    polish: int
    curved: bool = False

    @property
    def columns(self) -> int:
        """Columns of a unit: rows have whole units."""
        return BLOCK

    @property
    def largest(self) -> float:
        """The largest magnitude that the format holds."""
        return LARGEST_HALF * self.high


@dataclass(frozen=True, slots=True)
class SignedGrid:
    """Blocks of n columns with whole scales lowest ... highest: codes low ... high."""

    n: int
    low: int
    high: int
    lowest: int
    highest: int
    fractions: Floats
    ranges: Floats
    polish: int
    curved: bool = False

    @property
    def columns(self) -> int:
        """Columns of a unit: rows have whole units."""
        return SUPERBLOCK

    @property
    def largest(self) -> float:
        """The largest magnitude that the format holds."""
        return LARGEST_HALF * self.high * self.highest


@dataclass(frozen=True, slots=True)
class AffineGrid:
    """Blocks of n columns with scales and minima 0 ... highest: codes 0 ... high."""

    n: int
    high: int
    highest: int
    spans: Floats
    ranges: Floats
    polish: int

    @property
    def columns(self) -> int:
        """Columns of a unit: rows have whole units."""
        return SUPERBLOCK

    @property
    def largest(self) -> float:
        """The largest magnitude that the format holds on both sides: a minimum has no codes."""
        return LARGEST_HALF * self.highest


@dataclass(frozen=True, slots=True)
class PowerGrid:
    """E2M1 with powers of two: how far from the usual one others are tried."""

    reach: int

    @property
    def columns(self) -> int:
        """Columns of a unit: rows have whole units."""
        return BLOCK

    @property
    def largest(self) -> float:
        """The largest magnitude: that of float32."""
        return float(np.finfo(np.float32).max)


@dataclass(frozen=True, slots=True)
class LatticeGrid:
    """Points of a lattice for eight columns at a time."""

    fractions: Floats
    ranges: Floats

    @property
    def columns(self) -> int:
        """Columns of a unit: rows have whole units."""
        return SUPERBLOCK

    @property
    def largest(self) -> float:
        """The largest magnitude that the format holds."""
        return LARGEST_HALF * 31 / 8 * 43


UniformGrid = SingleGrid | SignedGrid | AffineGrid
Grid = UniformGrid | PowerGrid | LatticeGrid


def _points(*values: float) -> Floats:
    return np.array(values, np.float32)


def _between(plain: float, *spans: tuple[float, float, int]) -> Floats:
    """Return the usual point and then evenly spaced ones."""
    parts = [np.linspace(low, high, count) for low, high, count in spans]
    return np.concatenate([[plain], *parts]).astype(np.float32)


def _pairs(*values: float) -> Floats:
    return np.array([(a, b) for a in values for b in values], np.float32)


_IQ4_FRACTIONS = _between(-127, (-190, -105, 10), (90, 170, 9))

SINGLE = {
    "Q8_0": SingleGrid(-127, 127, _between(127, (105, 127.4, 23)), 0),
    "Q4_0": SingleGrid(-8, 7, _between(-8, (-10.5, -6.8, 10), (6.1, 9.5, 10)), 2),
    "IQ4_NL": SingleGrid(-127, 113, _IQ4_FRACTIONS, 2, curved=True),
}
SIGNED = {
    "Q6_K": SignedGrid(
        n=16,
        low=-32,
        high=31,
        lowest=-128,
        highest=127,
        fractions=_between(-32, (-34, -24, 14), (24, 33, 13)),
        ranges=_points(-128, 127, -120),
        polish=2,
    ),
    "Q3_K": SignedGrid(
        n=16,
        low=-4,
        high=3,
        lowest=-32,
        highest=31,
        fractions=_between(-4, (-7, -3.2, 13), (2.4, 6, 13)),
        ranges=_points(-32, 31, -30),
        polish=3,
    ),
    "IQ4_XS": SignedGrid(
        n=32,
        low=-127,
        high=113,
        lowest=-32,
        highest=31,
        fractions=_IQ4_FRACTIONS,
        ranges=_points(-32, -30, 31),
        polish=2,
        curved=True,
    ),
}
AFFINE = {
    "Q4_K": AffineGrid(32, 15, 63, _pairs(1, 1.08, 1.04, 0.96, 0.92, 0.88, 0.84), _pairs(63), 3),
    "Q5_K": AffineGrid(32, 31, 63, _pairs(1, 1.03, 1.015, 0.985, 0.96, 0.93), _pairs(63), 3),
    "Q2_K": AffineGrid(16, 3, 15, _pairs(1, 0.85, 0.7, 0.55, 0.4), _pairs(15, 13.5, 12), 3),
}
POWERS = {"MXFP4": PowerGrid(1)}
LATTICES = {
    "IQ2_XXS": LatticeGrid(_between(1, (0.9, 1.7, 6), (8 / 43, 8 / 43, 1)), _points(31, 28))
}


def plain(grid: Grid) -> Grid:
    """Return the same format without a search: the first point alone, and no polish."""
    if isinstance(grid, SingleGrid):
        return replace(grid, fractions=grid.fractions[:1], polish=0)
    if isinstance(grid, SignedGrid):
        return replace(grid, fractions=grid.fractions[:1], ranges=grid.ranges[:1], polish=0)
    if isinstance(grid, AffineGrid):
        return replace(grid, spans=grid.spans[:1], ranges=grid.ranges[:1], polish=0)
    if isinstance(grid, LatticeGrid):
        return LatticeGrid(grid.fractions[:1], grid.ranges[:1])
    return PowerGrid(0)
