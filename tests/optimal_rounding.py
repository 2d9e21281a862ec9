"""NumPy twins of the searches: exhaustive where those are clever, in float64, for few values.

Each takes values and weights of whole units of a type and returns the least error that dense
trials find; half-precision scales are rounded as they are stored.
"""

import numpy as np
from numpy.typing import NDArray

from localv4.kernels.iquants import GRID

Doubles = NDArray[np.float64]

IQ4 = np.array([-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113.0])
E2M1 = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6])
SINGLE = {"Q8_0": np.arange(-127, 128.0), "Q4_0": np.arange(-8, 8.0), "IQ4_NL": IQ4}
SIGNED = {
    "Q6_K": (16, np.arange(-32, 32.0), np.arange(-128, 128.0)),
    "Q3_K": (16, np.arange(-4, 4.0), np.arange(-32, 32.0)),
    "IQ4_XS": (32, IQ4, np.arange(-32, 32.0)),
}
AFFINE = {"Q4_K": (32, 15, 63), "Q5_K": (32, 31, 63), "Q2_K": (16, 3, 15)}


def half(x: Doubles) -> Doubles:
    return x.astype(np.float16).astype(np.float64)


def nearest(x: Doubles, levels: Doubles) -> Doubles:
    """Round each number to the nearest level."""
    after = np.clip(np.searchsorted(levels, x), 1, len(levels) - 1)
    below, above = levels[after - 1], levels[after]
    rounded: Doubles = np.where(x - below <= above - x, below, above)
    return rounded


def error(x: Doubles, w: Doubles, step: Doubles, levels: Doubles) -> Doubles:
    """Weighted squares over the last axis for steps that broadcast."""
    safe = np.where(step == 0, 1, step)
    rest = x - step * np.where(step == 0, 0, nearest(x / safe, levels))
    squares: Doubles = (w * rest * rest).sum(-1)
    return squares


def single(x: Doubles, w: Doubles, name: str) -> float:
    """x, w (blocks, 32)."""
    levels = SINGLE[name]
    largest = np.abs(x).max(1, keepdims=True)
    fractions = np.concatenate([np.linspace(0.6, 2, 400), -np.linspace(0.6, 2, 400)])
    steps = half(largest / (fractions * np.abs(levels).max()))
    errors = error(x[:, None, :], w[:, None, :], steps[:, :, None], levels)
    return float(errors.min(1).sum())


def signed(x: Doubles, w: Doubles, name: str) -> float:
    """x, w (256,): every whole scale for many d."""
    n, levels, scales = SIGNED[name]
    blocks, weights = x.reshape(-1, 1, n), w.reshape(-1, 1, n)
    largest = np.abs(x).max()
    best = np.inf
    for fraction in np.concatenate([np.linspace(0.7, 1.7, 50), -np.linspace(0.7, 1.7, 50)]):
        d = half(largest / (fraction * np.abs(levels).max() * np.abs(scales).max()))
        errors = error(blocks, weights, (d * scales)[None, :, None], levels)
        best = min(best, errors.min(1).sum())
    return float(best)


def affine(x: Doubles, w: Doubles, name: str) -> float:
    """x, w (256,): every pair of whole scale and least value for many d and m."""
    n, high, highest = AFFINE[name]
    blocks, weights = x.reshape(-1, 1, 1, n), w.reshape(-1, 1, 1, n)
    numbers = np.arange(highest + 1.0)
    spans = (x.reshape(-1, n).max(1) - np.minimum(x.reshape(-1, n).min(1), 0)).max()
    lows = max(0.0, -x.min())
    best = np.inf
    for fraction in np.linspace(0.75, 1.05, 7):
        for low in np.linspace(0.7, 1.05, 7):
            d = half(spans * fraction / (high * highest))
            m = half(np.float64(lows * low / highest))
            step = (d * numbers)[None, :, None, None]
            shifted = blocks + (m * numbers)[None, None, :, None]
            errors = error(shifted, weights, step, np.arange(high + 1.0))
            best = min(best, errors.reshape(len(blocks), -1).min(1).sum())
    return float(best)


def powers(x: Doubles, w: Doubles) -> float:
    """x, w (blocks, 32): all powers of two that are near."""
    levels = np.concatenate([-E2M1[:0:-1], E2M1])
    top = np.floor(np.log2(np.abs(x).max(1, keepdims=True)))
    steps = 2.0 ** (top + np.arange(-6, 4))
    return float(error(x[:, None, :], w[:, None, :], steps[:, :, None], levels).min(1).sum())


def lattice(x: Doubles, w: Doubles) -> float:
    """x, w (256,): every point and scale for many d; an odd sign is turned where it costs least."""
    groups, weights, points = np.abs(x).reshape(-1, 8), w.reshape(-1, 8), GRID.astype(np.float64)
    odd = (x.reshape(-1, 8) < 0).sum(1) % 2 == 1
    products, squares = (weights * groups) @ points.T, weights @ (points * points).T
    turning = (4 * weights * groups)[:, None, :] * points
    energy, best = (w * x * x).sum(), np.inf
    for fraction in np.linspace(0.7, 1.6, 40):
        d = half(np.abs(x).max() / (43 * 31 / 8 * fraction))
        steps = d * (2 * np.arange(16.0) + 1) / 8
        cost = np.where(odd[:, None], turning.min(2), 0)[:, None] * steps[:, None]
        errors = (
            cost - 2 * steps[:, None] * products[:, None] + steps[:, None] ** 2 * squares[:, None]
        )
        best = min(best, errors.min(2).reshape(-1, 4, 16).sum(1).min(1).sum())
    return float(energy + best)
