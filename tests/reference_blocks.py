"""NumPy twins of the block decoders, written from the format descriptions for clarity, not speed.

Each twin takes blocks (n, block_bytes) u8 and returns values (n, block) f32.
"""

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

Bytes = NDArray[np.uint8]
Floats = NDArray[np.float32]

E2M1 = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6], np.float32)
IQ4 = np.array(
    [-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113], np.float32
)
# Where the f16 numbers of a block are.
HALVES = {
    **dict.fromkeys(("Q8_0", "Q4_0", "IQ4_NL", "IQ4_XS", "IQ2_XXS"), (0,)),
    **dict.fromkeys(("Q4_K", "Q5_K"), (0, 2)),
    **{"Q6_K": (208,), "Q3_K": (108,), "Q2_K": (80, 82), "MXFP4": ()},
}


def e8m0(codes: Bytes) -> Floats:
    """2^(code - 127), exact down to the subnormal of code 0; 255 is NaN."""
    powers = np.ldexp(np.float64(1), codes.astype(int) - 127)
    return np.where(codes == 255, np.nan, powers).astype(np.float32)


def e4m3(codes: Bytes) -> Floats:
    """FP8 with four exponent bits (bias 7), three mantissa bits, and NaN instead of 480."""
    exponent, mantissa = (codes >> 3 & 15).astype(int), (codes & 7).astype(int)
    normal = np.ldexp(8.0 + mantissa, exponent - 10)
    magnitude = np.where(exponent == 0, np.ldexp(1.0 * mantissa, -9), normal)
    magnitude = np.where(codes & 127 == 127, np.nan, magnitude)
    return np.copysign(magnitude, np.where(codes & 128, -1.0, 1.0)).astype(np.float32)


def f8(codes: Bytes, scale: Bytes) -> Floats:
    """codes (rows, cols); scale (ceil(rows / 128), ceil(cols / 128)) -> (rows, cols)."""
    rows, cols = codes.shape
    spread = np.repeat(np.repeat(e8m0(scale), 128, axis=0), 128, axis=1)
    values: Floats = e4m3(codes) * spread[:rows, :cols]
    return values


def fp4(packed: Bytes, scale: Bytes) -> Floats:
    """packed (rows, cols / 2), low nibble first; scale (rows, ceil(cols / 32)) -> (rows, cols)."""
    codes = np.stack([packed & 15, packed >> 4], axis=-1).reshape(packed.shape[0], -1)
    signed = np.where(codes & 8, -E2M1[codes & 7], E2M1[codes & 7])
    # Through float64: half of the smallest scale is no normal float32, the product is exact.
    product = signed.astype(np.float64) * np.repeat(e8m0(scale), 32, axis=1)[:, : codes.shape[1]]
    values: Floats = product.astype(np.float32)
    return values


def half(blocks: Bytes, at: int) -> Floats:
    """The f16 at byte `at` of each block -> (n, 1)."""
    return np.ascontiguousarray(blocks[:, at : at + 2]).view("<f2").astype(np.float32)


def nibbles(packed: Bytes) -> NDArray[np.int64]:
    """(n, 16) bytes -> (n, 32) codes: all low nibbles, then all high ones."""
    return np.concatenate([packed & 15, packed >> 4], axis=1).astype(int)


def q8_0(blocks: Bytes) -> Floats:
    return half(blocks, 0) * blocks[:, 2:].view(np.int8).astype(np.float32)


def q4_0(blocks: Bytes) -> Floats:
    return half(blocks, 0) * (nibbles(blocks[:, 2:]) - 8).astype(np.float32)


def iq4_nl(blocks: Bytes) -> Floats:
    values: Floats = half(blocks, 0) * IQ4[nibbles(blocks[:, 2:])]
    return values


def mxfp4(blocks: Bytes) -> Floats:
    codes = nibbles(blocks[:, 1:])
    # Whole numbers, so that code 8 is zero without a sign.
    doubled = np.where(codes & 8, -1, 1) * (2 * E2M1[codes & 7]).astype(int)
    power = np.ldexp(np.float64(1), blocks[:, :1].astype(int) - 128)
    values: Floats = (doubled * power).astype(np.float32)
    return values


def scales_and_minima(packed: Bytes) -> tuple[Floats, Floats]:
    """(n, 12) bytes -> scales and minima of eight groups, (n, 8) each, six bits a number."""
    first, second, last = packed[:, :4], packed[:, 4:8], packed[:, 8:]
    scales = np.concatenate([first & 63, last & 15 | first >> 6 << 4], axis=1)
    minima = np.concatenate([second & 63, last >> 4 | second >> 6 << 4], axis=1)
    return scales.astype(np.float32), minima.astype(np.float32)


def affine(blocks: Bytes, codes: NDArray[np.int64]) -> Floats:
    """Q4_K and Q5_K: codes (n, 8, 32) with a scale and a minimum for each group of 32."""
    scales, minima = scales_and_minima(blocks[:, 4:16])
    step, offset = half(blocks, 0) * scales, half(blocks, 2) * minima
    values: Floats = step[:, :, None] * codes.astype(np.float32) - offset[:, :, None]
    return values.reshape(len(blocks), 256)


