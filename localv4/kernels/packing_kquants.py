"""ggml blocks of small integer scales into the packed formats, value for value.

The packers are used as those of `kernels.packing` are: they fill groups first ... end - 1 of
sixteen rows, every `step`th place of `out` from group 0 on; their result is 0. `data` is the bytes
of the rows (layouts: `kernels.kquants`, `kernels.iquants`).

Weights of our own get into a superblock with `place_...`: codes as words of four columns, the
lowest byte first, to an address of codes + 4 * lane.
"""

import numpy as np

from localv4.kernels.arrays import Bytes
from localv4.kernels.compiler import kernel
from localv4.kernels.device import device
from localv4.kernels.floats import f16
from localv4.kernels.iquants import IQ2_XXS_BYTES
from localv4.kernels.kquants import Q2_K_BYTES, Q3_K_BYTES, Q4_K_BYTES, Q6_K_BYTES
from localv4.kernels.packed import GROUP_ROWS
from localv4.kernels.packed_kquants import IQ2, Q2, Q3, Q4K, Q6, SUPERBLOCK
from localv4.kernels.simd import (
    read_u8,
    read_u16,
    read_u32,
    write_f32,
    write_u8,
    write_u16,
    write_u32,
)

_Q4K_BYTES, _Q6_BYTES, _Q3_BYTES, _Q2_BYTES = (fmt.superblock_bytes for fmt in (Q4K, Q6, Q3, Q2))
_IQ2_BYTES = IQ2.superblock_bytes
_SOURCE = "Array(u1, 1, 'C', readonly=True)"
_SIGNATURE = f"i8(u1[::1], {_SOURCE}, i8, i8, i8, i8)"
_EIGHTH = np.float32(0.125)
_SEVEN = np.uint32(127)
_ONES = np.uint32(0x01010101)
_TWOS = np.uint32(0x03030303)
_NIBBLES = np.uint32(0x0F0F0F0F)


@device
def source_row(data: Bytes, group: int, lane: int, superblocks: int, i: int, size: int) -> int:
    """Return the address of superblock i of a row, each of `size` bytes."""
    row: int = ((GROUP_ROWS * group + lane) * superblocks + i) * size
    return data.ctypes.data + row


@device
def part_of(word: np.uint32, shift: int, mask: np.uint32) -> np.uint32:
    """Return the bits of a mask after a shift to the right."""
    return np.uint32((word >> np.uint32(shift)) & mask)


@kernel(_SIGNATURE, family=Q4K.name)
def pack_q4_k(out: Bytes, data: Bytes, cols: int, first: int, end: int, step: int) -> int:
    """ggml Q4_K to Q4K; returns 0."""
    superblocks = cols // SUPERBLOCK
    for g in range(first, end):
        for i in range(superblocks):
            target = out.ctypes.data + (g * step * superblocks + i) * _Q4K_BYTES
            for lane in range(GROUP_ROWS):
                source = source_row(data, g, lane, superblocks, i, Q4_K_BYTES)
                write_u16(target + 2 * lane, read_u16(source))
                write_u16(target + 32 + 2 * lane, read_u16(source + 2))
                for p in range(2):
                    _copy_first_numbers(target, lane, p, source + 4)
                    _copy_last_numbers(target, lane, p + 2, source + 4)
                for p in range(4):
                    for j in range(4):
                        at = target + 256 + 512 * p + 64 * j + 4 * lane
                        words = source + 16 + 32 * p + 8 * j
                        low, high = read_u32(words), read_u32(words + 4)
                        place_nibbles(at, part_of(low, 0, _NIBBLES), part_of(high, 0, _NIBBLES))
                        low, high = part_of(low, 4, _NIBBLES), part_of(high, 4, _NIBBLES)
                        place_nibbles(at + 256, low, high)
    return 0


@device
def place_nibbles(line: int, c0: np.uint32, c1: np.uint32) -> None:
    """Write eight columns of Q4K to a line."""
    write_u32(line, np.uint32(c0 | (c1 << np.uint32(4))))


