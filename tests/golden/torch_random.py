"""The random numbers of torch's CPU generator, to the bit, from NumPy alone.

Thanks to this the fixtures need no stored weights: a seed gives the same float32 values here and in
torch. Long arrays need only additions, multiplications and square roots, which IEEE 754 rounds the
same way on every machine; short ones go through float64, where a last bit does not matter.

Sources: ATen/core/DistributionsHelper.h, ATen/native/cpu/{DistributionTemplates,avx_mathfun}.h.
"""

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float32]

TWO_PI = np.float32(6.283185307179586)
LOG_COEFFICIENTS = (
    *(-1.1514610310e-1, 1.1676998740e-1, -1.2420140846e-1, 1.4249322787e-1),
    *(-1.6668057665e-1, 2.0000714765e-1, -2.4999993993e-1, 3.3333331174e-1),
)
# pi / 4 in three parts, so that multiples of it are subtracted without loss.
QUARTER_PI = (-0.78515625, -2.4187564849853515625e-4, -3.77489497744594108e-8)


class TorchRandom:
    """`torch.Generator().manual_seed(seed)` and what the fixtures draw from it."""

    def __init__(self, seed: int) -> None:
        self._state = np.random.RandomState(seed)
        self._spare: float | None = None

    def uniform(self, count: int) -> Floats:
        """`torch.rand`: multiples of 2^-24 in [0, 1)."""
        return (self._words(count) & np.uint32(0xFFFFFF)).astype(np.float32) * np.float32(2.0**-24)

    def normal(self, count: int) -> Floats:
        """`torch.randn`: whole blocks of 16; a remainder redraws the last 16 values."""
        if count < 16:
            return np.array([self._double_normal() for _ in range(count)], np.float32)
        uniform = self.uniform(count)
        whole = count - count % 16
        values = np.concatenate([box_muller(uniform[:whole]), np.empty(count % 16, np.float32)])
        if count % 16:
            values[-16:] = box_muller(self.uniform(16))
        return values

    def integers(self, bound: int, count: int) -> NDArray[np.int64]:
        """`torch.randint(0, bound)`."""
        return (self._words(count) % np.uint32(bound)).astype(np.int64)

    def permutations(self, rows: int, count: int) -> NDArray[np.int64]:
        """`torch.randperm(count)`, `rows` times -> (rows, count)."""
        words = self._words(rows * (count - 1)).reshape(rows, count - 1)
        order = np.tile(np.arange(count), (rows, 1))
        row = np.arange(rows)
        for i in range(count - 1):
            other = i + (words[:, i] % np.uint32(count - i)).astype(np.int64)
            taken = order[row, other]
            order[row, other] = order[:, i]
            order[:, i] = taken
        return order

    def _words(self, count: int) -> NDArray[np.uint32]:
        return self._state.randint(0, 1 << 32, size=count, dtype=np.uint32)

    def _double_normal(self) -> float:
        """One normal number in double precision; every second one was made with its predecessor."""
        if self._spare is not None:
            value, self._spare = self._spare, None
            return value
        high_1, low_1, high_2, low_2 = (int(word) for word in self._words(4))
        mask = (1 << 53) - 1
        first = ((high_1 << 32 | low_1) & mask) * 2.0**-53
        second = ((high_2 << 32 | low_2) & mask) * 2.0**-53
        radius = np.sqrt(-2 * np.log1p(-second))
        self._spare = float(radius * np.sin(2 * np.pi * first))
        return float(radius * np.cos(2 * np.pi * first))


def box_muller(uniform: Floats) -> Floats:
    """Normal numbers from uniform ones: in each block of 16, j and j + 8 make a pair."""
    # In slices that fit the cache: each step below is a pass over memory.
    slices = [_box_muller(uniform[at : at + 8192]) for at in range(0, uniform.size, 8192)]
    return np.concatenate(slices)


def _box_muller(uniform: Floats) -> Floats:
    pairs = uniform.reshape(-1, 2, 8)
    radius = np.sqrt(np.float32(-2) * _log(np.float32(1) - pairs[:, 0]))
    sine, cosine = _sine_and_cosine(TWO_PI * pairs[:, 1])
    return np.stack([radius * cosine, radius * sine], axis=1).reshape(-1)


def _fused(a: Floats, b: Floats | float, c: Floats | float) -> Floats:
    """a * b + c rounded once."""
    wide = a.astype(np.float64) * np.asarray(b, np.float32) + np.asarray(c, np.float32)
    return wide.astype(np.float32)


def _log(x: Floats) -> Floats:
    bits = x.view(np.uint32)
    exponent = (bits >> np.uint32(23)).astype(np.float32) - np.float32(126)
    fraction = (bits & np.uint32(0x007FFFFF) | np.uint32(0x3F000000)).view(np.float32)
    small = fraction < np.float32(0.707106781186547524)
    exponent = exponent - small.astype(np.float32)
    x = np.where(small, fraction - np.float32(1) + fraction, fraction - np.float32(1))
    square = x * x
    y = np.full_like(x, 7.0376836292e-2)
    for coefficient in LOG_COEFFICIENTS:
        y = _fused(y, x, coefficient)
    y = _fused(y * x, square, exponent * np.float32(-2.12194440e-4))
    y = _fused(-square, 0.5, y)
    return _fused(exponent, 0.693359375, x + y)


def _sine_and_cosine(x: Floats) -> tuple[Floats, Floats]:
    octant = (x * np.float32(1.27323954473516)).astype(np.int32) + 1 & ~1
    for part in QUARTER_PI:
        x = _fused(octant.astype(np.float32), part, x)
    square = x * x
    y = _fused(np.full_like(x, 2.443315711809948e-5), square, -1.388731625493765e-3)
    y = _fused(y, square, 4.166664568298827e-2) * square
    y = _fused(y, square, square * np.float32(-0.5)) + np.float32(1)
    z = _fused(np.full_like(x, -1.9515295891e-4), square, 8.3321608736e-3)
    z = _fused(z, square, -1.6666654611e-1) * square
    z = _fused(z, x, x)
    straight = octant & 2 == 0
    sine, cosine = np.where(straight, z, y), np.where(straight, y, z)
    return np.where(octant & 4, -sine, sine), np.where(octant - 2 & 4, cosine, -cosine)
