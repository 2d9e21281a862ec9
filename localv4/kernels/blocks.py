"""Stored weight rows to float32: one integer code and one decoder per storage format."""

import numpy as np
from numpy.typing import NDArray

from localv4.kernels import iquants, kquants, plain, quants
from localv4.kernels.device import device

# The codes are indices into FORMATS, the names that storage uses.
F32, F16, BF16, F8, FP4, Q8_0, Q4_0, IQ4_NL = range(8)
MXFP4, Q4_K, Q5_K, Q6_K, Q2_K, Q3_K, IQ4_XS, IQ2_XXS = range(8, 16)
FORMATS = (
    *("F32", "F16", "BF16", "F8", "FP4", "Q8_0", "Q4_0", "IQ4_NL"),
    *("MXFP4", "Q4_K", "Q5_K", "Q6_K", "Q2_K", "Q3_K", "IQ4_XS", "IQ2_XXS"),
)
# Columns and bytes of the smallest unit of a row, by code; the scales of F8 and FP4 are apart.
UNITS = (
    *((1, 4), (1, 2), (1, 2), (1, 1), (2, 1)),
    (quants.BLOCK, quants.Q8_0_BYTES),
    (quants.BLOCK, quants.Q4_0_BYTES),
    (quants.BLOCK, quants.IQ4_NL_BYTES),
    (quants.BLOCK, quants.MXFP4_BYTES),
    (kquants.SUPERBLOCK, kquants.Q4_K_BYTES),
    (kquants.SUPERBLOCK, kquants.Q5_K_BYTES),
    (kquants.SUPERBLOCK, kquants.Q6_K_BYTES),
    (kquants.SUPERBLOCK, kquants.Q2_K_BYTES),
    (kquants.SUPERBLOCK, kquants.Q3_K_BYTES),
    (iquants.SUPERBLOCK, iquants.IQ4_XS_BYTES),
    (iquants.SUPERBLOCK, iquants.IQ2_XXS_BYTES),
)


def row_bytes(fmt: int, cols: int) -> int:
    """Return the bytes of a row of `cols` values, scales of F8 and FP4 not counted.

    Raises ValueError if `cols` is not a whole number of blocks.
    """
    unit_cols, unit_bytes = UNITS[fmt]
    if cols % unit_cols:
        raise ValueError(f"{cols} columns are not a multiple of {unit_cols} ({FORMATS[fmt]})")
    return cols // unit_cols * unit_bytes


@device
def decode_row(
    out: NDArray[np.float32],
    fmt: int,
    data: NDArray[np.uint8],
    scale: NDArray[np.uint8],
    row: int,
) -> None:
    """Write row `row` of a stored matrix to out (cols,) f32; NaN if `fmt` is no format code.

    data (rows, row_bytes(fmt, cols)) u8; scale u8: (ceil(rows / 128), ceil(cols / 128)) for F8,
    (rows, ceil(cols / 32)) for FP4, else unused.
    """
    raw = data[row]
    if fmt == F32:
        plain.decode_f32(out, raw)
    elif fmt == F16:
        plain.decode_f16(out, raw)
    elif fmt == BF16:
        plain.decode_bf16(out, raw)
    elif fmt == F8:
        plain.decode_f8(out, raw, scale[row // plain.F8_BLOCK])
    elif fmt == FP4:
        plain.decode_fp4(out, raw, scale[row])
    else:
        _decode_ggml(out, fmt, raw)


@device
def _decode_ggml(out: NDArray[np.float32], fmt: int, raw: NDArray[np.uint8]) -> None:
    if fmt == Q8_0:
        quants.decode_q8_0(out, raw)
    elif fmt == Q4_0:
        quants.decode_q4_0(out, raw)
    elif fmt == IQ4_NL:
        quants.decode_iq4_nl(out, raw)
    elif fmt == MXFP4:
        quants.decode_mxfp4(out, raw)
    elif fmt == Q4_K:
        kquants.decode_q4_k(out, raw)
    elif fmt == Q5_K:
        kquants.decode_q5_k(out, raw)
    elif fmt == Q6_K:
        kquants.decode_q6_k(out, raw)
    elif fmt == Q2_K:
        kquants.decode_q2_k(out, raw)
    elif fmt == Q3_K:
        kquants.decode_q3_k(out, raw)
    elif fmt == IQ4_XS:
        iquants.decode_iq4_xs(out, raw)
    elif fmt == IQ2_XXS:
        iquants.decode_iq2_xxs(out, raw)
    else:
        out[:] = np.float32(np.nan)