@device
def _copy_first_numbers(target: int, lane: int, step: int, source: int) -> None:
    """Scales and least values of blocks 2 * step and 2 * step + 1, both below 4."""
    at = source + 2 * step
    scales, least = np.int64(read_u16(at)), np.int64(read_u16(at + 4))
    n0, n1 = scales & 63, (scales >> 8) & 63
    n2, n3 = least & 63, (least >> 8) & 63
    place_numbers(target, lane, step, n0, n1, n2, n3)


@device
def _copy_last_numbers(target: int, lane: int, step: int, source: int) -> None:
    """The same for blocks of 4 on: four bits in the last bytes, two above those of the others."""
    at = source + 2 * (step - 2)
    scales, least = np.int64(read_u16(at)), np.int64(read_u16(at + 4))
    low = np.int64(read_u16(at + 8))
    n0 = (low & 15) | ((scales >> 6 & 3) << 4)
    n2 = (low >> 4 & 15) | ((least >> 6 & 3) << 4)
    n1 = (low >> 8 & 15) | (scales >> 14 << 4)
    n3 = low >> 12 | (least >> 14 << 4)
    place_numbers(target, lane, step, n0, n1, n2, n3)


@device
def place_numbers(
    target: int, lane: int, step: int, n0: np.int64, n1: np.int64, n2: np.int64, n3: np.int64
) -> None:
    """Write the four six-bit numbers of a step and row into a superblock of Q4K or Q3."""
    low = n0 | (n1 << 8) | ((n2 & 3) << 6) | ((n3 & 3) << 14)
    write_u16(target + 64 + 32 * step + 2 * lane, np.uint16(low))
    write_u8(target + 192 + 16 * step + lane, np.uint8((n2 >> 2) | ((n3 >> 2) << 4)))


@kernel(_SIGNATURE, family=Q6.name)
def pack_q6_k(out: Bytes, data: Bytes, cols: int, first: int, end: int, step: int) -> int:
    """ggml Q6_K to Q6; returns 0."""
    superblocks = cols // SUPERBLOCK
    for g in range(first, end):
        for i in range(superblocks):
            target = out.ctypes.data + (g * step * superblocks + i) * _Q6_BYTES
            for lane in range(GROUP_ROWS):
                source = source_row(data, g, lane, superblocks, i, Q6_K_BYTES)
                write_f32(target + 4 * lane, f16(read_u16(source + 208)))
                for part in range(16):
                    write_u8(target + 64 + 16 * part + lane, read_u8(source + 192 + part))
                    n, k, rest = part >> 3, (part >> 1) & 3, 16 * (part & 1)
                    low, high = source + 64 * n + 32 * (k & 1) + rest, source + 128 + 32 * n + rest
                    c0 = _six_bits(low, high, k)
                    c1 = _six_bits(low + 4, high + 4, k)
                    c2 = _six_bits(low + 8, high + 8, k)
                    c3 = _six_bits(low + 12, high + 12, k)
                    place_six_bits(target + 320 + 192 * part + 4 * lane, c0, c1, c2, c3)
    return 0


@device
def _six_bits(low: int, high: int, k: int) -> np.uint32:
    """Return four codes of quarter k of a half of Q6_K."""
    lower = part_of(read_u32(low), 4 * (k >> 1), _NIBBLES)
    return np.uint32(lower | (part_of(read_u32(high), 2 * k, _TWOS) << np.uint32(4)))


@device
def place_six_bits(line: int, c0: np.uint32, c1: np.uint32, c2: np.uint32, c3: np.uint32) -> None:
    """Write a part of Q6 to three lines."""
    write_u32(line, np.uint32(c0 | (part_of(c3, 0, _TWOS) << np.uint32(6))))
    write_u32(line + 64, np.uint32(c1 | (part_of(c3, 2, _TWOS) << np.uint32(6))))
    write_u32(line + 128, np.uint32(c2 | (part_of(c3, 4, _TWOS) << np.uint32(6))))


