"""Codes and scales of values in a format: the searches of all formats with one face."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from localv4.kernels.arrays import Bytes, Floats
from localv4.kernels.iquants import GRID
from quant.quantizers import (
    affine_scales,
    lattice,
    layouts,
    power_scales,
    signed_scales,
    single_scale,
)
from quant.quantizers.grids import (
    AFFINE,
    BLOCK,
    LATTICES,
    POWERS,
    SIGNED,
    SINGLE,
    SUPERBLOCK,
    AffineGrid,
    Grid,
    LatticeGrid,
    PowerGrid,
    SignedGrid,
    SingleGrid,
    UniformGrid,
)
from quant.quantizers.tiles import LANES

Codes = NDArray[np.int8]


@dataclass(frozen=True, slots=True)
class Chosen:
    """Codes (rows, cols) and what they are multiplied with.

    factors (rows, blocks or superblocks) f32; scales (rows, blocks) where blocks have whole scales;
    minima and floors the same where they have least values. errors (rows,): weighted squares.
    """

    errors: NDArray[np.float64]
    codes: Codes
    factors: Floats
    scales: Codes = field(default_factory=lambda: _codes(0, 0))
    floors: Floats = field(default_factory=lambda: _floats(0, 0))
    minima: Codes = field(default_factory=lambda: _codes(0, 0))

    def steps(self) -> Floats:
        """Return what the codes of each block are multiplied with (rows, blocks)."""
        return _products(self.factors, self.scales)

    def offsets(self) -> Floats:
        """Return what is subtracted from each block then (rows, blocks)."""
        return _products(self.floors, self.minima)

    def values(self) -> Floats:
        """Return the values (rows, cols) that decoders get, not for MXFP4."""
        blocks = self.codes.reshape(len(self.codes), self.steps().shape[1], -1)
        values = self.steps()[:, :, None] * blocks
        if self.minima.size:
            values -= self.offsets()[:, :, None]
        return values.reshape(self.codes.shape)


def _products(factors: Floats, scales: Codes) -> Floats:
    if not scales.size:
        return factors
    spread = np.repeat(factors, scales.shape[1] // factors.shape[1], axis=1)
    return spread * scales


@dataclass(frozen=True, slots=True)
class ChosenPoints:
    """Points of a lattice and what they are multiplied with.

    points, signs (rows, cols / 8) u8; scales (rows, cols / 32); factors (rows, superblocks) f32;
    errors (rows,): weighted squares.
    """

    errors: NDArray[np.float64]
    points: Bytes
    signs: Bytes
    scales: Codes
    factors: Floats

    def steps(self) -> Floats:
        """Return what the magnitudes of each block are multiplied with (rows, blocks)."""
        return _products(self.factors, 2 * self.scales + np.int8(1)) / np.float32(8)

    def values(self) -> Floats:
        """Return the values (rows, cols) that decoders get."""
        minus = np.unpackbits(self.signs, axis=1, bitorder="little")
        sizes = GRID[self.points].reshape(minus.shape) * np.repeat(self.steps(), BLOCK, axis=1)
        return np.where(minus, -sizes, sizes)


GRIDS: Mapping[str, Grid] = {**SINGLE, **SIGNED, **AFFINE, **POWERS, **LATTICES}
"""All ggml types that values can be rounded to."""

_LAYOUTS: Mapping[str, Callable[[Any], Bytes]] = {
    "Q8_0": lambda c: layouts.q8_0(c.codes, c.factors),
    "Q4_0": lambda c: layouts.q4_0(c.codes, c.factors),
    "IQ4_NL": lambda c: layouts.iq4_nl(c.codes, c.factors),
    "MXFP4": lambda c: layouts.mxfp4(c.codes, c.factors),
    "IQ2_XXS": lambda c: layouts.iq2_xxs(c.points, c.signs, c.scales, c.factors),
    "Q6_K": lambda c: layouts.q6_k(c.codes, c.scales, c.factors),
    "Q3_K": lambda c: layouts.q3_k(c.codes, c.scales, c.factors),
    "IQ4_XS": lambda c: layouts.iq4_xs(c.codes, c.scales, c.factors),
    "Q4_K": lambda c: layouts.q4_k(c.codes, c.scales, c.minima, c.factors, c.floors),
    "Q5_K": lambda c: layouts.q5_k(c.codes, c.scales, c.minima, c.factors, c.floors),
    "Q2_K": lambda c: layouts.q2_k(c.codes, c.scales, c.minima, c.factors, c.floors),
}


def blocks_of(chosen: Chosen | ChosenPoints, ggml: str) -> Bytes:
    """Return rows of blocks of a ggml type (rows, bytes of a row)."""
    return _LAYOUTS[ggml](chosen)


def choose(values: Floats, grid: UniformGrid | PowerGrid, weights: Floats) -> Chosen:
    """Search codes and scales of values (rows, cols) with column weights (cols,)."""
    if isinstance(grid, SingleGrid):
        return _choose_single(values, grid, weights)
    if isinstance(grid, SignedGrid):
        return _choose_signed(values, grid, weights)
    if isinstance(grid, AffineGrid):
        return _choose_affine(values, grid, weights)
    return _choose_powers(values, grid, weights)


def _choose_single(values: Floats, grid: SingleGrid, weights: Floats) -> Chosen:
    rows, cols = values.shape
    codes, factors, errors = _codes(rows, cols), _floats(rows, cols // BLOCK), np.zeros(rows)
    scratch = scratch_lines(single_scale.SCRATCH_LINES)
    single_scale.search_single(
        codes,
        factors,
        errors,
        values,
        weights,
        scratch,
        grid.fractions,
        grid.low,
        grid.high,
        grid.curved,
        grid.polish,
    )
    return Chosen(errors, codes, factors)


def _choose_signed(values: Floats, grid: SignedGrid, weights: Floats) -> Chosen:
    rows, cols = values.shape
    codes, scales = _codes(rows, cols), _codes(rows, cols // grid.n)
    factors, errors = _floats(rows, cols // SUPERBLOCK), np.zeros(rows)
    signed_scales.search_signed(
        codes,
        scales,
        factors,
        errors,
        values,
        weights,
        scratch_lines(signed_scales.SCRATCH_LINES),
        grid.fractions,
        grid.ranges,
        grid.n,
        grid.low,
        grid.high,
        grid.lowest,
        grid.highest,
        grid.curved,
        grid.polish,
    )
    return Chosen(errors, codes, factors, scales)


def _choose_affine(values: Floats, grid: AffineGrid, weights: Floats) -> Chosen:
    rows, cols = values.shape
    codes, scales, minima = (_codes(rows, cols // n) for n in (1, grid.n, grid.n))
    factors, floors = (_floats(rows, cols // SUPERBLOCK) for _ in range(2))
    errors = np.zeros(rows)
    affine_scales.search_affine(
        codes,
        scales,
        minima,
        factors,
        floors,
        errors,
        values,
        weights,
        scratch_lines(affine_scales.SCRATCH_LINES),
        grid.spans,
        grid.ranges,
        grid.n,
        grid.high,
        grid.highest,
        grid.polish,
    )
    return Chosen(errors, codes, factors, scales, floors, minima)


def _choose_powers(values: Floats, grid: PowerGrid, weights: Floats) -> Chosen:
    rows, cols = values.shape
    codes, factors, errors = _codes(rows, cols), _floats(rows, cols // BLOCK), np.zeros(rows)
    scratch = scratch_lines(power_scales.SCRATCH_LINES)
    power_scales.search_powers(codes, factors, errors, values, weights, scratch, grid.reach)
    return Chosen(errors, codes, factors)


def choose_points(values: Floats, grid: LatticeGrid, weights: Floats) -> ChosenPoints:
    """Search points and scales of values (rows, cols) with column weights (cols,)."""
    rows, cols = values.shape
    points, signs = (np.empty((rows, cols // lattice.GROUP), np.uint8) for _ in range(2))
    scales, factors = _codes(rows, cols // BLOCK), _floats(rows, cols // SUPERBLOCK)
    errors = np.zeros(rows)
    lattice.search_lattice(
        points,
        signs,
        scales,
        factors,
        errors,
        values,
        weights,
        lattice.norms_of(weights),
        GRID,
        scratch_lines(lattice.SCRATCH_LINES),
        grid.fractions,
        grid.ranges,
    )
    return ChosenPoints(errors, points, signs, scales, factors)


def _codes(rows: int, cols: int) -> Codes:
    return np.empty((rows, cols), np.int8)


def _floats(rows: int, cols: int) -> Floats:
    return np.empty((rows, cols), np.float32)


def scratch_lines(lines: int) -> Floats:
    """Return memory of some vectors that starts on a cache line."""
    memory = np.empty(LANES * (lines + 1), np.float32)
    start = -memory.ctypes.data % 64 // 4
    return memory[start : start + LANES * lines]
