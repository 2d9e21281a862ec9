"""Random numbers of a sane size in every type of block, as fast as memory gives them."""

import math
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Bytes = NDArray[np.uint8]
Floats = NDArray[np.float32]
F32 = np.float32

POOL_BYTES = 1 << 26
PART_BYTES = 1 << 23
POOL_EXPERTS = 8
"""Different experts (in packed form: of each kind of layer); layers and experts repeat them."""

STD_E2M1 = 2.926  # of the 16 codes of FP4, each as likely as the others
STD_E4M3 = 1.159  # of the codes with the exponents 6 and 7
STD_TWO_BINADES = 2.415  # of numbers whose mantissa and last bit of the exponent are random
STD_INT4 = 4.61
STD_INT8 = 73.9
# of the numbers of a superblock whose outer scale is one, by their random codes and inner scales
STD_Q4K = 244.0
STD_Q6 = 895.0
STD_Q3 = 43.3
STD_Q2 = 14.0
STD_IQ2 = 54.2


class Noise:
    """Random bytes: pieces of one pool from random places on, so that they cost only a copy."""

    def __init__(self, seed: int) -> None:
        self.seed = seed
        words = np.random.Generator(np.random.SFC64(seed)).integers(
            0, 1 << 64, POOL_BYTES // 8, dtype=np.uint64
        )
        self._pool = words.view(np.uint8)

    def generator(self, name: str) -> np.random.Generator:
        """Return the generator of a tensor: what it gives depends on seed and name alone."""
        return np.random.Generator(np.random.SFC64([self.seed, zlib.crc32(name.encode())]))

    def take(self, rng: np.random.Generator, count: int) -> Bytes:
        """Return `count` bytes, at most half the pool, as a copy."""
        start = int(rng.integers(0, (POOL_BYTES - count) // 64)) * 64
        return self._pool[start : start + count].copy()


@dataclass(frozen=True, slots=True)
class BlockType:
    """A type of `values` numbers in `nbytes`; `finish` turns random bytes into legal blocks."""

    values: int
    nbytes: int
    finish: Callable[[Bytes, float], None]
    """Called with blocks (count, nbytes), to be changed in place, and the spread to give them."""


def block_parts(
    kind: BlockType, noise: Noise, rng: np.random.Generator, count: int, std: float
) -> Iterator[Bytes]:
    """Yield the bytes of `count` numbers with about this standard deviation."""
    left, most = count // kind.values, max(1, PART_BYTES // kind.nbytes)
    while left:
        now = min(left, most)
        blocks = noise.take(rng, now * kind.nbytes).reshape(now, kind.nbytes)
        kind.finish(blocks, std)
        yield blocks.reshape(-1)
        left -= now


def _mx4(blocks: Bytes, std: float) -> None:
    """Scales first: a line of UE8M0 codes, the upper of two in half of the places."""
    low = exponent_code(std / STD_E2M1)
    blocks[:, :64] = low + (blocks[:, :64] & 1)


def _half_scales(lines: Bytes, value: float) -> None:
    """Write f16 numbers between 0.75 and 1.25 of `value` over random bytes (count, even)."""
    factor = F32(0.75) + lines[:, ::2].astype(F32) * F32(0.5 / 256)
    lines[...] = (factor * F32(value)).astype("<f2").view(np.uint8).reshape(lines.shape)


def _q4(blocks: Bytes, std: float) -> None:
    _half_scales(blocks[:, :64], std / STD_INT4)


def _q8(blocks: Bytes, std: float) -> None:
    _half_scales(blocks[:, :64], std / STD_INT8)


def _whole_scales(blocks: Bytes, value: float) -> None:
    """Write f32 numbers between 0.75 and 1.25 of `value` over the first line of a superblock."""
    factor = F32(0.75) + blocks[:, 0:64:4].astype(F32) * F32(0.5 / 256)
    blocks[:, :64] = (factor * F32(value)).view(np.uint8).reshape(-1, 64)


def _with_least(blocks: Bytes, value: float, mean_code: float) -> None:
    """Write f16 scales, and behind them those of the least values, which make the mean zero."""
    _half_scales(blocks[:, :32], value)
    scales = blocks[:, :32].copy().view("<f2").astype(F32)
    blocks[:, 32:64] = (scales * F32(mean_code)).astype("<f2").view(np.uint8)


def _q4k(blocks: Bytes, std: float) -> None:
    """Scales and least values of six bits are 32 ... 63: their highest bits are set."""
    _with_least(blocks, std / STD_Q4K, 7.5)
    blocks[:, 64:192] |= 0x20
    blocks[:, 192:256] |= 0x88


def _q6(blocks: Bytes, std: float) -> None:
    """Scales are 32 ... 63."""
    _whole_scales(blocks, std / STD_Q6)
    blocks[:, 64:320] = 32 | (blocks[:, 64:320] & 31)


def _q3(blocks: Bytes, std: float) -> None:
    _whole_scales(blocks, std / STD_Q3)


def _q2(blocks: Bytes, std: float) -> None:
    """Scales and least values of four bits are 8 ... 15."""
    _with_least(blocks, std / STD_Q2, 1.5)
    blocks[:, 64:320] |= 0x88


def _iq2(blocks: Bytes, std: float) -> None:
    _whole_scales(blocks, std / STD_IQ2)


def _e4m3(blocks: Bytes, std: float) -> None:
    """Sign, mantissa and the last bit of the exponent stay random; the scales make the size."""
    blocks &= 0x8F
    blocks |= 0x30


def _two_binades(bits: NDArray[np.uint16] | NDArray[np.uint32], mantissa: int, std: float) -> None:
    """Keep sign, mantissa and one bit of the exponent of BF16 or F32 numbers."""
    exponent = 127 + int(np.floor(np.log2(std / STD_TWO_BINADES) + 0.5))
    bits &= bits.dtype.type(1 << (mantissa + 8) | (2 << mantissa) - 1)
    bits += bits.dtype.type(exponent << mantissa)


def _bf16(blocks: Bytes, std: float) -> None:
    _two_binades(blocks.view(np.uint16), 7, std)


def _f32(blocks: Bytes, std: float) -> None:
    _two_binades(blocks.view(np.uint32), 23, std)


def exponent_code(scale: float) -> int:
    """Return the UE8M0 code of the power of two at or below `scale`."""
    return 127 + int(np.floor(np.log2(scale)))


PACKED_BLOCKS = {
    "MX4": BlockType(2048, 1088, _mx4),
    "Q4": BlockType(1024, 576, _q4),
    "Q8": BlockType(1024, 1088, _q8),
    "Q4K": BlockType(4096, 36 * 64, _q4k),
    "Q6": BlockType(4096, 53 * 64, _q6),
    "Q3": BlockType(4096, 28 * 64, _q3),
    "Q2": BlockType(4096, 21 * 64, _q2),
    "IQ2": BlockType(4096, 17 * 64, _iq2),
    "F8": BlockType(16, 16, _e4m3),
    "B16": BlockType(16, 32, _bf16),
    "F32R": BlockType(16, 64, _f32),
}
"""By the name of the packed format; a block is a superblock of sixteen rows."""

GROUP_ROWS = 16
INTEGER_FORMATS = ("MX4", "Q4", "Q8", "Q4K", "Q6", "Q3", "Q2", "IQ2")
"""Formats that experts are packed into."""
FLOAT_FORMATS = ("B16", "F32R")
"""Formats whose last group of rows may be filled up."""
COLUMNS_UNITS = {"F8": 128, "B16": 16, "F32R": 16}
"""What the number of columns is a multiple of, where that is no superblock."""


def packed_count(rows: int, cols: int) -> int:
    """Return the numbers in a packed matrix: the last group has sixteen rows, too."""
    return -(-rows // GROUP_ROWS) * GROUP_ROWS * cols


def packed_bytes(name: str, rows: int, cols: int) -> int:
    """Return the bytes of a matrix in a packed format; ValueError if it has no such form."""
    kind = PACKED_BLOCKS[name]
    unit = COLUMNS_UNITS.get(name, kind.values // GROUP_ROWS)
    if cols % unit or (name not in FLOAT_FORMATS and rows % GROUP_ROWS):
        raise ValueError(f"a matrix of {rows} x {cols} has no packed form {name}")
    return packed_count(rows, cols) // kind.values * kind.nbytes


PLAIN_BLOCKS = {
    "BF16": BlockType(1, 2, _bf16),
    "F32": BlockType(1, 4, _f32),
    "F8_E4M3": BlockType(1, 1, _e4m3),
}
"""By the name of the stored type."""


def small_values(
    role: str, shape: tuple[int, ...], rng: np.random.Generator, skew: float
) -> Floats:
    """Return the float32 numbers of a tensor that is no large matrix.

    `skew` is the spread of router biases: how much likelier some experts are than others.
    """
    noise = rng.standard_normal(shape, dtype=F32)
    center, spread = {
        "norm": (1.0, 0.1),
        "sinks": (0.0, 1.0),
        "mixing_base": (0.0, 0.5),
        "mixing_scale": (0.6, 0.1),
        "mixing": (0.0, shape[-1] ** -0.5),
        "positions": (0.0, 0.5),
        "bias": (0.0, skew),
    }[role]
    values: Floats = F32(center) + noise * F32(spread)
    return values


def spread_of(role: str, cols: int) -> float:
    """Return the standard deviation of a matrix: products keep the size of what they multiply.

    Embedding rows have the size of a normalised vector; a router tells experts clearly apart.
    """
    if role == "embedding":
        return 1.0
    return (1.5 if role == "router" else 1.0) / math.sqrt(cols)


def expert_table(
    vocab: int, used: int, experts: int, rng: np.random.Generator
) -> NDArray[np.int64]:
    """Return different experts for each token id (vocab, used)."""
    strides = np.array([s for s in range(1, experts) if np.gcd(s, experts) == 1], np.int64)
    first = rng.integers(0, experts, (vocab, 1), dtype=np.int64)
    stride = strides[rng.integers(0, len(strides), (vocab, 1))]
    table: NDArray[np.int64] = (first + stride * np.arange(used)) % experts
    return table


def f8_scale(std: float) -> float:
    """Return the power of two that gives E4M3 codes about this standard deviation."""
    return math.ldexp(1.0, round(math.log2(std / STD_E4M3)))