@kernel(_SIGNATURE, family=Q3.name)
def pack_q3_k(out: Bytes, data: Bytes, cols: int, first: int, end: int, step: int) -> int:
    """ggml Q3_K to Q3; returns 0."""
    superblocks = cols // SUPERBLOCK
    for g in range(first, end):
        for i in range(superblocks):
            target = out.ctypes.data + (g * step * superblocks + i) * _Q3_BYTES
            for lane in range(GROUP_ROWS):
                source = source_row(data, g, lane, superblocks, i, Q3_K_BYTES)
                write_f32(target + 4 * lane, f16(read_u16(source + 108)))
                for p in range(4):
                    _copy_q3_k_numbers(target, lane, p, source + 96)
                for block in range(8):
                    low = source + 32 + 32 * (block >> 2)
                    line = target + 256 + 192 * block + 4 * lane
                    c0, c1 = (
                        _three_bits(low, source, block),
                        _three_bits(low + 4, source + 4, block),
                    )
                    c2 = _three_bits(low + 8, source + 8, block)
                    c3 = _three_bits(low + 12, source + 12, block)
                    c4 = _three_bits(low + 16, source + 16, block)
                    c5 = _three_bits(low + 20, source + 20, block)
                    c6 = _three_bits(low + 24, source + 24, block)
                    c7 = _three_bits(low + 28, source + 28, block)
                    place_three_bits(line, c0, c1, part_of(c6, 0, _TWOS))
                    place_three_bits(line + 64, c2, c3, part_of(c7, 0, _TWOS))
                    highest = part_of(c6, 2, _ONES) | (part_of(c7, 2, _ONES) << np.uint32(1))
                    place_three_bits(line + 128, c4, c5, np.uint32(highest))
    return 0


@device
def _three_bits(low: int, high: int, block: int) -> np.uint32:
    """Return four codes of a block of Q3_K."""
    lower = part_of(read_u32(low), 2 * (block & 3), _TWOS)
    return np.uint32(lower | (part_of(read_u32(high), block, _ONES) << np.uint32(2)))


@device
def place_three_bits(line: int, c0: np.uint32, c1: np.uint32, rest: np.uint32) -> None:
    """Write eight columns of Q3 and the uppermost two bits of each byte to a line."""
    write_u32(line, np.uint32(c0 | (c1 << np.uint32(3)) | (rest << np.uint32(6))))


@device
def _copy_q3_k_numbers(target: int, lane: int, step: int, source: int) -> None:
    """Four scales: their lower halves from the 8 bytes at source, the others from the next 4."""
    low = read_u32(source + 4 * (step & 1)) >> np.uint32(4 * (step >> 1))
    high = read_u32(source + 8) >> np.uint32(2 * step)
    numbers = np.uint32((low & _NIBBLES) | ((high & _TWOS) << np.uint32(4)))
    n0, n1 = np.int64(numbers & np.uint32(63)), np.int64((numbers >> np.uint32(8)) & np.uint32(63))
    n2 = np.int64((numbers >> np.uint32(16)) & np.uint32(63))
    place_numbers(target, lane, step, n0, n1, n2, np.int64(numbers >> np.uint32(24)))


@kernel(_SIGNATURE, family=Q2.name)
def pack_q2_k(out: Bytes, data: Bytes, cols: int, first: int, end: int, step: int) -> int:
    """ggml Q2_K to Q2; returns 0."""
    superblocks = cols // SUPERBLOCK
    for g in range(first, end):
        for i in range(superblocks):
            target = out.ctypes.data + (g * step * superblocks + i) * _Q2_BYTES
            for lane in range(GROUP_ROWS):
                source = source_row(data, g, lane, superblocks, i, Q2_K_BYTES)
                write_u16(target + 2 * lane, read_u16(source + 80))
                write_u16(target + 32 + 2 * lane, read_u16(source + 82))
                for p in range(4):
                    place_nibble_pairs(target, lane, p, read_u32(source + 4 * p))
                for part in range(16):
                    codes = source + 16 + 32 * (part >> 3) + 16 * (part & 1)
                    place_two_bits(
                        target + 320 + 64 * part + 4 * lane,
                        part_of(read_u32(codes), part & 6, _TWOS),
                        part_of(read_u32(codes + 4), part & 6, _TWOS),
                        part_of(read_u32(codes + 8), part & 6, _TWOS),
                        part_of(read_u32(codes + 12), part & 6, _TWOS),
                    )
    return 0


