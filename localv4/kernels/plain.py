"""Rows of the plain formats and of the two block formats of the official checkpoint."""

import numpy as np
from numpy.typing import NDArray

from localv4.kernels.device import device
from localv4.kernels.floats import bf16, e2m1_doubled, e4m3, e8m0, e8m0_halved, f16

F8_BLOCK = 128
FP4_BLOCK = 32


@device
def decode_f32(out: NDArray[np.float32], raw: NDArray[np.uint8]) -> None:
    """out (cols,) f32 from raw (4 * cols,) u8."""
    out[:] = raw.view(np.float32)


@device
def decode_f16(out: NDArray[np.float32], raw: NDArray[np.uint8]) -> None:
    """out (cols,) f32 from raw (2 * cols,) u8."""
    halves = raw.view(np.uint16)
    for i in range(out.size):
        out[i] = f16(halves[i])


@device
def decode_bf16(out: NDArray[np.float32], raw: NDArray[np.uint8]) -> None:
    """out (cols,) f32 from raw (2 * cols,) u8."""
    halves = raw.view(np.uint16)
    for i in range(out.size):
        out[i] = bf16(halves[i])


@device
def decode_f8(out: NDArray[np.float32], raw: NDArray[np.uint8], scale: NDArray[np.uint8]) -> None:
    """out (cols,) f32 from raw (cols,) E4M3 codes and scale (ceil(cols / 128),) UE8M0 codes."""
    for block in range(scale.size):
        factor = e8m0(scale[block])
        values = out[F8_BLOCK * block : F8_BLOCK * (block + 1)]
        codes = raw[F8_BLOCK * block : F8_BLOCK * (block + 1)]
        for i in range(values.size):
            values[i] = e4m3(codes[i]) * factor


@device
def decode_fp4(out: NDArray[np.float32], raw: NDArray[np.uint8], scale: NDArray[np.uint8]) -> None:
    """out (cols,) f32 from raw (cols / 2,) u8 and scale (ceil(cols / 32),) UE8M0 codes.

    The low nibble of a byte is the even column.
    """
    for block in range(scale.size):
        factor = np.float32(np.nan) if scale[block] == np.uint8(255) else e8m0_halved(scale[block])
        values = out[FP4_BLOCK * block : FP4_BLOCK * (block + 1)]
        pairs = raw[FP4_BLOCK // 2 * block : FP4_BLOCK // 2 * (block + 1)]
        for j in range(pairs.size):
            values[2 * j] = _e2m1_scaled(pairs[j] & np.uint8(15), factor)
            values[2 * j + 1] = _e2m1_scaled(pairs[j] >> np.uint8(4), factor)


@device
def _e2m1_scaled(code: np.uint8, factor: np.float32) -> np.float32:
    return np.float32(e2m1_doubled(code)) * (-factor if code > np.uint8(7) else factor)
