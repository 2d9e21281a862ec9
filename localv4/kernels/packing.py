"""Stored matrices into the packed formats, value for value.

Every packer fills groups first ... end - 1 of sixteen rows, so that threads can share a matrix.
`out` is the packed matrix from group 0 on; with `step` 2 the groups go to every second place, as
gate and up do in an expert record (pass `out[group_bytes:]` for the second of the two). A result
is the number of codes that mean NaN and that no product would report: refuse the matrix then.
Sources (rows, columns; layouts: `kernels.plain`, `kernels.quants`) come as their bytes in a row.
"""

import numpy as np
from numpy.typing import NDArray

from localv4.kernels.arrays import Bytes, Floats
from localv4.kernels.compiler import kernel
from localv4.kernels.device import device
from localv4.kernels.packed import BLOCK, GROUP_ROWS, MX4, Q4, Q8
from localv4.kernels.quants import MXFP4_BYTES, Q4_0_BYTES, Q8_0_BYTES
from localv4.kernels.simd import read_u8, read_u16, read_u32, write_u8, write_u16, write_u32

MX4_BYTES, Q4_BYTES, Q8_BYTES = (fmt.superblock_bytes for fmt in (MX4, Q4, Q8))
_SOURCE = "Array(u1, 1, 'C', readonly=True)"
_NAN_SCALE = np.uint8(255)
_NAN_E4M3 = np.uint8(0x7F)
_LOW_NIBBLES = np.uint32(0x0F0F0F0F)
_HIGH_NIBBLES = np.uint32(0xF0F0F0F0)


@kernel(f"i8(u1[::1], {_SOURCE}, {_SOURCE}, i8, i8, i8, i8)")
def pack_fp4(
    out: Bytes, data: Bytes, scale: Bytes, cols: int, first: int, end: int, step: int
) -> int:
    """Official FP4 to MX4; data (rows, cols / 2): the low half of a byte is the even column.

    scale (rows, cols / 32) UE8M0. Returns the number of NaN scales.
    """
    blocks, nans = cols // BLOCK, 0
    size = blocks // 4 * MX4_BYTES
    for g in range(first, end):
        for i in range(blocks):
            target = out.ctypes.data + g * step * size + i // 4 * MX4_BYTES
            for lane in range(GROUP_ROWS):
                block = (GROUP_ROWS * g + lane) * blocks + i
                code = read_u8(scale.ctypes.data + block)
                nans += code == _NAN_SCALE
                write_u8(target + i % 4 * 16 + lane, code)
                line = target + 64 + i % 4 * 256 + 4 * lane
                for j in range(4):
                    word = read_u32(data.ctypes.data + 16 * block + 4 * j)
                    write_u32(line + 64 * j, _interleaved(word))
    return nans


@kernel(f"i8(u1[::1], {_SOURCE}, i8, i8, i8, i8)")
def pack_mxfp4(out: Bytes, data: Bytes, cols: int, first: int, end: int, step: int) -> int:
    """ggml MXFP4 to MX4; its code of minus zero, which means zero there, becomes zero.

    Returns the number of scales 255, which are NaN elsewhere.
    """
    blocks, nans = cols // BLOCK, 0
    size = blocks // 4 * MX4_BYTES
    for g in range(first, end):
        for i in range(blocks):
            target = out.ctypes.data + g * step * size + i // 4 * MX4_BYTES
            for lane in range(GROUP_ROWS):
                source = data.ctypes.data + ((GROUP_ROWS * g + lane) * blocks + i) * MXFP4_BYTES
                code = read_u8(source)
                nans += code == _NAN_SCALE
                write_u8(target + i % 4 * 16 + lane, code)
                _copy_nibbles(target + 64 + i % 4 * 256 + 4 * lane, source + 1, True)
    return nans


@kernel(f"i8(u1[::1], {_SOURCE}, i8, i8, i8, i8)")
def pack_q4_0(out: Bytes, data: Bytes, cols: int, first: int, end: int, step: int) -> int:
    """ggml Q4_0 to Q4; returns 0."""
    blocks = cols // BLOCK
    size = blocks // 2 * Q4_BYTES
    for g in range(first, end):
        for i in range(blocks):
            target = out.ctypes.data + g * step * size + i // 2 * Q4_BYTES
            for lane in range(GROUP_ROWS):
                source = data.ctypes.data + ((GROUP_ROWS * g + lane) * blocks + i) * Q4_0_BYTES
                write_u16(target + i % 2 * 32 + 2 * lane, read_u16(source))
                _copy_nibbles(target + 64 + i % 2 * 256 + 4 * lane, source + 2, False)
    return 0