@device
def place_nibble_pairs(target: int, lane: int, step: int, word: np.uint32) -> None:
    """Write scales and least values of a step and row into a superblock of Q2.

    word: a byte for each of the four parts, the lowest first: scale + 16 * least value.
    """
    low, high = word & np.uint32(0xFFFF), word >> np.uint32(16)
    # nibbles 0 1 2 3 4 5 6 7, from the lowest, get the order 0 4 1 5 2 6 3 7
    numbers = np.uint32(_spread(low) | (_spread(high) << np.uint32(4)))
    write_u32(target + 64 + 64 * step + 4 * lane, numbers)


@device
def _spread(word: np.uint32) -> np.uint32:
    """Four nibbles to the low halves of four bytes."""
    word = np.uint32((word | (word << np.uint32(8))) & np.uint32(0x00FF00FF))
    return np.uint32((word | (word << np.uint32(4))) & _NIBBLES)


@device
def place_two_bits(line: int, c0: np.uint32, c1: np.uint32, c2: np.uint32, c3: np.uint32) -> None:
    """Write a part of Q2 to a line."""
    low, high = c0 | (c1 << np.uint32(2)), (c2 << np.uint32(4)) | (c3 << np.uint32(6))
    write_u32(line, np.uint32(low | high))


@kernel(_SIGNATURE, family=IQ2.name)
def pack_iq2_xxs(out: Bytes, data: Bytes, cols: int, first: int, end: int, step: int) -> int:
    """ggml IQ2_XXS to IQ2; returns 0."""
    superblocks = cols // SUPERBLOCK
    for g in range(first, end):
        for i in range(superblocks):
            target = out.ctypes.data + (g * step * superblocks + i) * _IQ2_BYTES
            for lane in range(GROUP_ROWS):
                source = source_row(data, g, lane, superblocks, i, IQ2_XXS_BYTES)
                write_f32(target + 4 * lane, f16(read_u16(source)) * _EIGHTH)
                for block in range(8):
                    line = target + 64 + 128 * block + 4 * lane
                    write_u32(line, read_u32(source + 2 + 8 * block))
                    write_u32(line + 64, _signs_and_scale(read_u32(source + 6 + 8 * block)))
    return 0


@device
def _signs_and_scale(word: np.uint32) -> np.uint32:
    """Four times seven bits and once four to four bytes: bit i of the four on top of byte i."""
    scale = word >> np.uint32(28)
    signs = part_of(word, 0, _SEVEN) | (part_of(word, 7, _SEVEN) << np.uint32(8))
    signs |= part_of(word, 14, _SEVEN) << np.uint32(16)
    signs |= part_of(word, 21, _SEVEN) << np.uint32(24)
    low = ((scale & np.uint32(1)) << np.uint32(7)) | ((scale & np.uint32(2)) << np.uint32(14))
    high = ((scale & np.uint32(4)) << np.uint32(21)) | ((scale & np.uint32(8)) << np.uint32(28))
    return np.uint32(_placed_signs(np.uint32(signs)) | low | high)


@device
def _placed_signs(signs: np.uint32) -> np.uint32:
    """Move the signs of columns 0 ... 5 of each byte to bits 2 5 3 4 6 1, the eighth to bit 0."""
    odd = signs ^ (signs >> np.uint32(4))
    odd ^= odd >> np.uint32(2)
    odd = (odd ^ (odd >> np.uint32(1))) & _ONES
    placed = odd | (part_of(signs, 0, _ONES) << np.uint32(2))
    placed |= part_of(signs, 1, _ONES) << np.uint32(5)
    placed |= part_of(signs, 2, np.uint32(0x03030303)) << np.uint32(3)
    placed |= part_of(signs, 4, _ONES) << np.uint32(6)
    return np.uint32(placed | (part_of(signs, 5, _ONES) << np.uint32(1)))
