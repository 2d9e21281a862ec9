"""ggml blocks of small integer scales into the packed formats, value for value.

The packers are used as those of `kernels.packing` are: they fill groups first ... end - 1 of
sixteen rows, every `step`th place of `out` from group 0 on; their result is 0. `data` is the bytes
of the rows (layouts: `kernels.kquants`, `kernels.iquants`).

Weights of our own go into a superblock of sixteen rows with `place_...`, a row at a time.
"""

import numpy as np

from localv4.kernels.arrays import Bytes
from localv4.kernels.compiler import kernel
from localv4.kernels.device import device
from localv4.kernels.kquants import Q4_K_BYTES
from localv4.kernels.packed import GROUP_ROWS
from localv4.kernels.packed_kquants import Q4K, SUPERBLOCK
from localv4.kernels.simd import read_u16, read_u32, write_u8, write_u16, write_u32

_Q4K_BYTES = Q4K.superblock_bytes
_SOURCE = "Array(u1, 1, 'C', readonly=True)"
_LOW_NIBBLES = np.uint32(0x0F0F0F0F)
_HIGH_NIBBLES = np.uint32(0xF0F0F0F0)
_FOUR = np.uint32(4)


@kernel(f"i8(u1[::1], {_SOURCE}, i8, i8, i8, i8)", family=Q4K.name)
def pack_q4_k(out: Bytes, data: Bytes, cols: int, first: int, end: int, step: int) -> int:
    """ggml Q4_K to Q4K; returns 0."""
    superblocks, size = cols // SUPERBLOCK, _Q4K_BYTES
    for g in range(first, end):
        for i in range(superblocks):
            target = out.ctypes.data + (g * step * superblocks + i) * size
            for lane in range(GROUP_ROWS):
                row = GROUP_ROWS * g + lane
                source = data.ctypes.data + (row * superblocks + i) * Q4_K_BYTES
                write_u16(target + 2 * lane, read_u16(source))
                write_u16(target + 32 + 2 * lane, read_u16(source + 2))
                for p in range(2):
                    _copy_first_numbers(target, lane, p, source + 4)
                    _copy_last_numbers(target, lane, p + 2, source + 4)
                for p in range(4):
                    _copy_q4_k_codes(target + 256 + 512 * p + 4 * lane, source + 16 + 32 * p)
    return 0


@device
def _copy_q4_k_codes(line: int, source: int) -> None:
    """32 bytes with a block in their low halves and one in their high halves to eight lines."""
    for j in range(4):
        first, second = read_u32(source + 8 * j), read_u32(source + 8 * j + 4)
        low = (first & _LOW_NIBBLES) | ((second & _LOW_NIBBLES) << _FOUR)
        high = ((first & _HIGH_NIBBLES) >> _FOUR) | (second & _HIGH_NIBBLES)
        write_u32(line + 64 * j, np.uint32(low))
        write_u32(line + 64 * j + 256, np.uint32(high))


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
