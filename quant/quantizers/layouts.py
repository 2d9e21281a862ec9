"""Codes and scales as the rows of blocks that ggml stores; `docs/packed_format.md` names the types.

Arguments are what the searches choose: codes (rows, cols) i8, scales and minima (rows, blocks) i8,
factors (rows, superblocks or blocks) f32 that are halves. Results are (rows, bytes of a row) u8.
"""

import numpy as np
from numpy.typing import NDArray

from localv4.kernels.arrays import Bytes, Floats
from localv4.kernels.quants import IQ4_LEVELS

Codes = NDArray[np.int8]

_IQ4_CODES = np.zeros(256, np.uint8)
_IQ4_CODES[np.array(IQ4_LEVELS) & 255] = np.arange(16)


def q8_0(codes: Codes, factors: Floats) -> Bytes:
    """A half and 32 int8."""
    return _joined(_halves(factors), codes.reshape(-1, 32).view(np.uint8), rows=len(codes))


def q4_0(codes: Codes, factors: Floats) -> Bytes:
    """A half and 32 nibbles with bias 8."""
    shifted = (codes + np.int8(8)).view(np.uint8)
    return _joined(_halves(factors), _nibbles(shifted.reshape(-1, 32)), rows=len(codes))


def iq4_nl(codes: Codes, factors: Floats) -> Bytes:
    """A half and 32 nibbles that number the levels; codes are levels."""
    numbers = _IQ4_CODES[codes.view(np.uint8)].reshape(-1, 32)
    return _joined(_halves(factors), _nibbles(numbers), rows=len(codes))


def mxfp4(codes: Codes, factors: Floats) -> Bytes:
    """A UE8M0 byte and 32 nibbles of E2M1; codes are its magnitudes with a sign, no minus zero."""
    nibbles = np.where(codes < 0, np.int8(8) - codes, codes).view(np.uint8)
    exponents = (factors.view(np.uint32) >> 23).astype(np.uint8).reshape(-1, 1)
    return _joined(exponents, _nibbles(nibbles.reshape(-1, 32)), rows=len(codes))


def q6_k(codes: Codes, scales: Codes, factors: Floats) -> Bytes:
    """Nibbles, upper two bits, 16 int8 scales, a half; codes have bias 32."""
    shifted = (codes + np.int8(32)).view(np.uint8)
    low = _part(shifted, 0, 15).reshape(-1, 2, 2, 64)
    lower = low[:, :, 0] | _up(low[:, :, 1], 4)
    return _joined(
        lower.reshape(-1, 128),
        _quarters(_part(shifted, 4, 3)),
        scales.reshape(-1, 16).view(np.uint8),
        _halves(factors),
        rows=len(codes),
    )


def q3_k(codes: Codes, scales: Codes, factors: Floats) -> Bytes:
    """Third bits, lower two bits, 16 six-bit scales with bias 32, a half; codes have bias 4."""
    shifted = (codes + np.int8(4)).view(np.uint8)
    third = np.packbits(_part(shifted, 2, 1).reshape(-1, 8, 32), axis=1, bitorder="little")
    numbers = (scales + np.int8(32)).view(np.uint8).reshape(-1, 16)
    lower = _part(numbers[:, :8], 0, 15) | _up(numbers[:, 8:], 4)
    upper = _part(numbers, 4, 3).reshape(-1, 4, 4)
    upper = _four(upper, 1)
    return _joined(
        third.reshape(-1, 32),
        _quarters(_part(shifted, 0, 3)),
        lower,
        upper,
        _halves(factors),
        rows=len(codes),
    )


def q2_k(codes: Codes, scales: Codes, minima: Codes, factors: Floats, floors: Floats) -> Bytes:
    """16 pairs of nibbles, 2-bit codes, two halves."""
    pairs = (scales | minima << 4).view(np.uint8).reshape(-1, 16)
    quarters = _quarters(codes.view(np.uint8))
    return _joined(pairs, quarters, _halves(factors), _halves(floors), rows=len(codes))


def q4_k(codes: Codes, scales: Codes, minima: Codes, factors: Floats, floors: Floats) -> Bytes:
    """Two halves, 8 pairs of six-bit numbers, nibbles."""
    numbers = _six_bit_pairs(scales.view(np.uint8), minima.view(np.uint8))
    nibbles = codes.view(np.uint8).reshape(-1, 4, 2, 32)
    nibbles = nibbles[:, :, 0] | _up(nibbles[:, :, 1], 4)
    return _joined(
        _halves(factors), _halves(floors), numbers, nibbles.reshape(-1, 128), rows=len(codes)
    )


