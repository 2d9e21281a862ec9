"""Rows of the ggml K-quants: superblocks of 256 values with small integer scales.

Products are taken in float32 in the order of gguf-py, so that results are equal to the bit.
"""

import numpy as np
from numpy.typing import NDArray

from localv4.kernels.device import device
from localv4.kernels.floats import f16_at

SUPERBLOCK = 256
Q2_K_BYTES = 84
Q3_K_BYTES = 110
Q4_K_BYTES = 144
Q5_K_BYTES = 176
Q6_K_BYTES = 210


@device
def decode_q2_k(out: NDArray[np.float32], raw: NDArray[np.uint8]) -> None:
    """out (cols,) f32 from superblocks: 16 B scales and minima, 64 B of 2-bit, d, dmin f16."""
    for block in range(out.size // SUPERBLOCK):
        at = Q2_K_BYTES * block
        factor, floor = f16_at(raw, at + 80), f16_at(raw, at + 82)
        for group in range(16):
            half, quarter, part = group >> 3, (group >> 1) & 3, group & 1
            shift = np.uint8(2 * quarter)
            step = factor * np.float32(raw[at + group] & np.uint8(15))
            offset = floor * np.float32(raw[at + group] >> np.uint8(4))
            values = out[SUPERBLOCK * block + 16 * group : SUPERBLOCK * block + 16 * (group + 1)]
            packed = raw[at + 16 + 32 * half + 16 * part :]
            for i in range(values.size):
                values[i] = step * np.float32((packed[i] >> shift) & np.uint8(3)) - offset


@device
def decode_q3_k(out: NDArray[np.float32], raw: NDArray[np.uint8]) -> None:
    """out (cols,) f32 from superblocks: 32 B of third bits, 64 B of 2-bit, 12 B scales, d f16."""
    for block in range(out.size // SUPERBLOCK):
        at = Q3_K_BYTES * block
        factor = f16_at(raw, at + 108)
        for group in range(16):
            half, quarter, part = group >> 3, (group >> 1) & 3, group & 1
            shift, third = np.uint8(2 * quarter), np.uint8(4 * half + quarter)
            step = factor * np.float32(_q3_k_scale(raw, at + 96, group))
            values = out[SUPERBLOCK * block + 16 * group : SUPERBLOCK * block + 16 * (group + 1)]
            mask = raw[at + 16 * part :]
            packed = raw[at + 32 + 32 * half + 16 * part :]
            for i in range(values.size):
                low = (packed[i] >> shift) & np.uint8(3)
                high = (mask[i] >> third) & np.uint8(1)
                level = np.int32(np.int32(low | (high << np.uint8(2))) - np.int32(4))
                values[i] = step * np.float32(level)


@device
def _q3_k_scale(raw: NDArray[np.uint8], at: int, group: int) -> np.int32:
    """Return the signed scale of one of 16 groups: four bits of it in bytes 0-7, two in 8-11."""
    low = raw[at + (group & 7)] >> np.uint8(4 * (group >> 3))
    high = raw[at + 8 + (group & 3)] >> np.uint8(2 * (group >> 2))
    joined = (low & np.uint8(15)) | np.uint8((high & np.uint8(3)) << np.uint8(4))
    return np.int32(np.int32(joined) - np.int32(32))


@device
def decode_q4_k(out: NDArray[np.float32], raw: NDArray[np.uint8]) -> None:
    """out (cols,) f32 from superblocks: d, dmin f16, 12 B scales and minima, 128 B nibbles."""
    for block in range(out.size // SUPERBLOCK):
        at = Q4_K_BYTES * block
        factor, floor = f16_at(raw, at), f16_at(raw, at + 2)
        for group in range(8):
            scale, minimum = _scale_and_minimum(raw, at + 4, group)
            step, offset = factor * scale, floor * minimum
            shift = np.uint8(4 * (group & 1))
            values = out[SUPERBLOCK * block + 32 * group : SUPERBLOCK * block + 32 * (group + 1)]
            packed = raw[at + 16 + 32 * (group >> 1) :]
            for i in range(values.size):
                values[i] = step * np.float32((packed[i] >> shift) & np.uint8(15)) - offset


@device
def decode_q5_k(out: NDArray[np.float32], raw: NDArray[np.uint8]) -> None:
    """out (cols,) f32 from superblocks as Q4_K, with 32 B of fifth bits before the nibbles."""
    for block in range(out.size // SUPERBLOCK):
        at = Q5_K_BYTES * block
        factor, floor = f16_at(raw, at), f16_at(raw, at + 2)
        for group in range(8):
            scale, minimum = _scale_and_minimum(raw, at + 4, group)
            step, offset = factor * scale, floor * minimum
            shift, fifth = np.uint8(4 * (group & 1)), np.uint8(group)
            values = out[SUPERBLOCK * block + 32 * group : SUPERBLOCK * block + 32 * (group + 1)]
            high_bits = raw[at + 16 :]
            packed = raw[at + 48 + 32 * (group >> 1) :]
            for i in range(values.size):
                low = (packed[i] >> shift) & np.uint8(15)
                high = (high_bits[i] >> fifth) & np.uint8(1)
                values[i] = step * np.float32(low | (high << np.uint8(4))) - offset


@device
def _scale_and_minimum(
    raw: NDArray[np.uint8], at: int, group: int
) -> tuple[np.float32, np.float32]:
    """Return the 6-bit scale and minimum of one of 8 groups from the 12 bytes at `at`."""
    if group < 4:
        scale = raw[at + group] & np.uint8(63)
        minimum = raw[at + group + 4] & np.uint8(63)
    else:
        low = raw[at + group + 4]
        scale = (low & np.uint8(15)) | ((raw[at + group - 4] >> np.uint8(6)) << np.uint8(4))
        minimum = (low >> np.uint8(4)) | ((raw[at + group] >> np.uint8(6)) << np.uint8(4))
    return np.float32(scale), np.float32(minimum)


@device
def decode_q6_k(out: NDArray[np.float32], raw: NDArray[np.uint8]) -> None:
    """out (cols,) f32 from superblocks: 128 B nibbles, 64 B upper 2 bits, 16 int8 scales, d f16."""
    signed = raw.view(np.int8)
    for block in range(out.size // SUPERBLOCK):
        at = Q6_K_BYTES * block
        factor = f16_at(raw, at + 208)
        for group in range(16):
            half, quarter, part = group >> 3, (group >> 1) & 3, group & 1
            low_shift, high_shift = np.uint8(4 * (quarter >> 1)), np.uint8(2 * quarter)
            step = factor * np.float32(signed[at + 192 + group])
            values = out[SUPERBLOCK * block + 16 * group : SUPERBLOCK * block + 16 * (group + 1)]
            lower = raw[at + 64 * half + 32 * (quarter & 1) + 16 * part :]
            upper = raw[at + 128 + 32 * half + 16 * part :]
            for i in range(values.size):
                low = (lower[i] >> low_shift) & np.uint8(15)
                high = (upper[i] >> high_shift) & np.uint8(3)
                level = np.int32(np.int32(low | (high << np.uint8(4))) - np.int32(32))
                values[i] = step * np.float32(level)
