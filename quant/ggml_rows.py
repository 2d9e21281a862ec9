"""Rows as they are stored into rows of a ggml type that has the same values."""

from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from localv4.errors import BadFileError
from localv4.kernels import blocks
from localv4.model.matrix import Matrix, Packed, decode

_BLOCK = 32
_MXFP4_BYTES = 17
_LOW, _HALF = np.uint64(0x0F0F0F0F0F0F0F0F), np.uint64(4)


def kept_type(matrix: Matrix) -> str:
    """Return the ggml type that keeps the values of a matrix."""
    if matrix.format == blocks.FP4 and matrix.cols % _BLOCK == 0:
        return "MXFP4"
    if matrix.format in (blocks.FP4, blocks.F8):
        return "BF16"
    return blocks.FORMATS[matrix.format]


def kept_rows(matrix: Matrix, name: str, path: Path) -> Packed:
    """Return the rows of a matrix in the type `kept_type`, (rows, bytes of a row).

    The codes of FP4 stay codes; only MXFP4 has no minus zero and reads it as zero. Raises
    BadFileError, naming tensor and file, for FP8 beyond the range of BF16.
    """
    kind = kept_type(matrix)
    if kind == "MXFP4" and matrix.format == blocks.FP4:
        return mxfp4_rows(matrix)
    if kind == "BF16" and matrix.format != blocks.BF16:
        bits = decode(matrix).view(np.uint32)
        if (bits & 0xFFFF).any():
            raise BadFileError(path, f"tensor {name!r} has values that BF16 does not hold")
        return (bits >> 16).astype("<u2").view(np.uint8)
    return np.ascontiguousarray(matrix.data)


def mxfp4_rows(matrix: Matrix) -> Packed:
    """Return FP4 as MXFP4: a scale, then bytes of columns j and j + 16 instead of 2j and 2j + 1."""
    rows, count = matrix.rows, matrix.cols // _BLOCK
    words = np.ascontiguousarray(matrix.data).view("<u8").reshape(rows, count, 2)
    low, high = words[:, :, 0], words[:, :, 1]
    codes = np.empty((rows, count, 8, 2), np.uint8)
    codes[..., 0] = _bytes((low & _LOW) | ((high & _LOW) << _HALF))
    codes[..., 1] = _bytes(((low >> _HALF) & _LOW) | (high & ~_LOW))
    out = np.empty((rows, count, _MXFP4_BYTES), np.uint8)
    out[:, :, 0] = matrix.scale
    out[:, :, 1:] = codes.reshape(rows, count, 16)
    return out.reshape(rows, count * _MXFP4_BYTES)


def _bytes(words: NDArray[np.uint64]) -> Packed:
    return words.view(np.uint8).reshape(*words.shape, 8)
