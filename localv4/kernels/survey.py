"""What a sampler asks of the logits of a whole vocabulary, block by block of tokens.

One pass over half a megabyte says of each block how likely its best token is and what the block
weighs, so that a sampler has to look into few of them.
"""

import numpy as np
from numba import config

from localv4.kernels.activations import exp
from localv4.kernels.arrays import Floats
from localv4.kernels.compiler import kernel
from localv4.kernels.simd import (
    add,
    at_least,
    highest_f32,
    highest_i32,
    largest_i32,
    load_f32,
    magnitudes,
    multiply,
    splat_f32,
    sum_f32,
    write_f32,
    zeros_f32,
)

BLOCK = 256
"""Tokens of a block."""

ERROR = 5e-6
"""Bound of the relative error of a block's sum, for temperatures within TEMPERATURES.

The difference to the peak, the factor and their product are rounded: 1.8e-7 of an exponent whose
size is log(256) at most on average; exp is within 2.4e-7 and each of 20 additions within 6e-8.
"""

TEMPERATURES = (0.01, 100.0)

_INFINITY = np.int32(0x7F800000)


@kernel("void(i8, i8, i8, i8, f4)")
def _survey(logits: int, blocks: int, peaks: int, sums: int, scale: np.float32) -> None:
    """Fill peaks and sums (blocks,) f32 from logits (blocks, BLOCK) f32; no sums for scale 0."""
    for i in range(blocks):
        first = logits + 4 * BLOCK * i
        highest, sizes = load_f32(first), magnitudes(load_f32(first))
        for at in range(first + 64, first + 4 * BLOCK, 64):
            highest = at_least(load_f32(at), highest)
            sizes = largest_i32(magnitudes(load_f32(at)), sizes)
        # a comparison loses NaN, whose bits are above those of infinity
        peak = highest_f32(highest) if highest_i32(sizes) <= _INFINITY else np.float32(np.nan)
        write_f32(peaks + 4 * i, peak)
        if scale > 0:
            offset, factor = splat_f32(-peak), splat_f32(scale)
            a, b = zeros_f32(), zeros_f32()
            for at in range(first, first + 4 * BLOCK, 128):
                a = add(a, exp(multiply(add(load_f32(at), offset), factor)))
                b = add(b, exp(multiply(add(load_f32(at + 64), offset), factor)))
            write_f32(sums + 4 * i, sum_f32(add(a, b)))


def survey(logits: Floats, temperature: float | None = None) -> tuple[Floats, Floats]:
    """Return of each row of logits (blocks, BLOCK) its highest, and the sum of its weights.

    A row with NaN has a NaN. The weight of a token is exp((logit - highest) / temperature); without
    a temperature, and where the highest is not finite, sums mean nothing.
    """
    scale = np.float32(0 if temperature is None else 1 / temperature)
    if config.DISABLE_JIT:
        peaks = logits.max(axis=1)
        with np.errstate(invalid="ignore"):
            return peaks, np.exp((logits - peaks[:, None]) * scale).sum(axis=1)
    peaks, sums = np.empty(len(logits), np.float32), np.empty(len(logits), np.float32)
    assert logits.flags.c_contiguous
    _survey(logits.ctypes.data, len(logits), peaks.ctypes.data, sums.ctypes.data, scale)
    return peaks, sums
