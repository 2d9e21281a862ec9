"""Rows of the ggml formats with blocks of 32 values and one scale.

Byte j of a block of nibbles holds element j (low) and element j + 16 (high). Products are taken in
float32 in the order of gguf-py, so that results are equal to the bit.
"""

import numpy as np
from numpy.typing import NDArray

from localv4.kernels.device import device
from localv4.kernels.floats import e2m1_doubled, e8m0_halved, f16_at

BLOCK = 32
Q8_0_BYTES = 34
Q4_0_BYTES = 18
IQ4_NL_BYTES = 18
MXFP4_BYTES = 17

# The levels of the sixteen codes of IQ4_NL and IQ4_XS, finer around zero (ggml `kvalues_iq4nl`).
# Eight of them fit a word; shifting a word becomes vector code, which a table lookup does not.
IQ4_LEVELS = (-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113)
IQ4_WORDS = np.array(IQ4_LEVELS, np.int8).view(np.dtype("<u8")).astype(np.uint64)
IQ4_LOWER, IQ4_UPPER = IQ4_WORDS[0], IQ4_WORDS[1]


@device
def decode_q8_0(out: NDArray[np.float32], raw: NDArray[np.uint8]) -> None:
    """out (cols,) f32 from blocks of an f16 scale and 32 int8."""
    signed = raw.view(np.int8)
    for block in range(out.size // BLOCK):
        at = Q8_0_BYTES * block
        factor = f16_at(raw, at)
        values = out[BLOCK * block : BLOCK * (block + 1)]
        levels = signed[at + 2 : at + Q8_0_BYTES]
        for i in range(levels.size):
            values[i] = np.float32(levels[i]) * factor


@device
def decode_q4_0(out: NDArray[np.float32], raw: NDArray[np.uint8]) -> None:
    """out (cols,) f32 from blocks of an f16 scale and 32 nibbles with bias 8."""
    for block in range(out.size // BLOCK):
        at = Q4_0_BYTES * block
        factor = f16_at(raw, at)
        lower = out[BLOCK * block : BLOCK * block + 16]
        upper = out[BLOCK * block + 16 : BLOCK * (block + 1)]
        packed = raw[at + 2 : at + Q4_0_BYTES]
        for j in range(packed.size):
            lower[j] = np.float32(_biased(packed[j] & np.uint8(15))) * factor
            upper[j] = np.float32(_biased(packed[j] >> np.uint8(4))) * factor


@device
def _biased(code: np.uint8) -> np.int32:
    return np.int32(np.int32(code) - np.int32(8))


@device
def decode_iq4_nl(out: NDArray[np.float32], raw: NDArray[np.uint8]) -> None:
    """out (cols,) f32 from blocks of an f16 scale and 32 nibbles that index IQ4_LEVELS."""
    for block in range(out.size // BLOCK):
        at = IQ4_NL_BYTES * block
        decode_iq4_nibbles(out, BLOCK * block, raw, at + 2, f16_at(raw, at))


@device
def decode_iq4_nibbles(
    out: NDArray[np.float32], start: int, raw: NDArray[np.uint8], at: int, factor: np.float32
) -> None:
    """Write 32 values from `start` of out: the levels of the 16 bytes from `at` of raw, scaled."""
    for j in range(16):
        out[start + j] = _iq4_level(raw[at + j] & np.uint8(15)) * factor
        out[start + 16 + j] = _iq4_level(raw[at + j] >> np.uint8(4)) * factor


@device
def _iq4_level(code: np.uint8) -> np.float32:
    word = IQ4_LOWER if code < np.uint8(8) else IQ4_UPPER
    shift = np.uint64(code & np.uint8(7)) << np.uint64(3)
    return np.float32(np.uint8((word >> shift) & np.uint64(255)).view(np.int8))


@device
def decode_mxfp4(out: NDArray[np.float32], raw: NDArray[np.uint8]) -> None:
    """out (cols,) f32 from blocks of a UE8M0 scale and 32 E2M1 nibbles; there is no minus zero."""
    for block in range(out.size // BLOCK):
        at = MXFP4_BYTES * block
        factor = e8m0_halved(raw[at])
        start = BLOCK * block
        for j in range(16):
            byte = raw[at + 1 + j]
            out[start + j] = np.float32(_e2m1_signed(byte & np.uint8(15))) * factor
            out[start + 16 + j] = np.float32(_e2m1_signed(byte >> np.uint8(4))) * factor


@device
def _e2m1_signed(code: np.uint8) -> np.int32:
    magnitude = e2m1_doubled(code)
    return np.int32(-magnitude) if code > np.uint8(7) else magnitude
