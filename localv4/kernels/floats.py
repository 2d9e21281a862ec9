"""Small floating-point formats, decoded to float32 with integer arithmetic.

Numba cannot read float16 arrays on CPUs, and a table lookup does not become vector code, so every
format is rebuilt from its bits. All results are exact: float32 holds each of these values.
"""

import numpy as np
from numpy.typing import NDArray

from localv4.kernels.device import device

F32_MANTISSA_BITS = np.uint32(23)
F32_NAN = np.uint32(0x7FC00000)
# Magnitudes of the eight E2M1 codes, doubled to be whole; code k is hex digit k from the right.
E2M1_DOUBLED = np.uint32(0xC8643210)
# Exponent biases, moved to where float32 keeps its exponent.
F16_TO_F32 = np.uint32((127 - 15) << 23)
F16_TO_F32_SPECIAL = np.uint32((255 - 31) << 23)
E4M3_TO_F32 = np.uint32((127 - 7) << 23)


@device
def f16(bits: np.uint16) -> np.float32:
    """Value of an IEEE half, subnormals, infinities and NaN included."""
    magnitude = np.uint32(bits & np.uint16(0x7FFF))
    if magnitude >= np.uint32(0x7C00):
        value = (magnitude << np.uint32(13)) + F16_TO_F32_SPECIAL
    elif magnitude >= np.uint32(0x0400):
        value = (magnitude << np.uint32(13)) + F16_TO_F32
    else:
        value = np.float32(np.float32(np.int32(magnitude)) * np.float32(2.0**-24)).view(np.uint32)
    sign = np.uint32(bits & np.uint16(0x8000)) << np.uint32(16)
    return np.uint32(value | sign).view(np.float32)


@device
def f16_at(raw: NDArray[np.uint8], at: int) -> np.float32:
    """Value of the little-endian half at byte `at` of raw (bytes,) u8."""
    return f16(np.uint16(np.uint16(raw[at]) | np.uint16(np.uint16(raw[at + 1]) << np.uint16(8))))


@device
def bf16(bits: np.uint16) -> np.float32:
    """Value of a bfloat16: the upper half of a float32."""
    return np.uint32(np.uint32(bits) << np.uint32(16)).view(np.float32)


@device
def e4m3(code: np.uint8) -> np.float32:
    """Value of an FP8 E4M3 code (bias 7, no infinities; 0x7F and 0xFF are NaN)."""
    magnitude = np.uint32(code & np.uint8(0x7F))
    if magnitude == np.uint32(0x7F):
        value = F32_NAN
    elif magnitude >= np.uint32(8):
        value = (magnitude << np.uint32(20)) + E4M3_TO_F32
    else:
        value = np.float32(np.float32(np.int32(magnitude)) * np.float32(2.0**-9)).view(np.uint32)
    sign = np.uint32(code & np.uint8(0x80)) << np.uint32(24)
    return np.uint32(value | sign).view(np.float32)


@device
def e8m0(code: np.uint8) -> np.float32:
    """Value 2^(code - 127) of a UE8M0 scale; 255 is NaN, 0 is a float32 subnormal."""
    if code == np.uint8(255):
        return np.uint32(F32_NAN).view(np.float32)
    if code == np.uint8(0):
        return np.uint32(0x00400000).view(np.float32)
    return np.uint32(np.uint32(code) << F32_MANTISSA_BITS).view(np.float32)


@device
def e8m0_halved(code: np.uint8) -> np.float32:
    """Value 2^(code - 128), the factor of doubled E2M1 magnitudes; 255 is not special."""
    if code < np.uint8(2):
        return np.uint32(np.uint32(0x00200000) << np.uint32(code)).view(np.float32)
    return np.uint32(np.uint32(code - np.uint8(1)) << F32_MANTISSA_BITS).view(np.float32)


@device
def e2m1_doubled(code: np.uint8) -> np.int32:
    """Twice the magnitude of an FP4 E2M1 code (0..15), the sign left out."""
    digit = np.uint32(code & np.uint8(7)) << np.uint32(2)
    return np.int32((E2M1_DOUBLED >> digit) & np.uint32(15))