def groups_of_nibbles(packed: Bytes) -> NDArray[np.int64]:
    """(n, 128) bytes -> (n, 8, 32): each run of 32 bytes holds two groups."""
    runs = packed.reshape(-1, 4, 1, 32)
    codes = np.concatenate([runs & 15, runs >> 4], axis=2)
    return codes.reshape(-1, 8, 32).astype(int)


def q4_k(blocks: Bytes) -> Floats:
    return affine(blocks, groups_of_nibbles(blocks[:, 16:]))


def q5_k(blocks: Bytes) -> Floats:
    fifth = blocks[:, 16:48].reshape(-1, 1, 32) >> np.arange(8, dtype=np.uint8)[:, None] & 1
    return affine(blocks, groups_of_nibbles(blocks[:, 48:]) + 16 * fifth.astype(int))


def quarters(packed: Bytes) -> NDArray[np.int64]:
    """(n, 64) bytes -> (n, 256) 2-bit codes: 32 bytes hold four runs of 32 codes."""
    shifts = np.array([0, 2, 4, 6], np.uint8)[:, None]
    return (packed.reshape(-1, 2, 1, 32) >> shifts & 3).reshape(-1, 256).astype(int)


def q6_k(blocks: Bytes) -> Floats:
    low = blocks[:, :128].reshape(-1, 2, 1, 64)
    lower = np.concatenate([low & 15, low >> 4], axis=2).reshape(-1, 256).astype(int)
    codes = lower + 16 * quarters(blocks[:, 128:192]) - 32
    step = half(blocks, 208) * blocks[:, 192:208].view(np.int8).astype(np.float32)
    return np.repeat(step, 16, axis=1) * codes.astype(np.float32)


def q2_k(blocks: Bytes) -> Floats:
    step = half(blocks, 80) * (blocks[:, :16] & 15).astype(np.float32)
    offset = half(blocks, 82) * (blocks[:, :16] >> 4).astype(np.float32)
    codes = quarters(blocks[:, 16:80]).astype(np.float32)
    return np.repeat(step, 16, axis=1) * codes - np.repeat(offset, 16, axis=1)


def q3_k(blocks: Bytes) -> Floats:
    third = blocks[:, :32].reshape(-1, 1, 32) >> np.arange(8, dtype=np.uint8)[:, None] & 1
    codes = quarters(blocks[:, 32:96]) + 4 * third.reshape(-1, 256).astype(int) - 4
    low, high = blocks[:, 96:104], blocks[:, 104:108]
    low4 = np.concatenate([low & 15, low >> 4], axis=1)
    high2 = np.concatenate([high >> shift & 3 for shift in (0, 2, 4, 6)], axis=1)
    step = half(blocks, 108) * ((low4 + 16 * high2).astype(int) - 32).astype(np.float32)
    values: Floats = np.repeat(step, 16, axis=1) * codes.astype(np.float32)
    return values


def iq4_xs(blocks: Bytes) -> Floats:
    low = np.stack([blocks[:, 4:8] & 15, blocks[:, 4:8] >> 4], axis=2).reshape(-1, 8)
    word = np.ascontiguousarray(blocks[:, 2:4]).view("<u2").astype(int)
    high = word >> np.arange(0, 16, 2) & 3
    step = half(blocks, 0) * (low.astype(int) + 16 * high - 32).astype(np.float32)
    codes = nibbles(blocks[:, 8:].reshape(-1, 16)).reshape(-1, 8, 32)
    values: Floats = step[:, :, None] * IQ4[codes]
    return values.reshape(-1, 256)


def iq2_xxs(blocks: Bytes, grid: Floats) -> Floats:
    """`grid` (256, 8) holds the magnitudes of the lattice points."""
    groups = blocks[:, 2:].reshape(-1, 8, 8)
    word = np.ascontiguousarray(groups[:, :, 4:]).view("<u4").astype(int)  # (n, 8, 1)
    step = half(blocks, 0) * (np.float32(0.5) + (word[:, :, 0] >> 28).astype(np.float32))
    pattern = word >> np.array([0, 7, 14, 21]) & 127  # (n, 8, 4)
    bits = pattern[..., None] >> np.arange(7) & 1
    bits = np.concatenate([bits, bits.sum(axis=-1, keepdims=True) % 2], axis=-1)
    points = grid[groups[:, :, :4]]  # (n, 8, 4, 8)
    scaled = (step * np.float32(0.25))[:, :, None, None] * points
    values: Floats = np.where(bits == 1, -scaled, scaled)
    return values.reshape(-1, 256)


TWINS: dict[str, Callable[[Bytes], Floats]] = {
    "Q8_0": q8_0,
    "Q4_0": q4_0,
    "IQ4_NL": iq4_nl,
    "MXFP4": mxfp4,
    "Q4_K": q4_k,
    "Q5_K": q5_k,
    "Q6_K": q6_k,
    "Q2_K": q2_k,
    "Q3_K": q3_k,
    "IQ4_XS": iq4_xs,
}


def random_blocks(rng: np.random.Generator, name: str, count: int, size: int) -> Bytes:
    """`count` blocks of `size` random bytes whose f16 numbers are finite (subnormals included)."""
    blocks = rng.integers(0, 256, (count, size), dtype=np.uint8)
    for at in HALVES[name]:
        blocks[:, at + 1] &= np.where(blocks[:, at + 1] & 0x7C == 0x7C, 0xBF, 0xFF).astype(np.uint8)
    return blocks
