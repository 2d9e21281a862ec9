"""Random legal blocks of the ggml types; layouts as in `localv4.kernels.quants` and `kquants`."""

import numpy as np
from numpy.typing import NDArray
from synthetic_values import (
    PLAIN_BLOCKS,
    STD_E2M1,
    STD_INT4,
    STD_INT8,
    STD_IQ2,
    BlockType,
    Bytes,
    exponent_code,
)

F32 = np.float32

STD_INT6 = 18.5
MEAN_SCALE_6_BITS = 48.4  # root mean square of 32 ... 63
MEAN_SCALE_4_BITS = 11.7  # of 8 ... 15
STD_TWO_BITS = 1.118


def _halves(values: NDArray[np.float32]) -> Bytes:
    """Return f16 numbers as two bytes each, (count, 2)."""
    return values.astype("<f2").view(np.uint8).reshape(-1, 2)


def _near(noise: Bytes, value: float) -> NDArray[np.float32]:
    """Return numbers between 0.75 and 1.25 of `value`, one for each random byte."""
    near: NDArray[np.float32] = (F32(0.75) + noise.astype(F32) * F32(0.5 / 256)) * F32(value)
    return near


def _mxfp4(blocks: Bytes, std: float) -> None:
    blocks[:, 0] = exponent_code(std / STD_E2M1) + (blocks[:, 0] & 1)


def _q4_0(blocks: Bytes, std: float) -> None:
    blocks[:, :2] = _halves(_near(blocks[:, 0], std / STD_INT4))


def _q8_0(blocks: Bytes, std: float) -> None:
    blocks[:, :2] = _halves(_near(blocks[:, 0], std / STD_INT8))


def _q4_k(blocks: Bytes, std: float) -> None:
    """The least value of a block is 7.5 of its scale, so that the mean is zero."""
    d = _near(blocks[:, 0], std / (STD_INT4 * MEAN_SCALE_6_BITS))
    blocks[:, :2], blocks[:, 2:4] = _halves(d), _halves(d * F32(7.5))
    # eight numbers of six bits, 32 ... 63, each of them a scale and a least value
    numbers = 32 | (blocks[:, 4:12] & 31)
    low, high = numbers[:, :4], numbers[:, 4:]
    blocks[:, 4:8] = blocks[:, 8:12] = low | (high >> 4 << 6)
    blocks[:, 12:16] = (high & 15) * 17


def _q6_k(blocks: Bytes, std: float) -> None:
    """128 + 64 bytes of codes, sixteen scales, d."""
    blocks[:, 192:208] = 32 | (blocks[:, 192:208] & 31)
    d = _near(blocks[:, 208], std / (STD_INT6 * MEAN_SCALE_6_BITS))
    blocks[:, 208:210] = _halves(d)


def _q2_k(blocks: Bytes, std: float) -> None:
    """Sixteen bytes of scale and least value, both the same; codes; d and 1.5 d."""
    blocks[:, :16] = (8 | (blocks[:, :16] & 7)) * 17
    d = _near(blocks[:, 80], std / (STD_TWO_BITS * MEAN_SCALE_4_BITS))
    blocks[:, 80:82], blocks[:, 82:84] = _halves(d), _halves(d * F32(1.5))


def _iq2_xxs(blocks: Bytes, std: float) -> None:
    blocks[:, :2] = _halves(_near(blocks[:, 0], std / STD_IQ2))


GGML_BLOCKS = {
    "F32": PLAIN_BLOCKS["F32"],
    "BF16": PLAIN_BLOCKS["BF16"],
    "Q4_0": BlockType(32, 18, _q4_0),
    "Q8_0": BlockType(32, 34, _q8_0),
    "Q2_K": BlockType(256, 84, _q2_k),
    "Q4_K": BlockType(256, 144, _q4_k),
    "Q6_K": BlockType(256, 210, _q6_k),
    "IQ2_XXS": BlockType(256, 66, _iq2_xxs),
    "MXFP4": BlockType(32, 17, _mxfp4),
}
"""By the name of the type."""

TYPE_NUMBERS = {
    **{"F32": 0, "Q4_0": 2, "Q8_0": 8, "Q2_K": 10, "Q4_K": 12, "Q6_K": 14, "IQ2_XXS": 16},
    **{"I32": 26, "BF16": 30, "MXFP4": 39},
}
"""The numbers of the types in a GGUF file."""
