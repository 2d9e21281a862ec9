"""How compressed rows are stored: the keys of attention, and the narrower rows of the indexer.

A row has n channels, n a multiple of 32; the last `rope` of them (an even number) are rotated. Rows
are written once, by the compressor, and read by attention and the indexer without a detour through
an array of float32. What a row reads as follows from the row alone.

| form | bytes of a row            | layout                                                        |
|------|---------------------------|---------------------------------------------------------------|
| F32  | 4 n                       | float32                                                       |
| BF16 | 2 n                       | bfloat16, rounded to the nearest even                         |
| E4M3 | 584 for n = 512 and rope  | p codes of FP8 (E4M3), p = n - rope, cut to a multiple of 16; |
|      | = 64                      | bfloat16 for the rest; a scale for each 64 codes; zeros up to |
|      |                           | a multiple of 8 scales                                        |
| E2M1 | n / 2 + n / 32            | 16 bytes for 32 codes of FP4 (E2M1), channel i with channel   |
|      |                           | i + 16; after all of them a scale for each 32 codes           |

Scales are powers of two, the smallest with which all codes fit, as in the official code; one is
stored as the biased exponent of a float32: that which codes are multiplied with when they are read
(`row_codes.E4M3_UNIT`, `E2M1_UNIT`). 255, infinity, says that some number was not finite or beyond
2^117: then nothing of its group reads as finite.

Rows of E2M1 are mixed first: multiplied with a Hadamard matrix of the largest power of two that n
is a multiple of, which spreads outliers over all channels. Products do not change when queries are
mixed, too. No scale of a row is less than 2^-SPREAD of the largest, so that all codes of a row are
whole numbers of bytes with one scale (`kernels.code_keys`); mixed channels are of about one size,
so that hardly ever costs anything.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from localv4.kernels.device import device, inlined
from localv4.kernels.operation import float_at
from localv4.kernels.row_codes import (
    E2M1_UNIT,
    E4M3_UNIT,
    SMALLEST_WORD_SCALE,
    e4m3_codes,
    e4m3_words,
    exact_words,
    load_bf16,
    load_e2m1,
    load_e4m3,
    rounded_words,
    splat_power,
    store_bf16,
    store_e2m1,
)
from localv4.kernels.simd import (
    Vector,
    highest_i32,
    largest_i32,
    load_f32,
    load_i32,
    magnitudes,
    multiply,
    read_u8,
    store_f32,
    store_i8,
    write_f32,
    write_u8,
    zeros_i32,
)
from localv4.kernels.simd_ir import LANES

MOST_CHANNELS = 512
"""Of a row: bounds the buffers that kernels have on the stack."""

SPREAD = 3
"""Between the scales of a row of E2M1 there are at most so many powers of two."""

_E4M3_GROUP, _E2M1_GROUP = 64, 32
# Bits of the fraction beyond the largest code (1.75 * 2^8, 1.5 * 2^2) lift the exponent by one.
_E4M3_LIFT, _E2M1_LIFT = (1 << 21) - 1, (1 << 22) - 1
_LARGEST = 255


@dataclass(frozen=True, slots=True, eq=False)
class RowForm:
    """One way to store a row.

    `nbytes(n, rope)` is the size of a row, for Python; the other functions are those of kernels.
    `stride(n, rope)` is the same; `load(row, channel, n, rope)` reads sixteen channels as float32,
    `words(row, channel, n, rope)` 32 channels as bfloat16 (`kernels.row_codes`), which rounds those
    of F32 only; `encode(row, source, n, rope)` writes the row of float32 at `source`, which is
    lost. `is_plain`: rows are float32 and can be used where they are.
    """

    name: str
    nbytes: Callable[[int, int], int]
    stride: Any
    load: Callable[[int, int, int, int], Vector]
    words: Callable[[int, int, int, int], Vector]
    encode: Callable[[int, int, int, int], None]
    is_plain: bool = False


# --- F32 ---


def _f32_bytes(n: int, rope: int) -> int:
    return 4 * n


@device
def _load_f32(row: int, channel: int, n: int, rope: int) -> Vector:
    return load_f32(row + 4 * channel)


@inlined
def _f32_words(row: int, channel: int, n: int, rope: int) -> Vector:
    return rounded_words(load_f32(row + 4 * channel), load_f32(row + 4 * channel + 64))


@device
def _encode_f32(row: int, source: int, n: int, rope: int) -> None:
    for at in range(0, 4 * n, 64):
        store_f32(row + at, load_f32(source + at))


# --- BF16 ---


def _bf16_bytes(n: int, rope: int) -> int:
    return 2 * n


@device
def _load_bf16(row: int, channel: int, n: int, rope: int) -> Vector:
    return load_bf16(row + 2 * channel)


@inlined
def _bf16_words(row: int, channel: int, n: int, rope: int) -> Vector:
    return load_i32(row + 2 * channel)


@device
def _encode_bf16(row: int, source: int, n: int, rope: int) -> None:
    for channel in range(0, n, LANES):
        store_bf16(row + 2 * channel, load_f32(source + 4 * channel))


# --- E4M3, and BF16 for the rotated channels ---


def _e4m3_bytes(n: int, rope: int) -> int:
    coded = (n - rope) // LANES * LANES
    groups = (coded + _E4M3_GROUP - 1) // _E4M3_GROUP
    return 2 * n - coded + (groups + 7) // 8 * 8


@device
def _load_e4m3(row: int, channel: int, n: int, rope: int) -> Vector:
    coded = (n - rope) // LANES * LANES
    if channel >= coded:
        return load_bf16(row + 2 * channel - coded)
    scale = int(read_u8(row + 2 * n - coded + channel // _E4M3_GROUP))
    return multiply(load_e4m3(row + channel), splat_power(scale))


@inlined
def _e4m3_words(row: int, channel: int, n: int, rope: int) -> Vector:
    coded = (n - rope) // LANES * LANES
    if channel >= coded:
        return load_i32(row + 2 * channel - coded)
    scale = int(read_u8(row + 2 * n - coded + channel // _E4M3_GROUP))
    if channel + 2 * LANES <= coded and SMALLEST_WORD_SCALE <= scale < _LARGEST:
        return e4m3_words(row + channel, scale)
    return _other_e4m3_words(row, channel, n, rope)


@device
def _other_e4m3_words(row: int, channel: int, n: int, rope: int) -> Vector:
    low, high = _load_e4m3(row, channel, n, rope), _load_e4m3(row, channel + LANES, n, rope)
    return exact_words(low, high)


@device
def _encode_e4m3(row: int, source: int, n: int, rope: int) -> None:
    coded = (n - rope) // LANES * LANES
    scales = row + 2 * n - coded
    for first in range(0, coded, _E4M3_GROUP):
        end = min(first + _E4M3_GROUP, coded)
        scale = (_largest_bits(source, first, end) + _E4M3_LIFT) >> 23
        scale = max(scale, E4M3_UNIT)
        inverse = splat_power(2 * 127 + E4M3_UNIT - scale)
        for channel in range(first, end, LANES):
            codes = e4m3_codes(multiply(load_f32(source + 4 * channel), inverse))
            store_i8(row + channel, codes)
        write_u8(scales + first // _E4M3_GROUP, np.uint8(scale))
    for channel in range(coded, n, LANES):
        store_bf16(row + 2 * channel - coded, load_f32(source + 4 * channel))
    groups = (coded + _E4M3_GROUP - 1) // _E4M3_GROUP
    for i in range(groups, (groups + 7) // 8 * 8):
        write_u8(scales + i, np.uint8(0))


@device
def _largest_bits(source: int, first: int, end: int) -> int:
    """Return the bits of the largest absolute value of some channels."""
    largest = zeros_i32()
    for channel in range(first, end, LANES):
        largest = largest_i32(magnitudes(load_f32(source + 4 * channel)), largest)
    return int(highest_i32(largest))


# --- E2M1, mixed ---


def _e2m1_bytes(n: int, rope: int) -> int:
    return n // 2 + n // _E2M1_GROUP


@device
def _load_e2m1(row: int, channel: int, n: int, rope: int) -> Vector:
    group = channel // _E2M1_GROUP
    scale = int(read_u8(row + n // 2 + group))
    shift = 4 * (channel % _E2M1_GROUP // LANES)
    return multiply(load_e2m1(row + LANES * group, shift), splat_power(scale))


@device
def _e2m1_words(row: int, channel: int, n: int, rope: int) -> Vector:
    low, high = _load_e2m1(row, channel, n, rope), _load_e2m1(row, channel + LANES, n, rope)
    return exact_words(low, high)


@device
def _encode_e2m1(row: int, source: int, n: int, rope: int) -> None:
    mix(source, n)
    least = max(_e2m1_scale(source, 0, n) - SPREAD, E2M1_UNIT)
    for first in range(0, n, _E2M1_GROUP):
        scale = max(_e2m1_scale(source, first, first + _E2M1_GROUP), least)
        inverse = splat_power(2 * 127 + E2M1_UNIT - scale)
        at = source + 4 * first
        low, high = multiply(load_f32(at), inverse), multiply(load_f32(at + 64), inverse)
        store_e2m1(row + first // 2, low, high)
        write_u8(row + n // 2 + first // _E2M1_GROUP, np.uint8(scale))


@device
def _e2m1_scale(source: int, first: int, end: int) -> int:
    """Return the smallest scale with which the codes of some channels fit, at most 255."""
    bits = _largest_bits(source, first, end)
    return min(((bits + _E2M1_LIFT) >> 23) - 2 + E2M1_UNIT, _LARGEST)


@device
def mixed_block(n: int) -> int:
    """Return the channels that are mixed with one another."""
    return n & -n


@device
def mix(at: int, n: int) -> None:
    """Mix the n float32 at an address in place: a normalised Hadamard transform of each block."""
    block = mixed_block(n)
    distance = 1
    while distance < block:
        for i in range(n):
            if i & distance == 0:
                low, high = float_at(at + 4 * i), float_at(at + 4 * (i + distance))
                write_f32(at + 4 * i, low + high)
                write_f32(at + 4 * (i + distance), low - high)
        distance *= 2
    factor = mixing_factor(n)
    for i in range(n):
        write_f32(at + 4 * i, float_at(at + 4 * i) * factor)


@device
def mixing_factor(n: int) -> np.float32:
    """Return what keeps the length of mixed channels: 1 / sqrt of their number."""
    return np.float32(1) / np.float32(np.sqrt(np.float32(mixed_block(n))))


F32_ROWS = RowForm(
    *("F32", _f32_bytes, device(_f32_bytes)),
    *(_load_f32, _f32_words, _encode_f32),
    is_plain=True,
)
BF16_ROWS = RowForm(
    *("BF16", _bf16_bytes, device(_bf16_bytes)),
    *(_load_bf16, _bf16_words, _encode_bf16),
)
E4M3_ROWS = RowForm(
    *("E4M3", _e4m3_bytes, device(_e4m3_bytes)),
    *(_load_e4m3, _e4m3_words, _encode_e4m3),
)
E2M1_ROWS = RowForm(
    *("E2M1", _e2m1_bytes, device(_e2m1_bytes)),
    *(_load_e2m1, _e2m1_words, _encode_e2m1),
)