def q5_k(codes: Codes, scales: Codes, minima: Codes, factors: Floats, floors: Floats) -> Bytes:
    """Two halves, 8 pairs of six-bit numbers, fifth bits, nibbles."""
    numbers = _six_bit_pairs(scales.view(np.uint8), minima.view(np.uint8))
    five = codes.view(np.uint8)
    fifth = np.packbits(_part(five, 4, 1).reshape(-1, 8, 32), axis=1, bitorder="little")
    nibbles = _part(five, 0, 15).reshape(-1, 4, 2, 32)
    nibbles = nibbles[:, :, 0] | _up(nibbles[:, :, 1], 4)
    return _joined(
        _halves(factors),
        _halves(floors),
        numbers,
        fifth.reshape(-1, 32),
        nibbles.reshape(-1, 128),
        rows=len(codes),
    )


def iq4_xs(codes: Codes, scales: Codes, factors: Floats) -> Bytes:
    """A half, 8 six-bit scales with bias 32, nibbles that number the levels; codes are levels."""
    numbers = (scales + np.int8(32)).view(np.uint8).reshape(-1, 8)
    shifts = 2 * np.arange(8, dtype=np.uint16)
    upper = (_part(numbers, 4, 3).astype(np.uint16) << shifts).sum(axis=1, dtype=np.uint16)
    lower = _part(numbers[:, 0::2], 0, 15) | _up(numbers[:, 1::2], 4)
    nibbles = _nibbles(_IQ4_CODES[codes.view(np.uint8)].reshape(-1, 32))
    return _joined(
        _halves(factors),
        upper.astype("<u2").view(np.uint8).reshape(-1, 2),
        lower,
        nibbles.reshape(-1, 128),
        rows=len(codes),
    )


def iq2_xxs(points: Bytes, signs: Bytes, scales: Codes, factors: Floats) -> Bytes:
    """A half and 8 times four numbers of points, four signs of seven bits, four bits of scale."""
    seven = (signs & np.uint8(127)).reshape(-1, 4).astype(np.uint32)
    words = seven[:, 0] | seven[:, 1] << 7 | seven[:, 2] << 14 | seven[:, 3] << 21
    words |= scales.reshape(-1).astype(np.uint32) << 28
    groups = [points.reshape(-1, 4), words.astype("<u4").view(np.uint8).reshape(-1, 4)]
    blocks = np.concatenate(groups, axis=1).reshape(-1, 64)
    return _joined(_halves(factors), blocks, rows=len(points))


def _joined(*parts: Bytes, rows: int) -> Bytes:
    """Put the parts of each block one behind the other, and the blocks of each row."""
    return np.concatenate(parts, axis=1).reshape(rows, -1)


def _halves(numbers: Floats) -> Bytes:
    """Return float32 that are halves as pairs of bytes (n, 2)."""
    return numbers.astype("<f2").view(np.uint8).reshape(-1, 2)


def _nibbles(codes: Bytes) -> Bytes:
    """(n, 32) -> (n, 16): the first half of the columns low, the second high."""
    return codes[:, :16] | _up(codes[:, 16:], 4)


def _quarters(codes: Bytes) -> Bytes:
    """2-bit codes -> (superblocks, 64): each byte of 32 holds columns 32 apart of a half."""
    return _four(codes.reshape(-1, 2, 4, 32), 2).reshape(-1, 64)


def _six_bit_pairs(scales: Bytes, minima: Bytes) -> Bytes:
    """Eight scales and eight minima -> (superblocks, 12)."""
    s, m = scales.reshape(-1, 8), minima.reshape(-1, 8)
    first = s[:, :4] | _up(_part(s[:, 4:], 4, 3), 6)
    second = m[:, :4] | _up(_part(m[:, 4:], 4, 3), 6)
    return np.concatenate([first, second, _part(s[:, 4:], 0, 15) | _up(m[:, 4:], 4)], axis=1)


def _part(codes: Bytes, shift: int, mask: int) -> Bytes:
    """Return some bits of each number."""
    return (codes >> np.uint8(shift)) & np.uint8(mask)


def _up(codes: Bytes, shift: int) -> Bytes:
    """Move the bits of each number up; those beyond a byte are lost."""
    return codes << np.uint8(shift)


def _four(codes: Bytes, axis: int) -> Bytes:
    """Join four 2-bit numbers along an axis, the first one lowest."""
    joined: Bytes = np.bitwise_or.reduce(
        [_up(part, 2 * i) for i, part in enumerate(np.moveaxis(codes, axis, 0))]
    )
    return joined
