"""Rotation angles by position, in the float32 arithmetic of the reference."""

import math

import numpy as np

from localv4.model.config import ModelConfig, Yarn
from localv4.model.matrix import F32, Floats


class Rotary:
    """cos and sin tables for one base; rows are tokens, columns the pairs of channels."""

    def __init__(self, theta: float, dim: int, yarn: Yarn | None) -> None:
        self.frequencies = frequencies(theta, dim, yarn)

    def angles(
        self, positions: np.ndarray[tuple[int], np.dtype[np.int64]]
    ) -> tuple[Floats, Floats]:
        """Return (cos, sin), each (len(positions), dim / 2) float32.

        position * frequency is rounded to float32 as the reference does, which matters near 1M.
        """
        angle = positions.astype(F32)[:, None] * self.frequencies
        wide = angle.astype(np.float64)
        return np.cos(wide).astype(F32), np.sin(wide).astype(F32)


def main_rotary(config: ModelConfig) -> Rotary:
    """Return the rotation of sliding-window layers."""
    return Rotary(config.rope_theta, config.rope_dim, None)


def compress_rotary(config: ModelConfig) -> Rotary:
    """Return the rotation of every layer with compressed entries, its raw window included."""
    return Rotary(config.compress_rope_theta, config.rope_dim, config.yarn)


def frequencies(theta: float, dim: int, yarn: Yarn | None) -> Floats:
    """Return theta^(-2i/dim) for each pair, with YaRN's blend of slow pairs towards 1/factor.

    Source: architecture of the release; no magnitude factor is applied anywhere.
    """
    exponents = np.arange(0, dim, 2, dtype=F32) / F32(dim)
    powers = np.power(F32(theta), exponents)
    plain: Floats = F32(1) / powers
    if yarn is None:
        return plain
    low, high = _ramp_edges(theta, dim, yarn)
    ramp = np.clip((np.arange(dim // 2, dtype=F32) - F32(low)) / F32(high - low), 0, 1).astype(F32)
    slow: Floats = F32(1) / (F32(yarn.factor) * powers)
    blended: Floats = slow * ramp + plain * (F32(1) - ramp)
    return blended


def _ramp_edges(theta: float, dim: int, yarn: Yarn) -> tuple[float, float]:
    """Return the pairs between which the blend runs; slower pairs are fully interpolated."""

    def pair(rotations: float) -> float:
        return dim * math.log(yarn.original / (rotations * 2 * math.pi)) / (2 * math.log(theta))

    low = max(math.floor(pair(yarn.beta_fast)), 0)
    high: float = min(math.ceil(pair(yarn.beta_slow)), dim - 1)
    if high == low:
        high += 0.001
    return low, high