@kernel(f"i8(u1[::1], {_SOURCE}, i8, i8, i8, i8)")
def pack_q8_0(out: Bytes, data: Bytes, cols: int, first: int, end: int, step: int) -> int:
    """ggml Q8_0 to Q8; returns 0."""
    blocks = cols // BLOCK
    size = blocks // 2 * Q8_BYTES
    for g in range(first, end):
        for i in range(blocks):
            target = out.ctypes.data + g * step * size + i // 2 * Q8_BYTES
            for lane in range(GROUP_ROWS):
                source = data.ctypes.data + ((GROUP_ROWS * g + lane) * blocks + i) * Q8_0_BYTES
                write_u16(target + i % 2 * 32 + 2 * lane, read_u16(source))
                line = target + 64 + i % 2 * 512 + 4 * lane
                for j in range(8):
                    write_u32(line + 64 * j, read_u32(source + 2 + 4 * j))
    return 0


@kernel(f"i8(u1[::1], {_SOURCE}, i8, i8, i8, i8)")
def pack_f8(out: Bytes, data: Bytes, cols: int, first: int, end: int, step: int) -> int:
    """E4M3 codes (rows, cols) to F8; returns the number of NaN codes."""
    nans = 0
    for g in range(first, end):
        target = out.ctypes.data + g * step * GROUP_ROWS * cols
        for lane in range(GROUP_ROWS):
            source = data.ctypes.data + (GROUP_ROWS * g + lane) * cols
            for k in range(cols):
                code = read_u8(source + k)
                nans += np.uint8(code & _NAN_E4M3) == _NAN_E4M3
                write_u8(target + GROUP_ROWS * k + lane, code)
    return nans


def f8_scales(codes: Bytes) -> Floats:
    """Return UE8M0 codes of any shape as float32, exact; 255 is NaN."""
    bits: NDArray[np.uint32] = codes.astype(np.uint32) << np.uint32(23)
    bits[codes == 0] = 0x00400000
    bits[codes == _NAN_SCALE] = 0x7FC00000
    return bits.view(np.float32)


@device
def _interleaved(word: np.uint32) -> np.uint32:
    """Nibbles 0 1 2 3 4 5 6 7, from the lowest, to the order 0 4 1 5 2 6 3 7."""
    low, high = word & np.uint32(0xFFFF), word >> np.uint32(16)
    return np.uint32(_spread(low) | (_spread(high) << np.uint32(4)))


@device
def _spread(word: np.uint32) -> np.uint32:
    """Four nibbles to the low halves of four bytes."""
    word = np.uint32((word | (word << np.uint32(8))) & np.uint32(0x00FF00FF))
    return np.uint32((word | (word << np.uint32(4))) & _LOW_NIBBLES)


@device
def _copy_nibbles(line: int, source: int, no_minus_zero: bool) -> None:
    """16 ggml bytes, columns 0 ... 15 in their low halves and 16 ... 31 above, to four lines."""
    for j in range(2):
        first, second = read_u32(source + 8 * j), read_u32(source + 8 * j + 4)
        if no_minus_zero:
            first, second = _without_minus_zero(first), _without_minus_zero(second)
        low = (first & _LOW_NIBBLES) | ((second & _LOW_NIBBLES) << np.uint32(4))
        high = ((first >> np.uint32(4)) & _LOW_NIBBLES) | (second & _HIGH_NIBBLES)
        write_u32(line + 64 * j, np.uint32(low))
        write_u32(line + 64 * (j + 2), np.uint32(high))


@device
def _without_minus_zero(word: np.uint32) -> np.uint32:
    """Replace each nibble 8 by 0."""
    sizes = np.uint32(0x77777777)
    # adding 7 to a size carries into the place of the sign unless it is zero
    nonzero = np.uint32((word & sizes) + sizes)
    return np.uint32(word & (nonzero | sizes))
