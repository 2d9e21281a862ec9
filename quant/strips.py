"""Matrices in strips of rows: what a thread converts at a time, whatever the size of the whole."""

import mmap
from collections.abc import Iterator, Mapping

import numpy as np

from localv4.kernels import blocks
from localv4.kernels.packed import F8_SPAN
from localv4.model.matrix import Matrix, Packed

STRIP_VALUES = 1 << 20
"""Values of a strip, about: 4 MiB as float32."""


def strips_of(rows: int, cols: int, unit: int = F8_SPAN) -> Iterator[tuple[int, int]]:
    """Yield first and end row of each strip; all but the last have a multiple of `unit` rows."""
    height = max(1, STRIP_VALUES // (cols * unit)) * unit
    for first in range(0, rows, height):
        yield first, min(first + height, rows)


def strip(matrix: Matrix, first: int, end: int) -> Matrix:
    """Return rows `first` to `end`; `first` is a multiple of 128 for a matrix of FP8."""
    scale = matrix.scale
    if matrix.format == blocks.FP4:
        scale = scale[first:end]
    elif matrix.format == blocks.F8:
        scale = scale[first // F8_SPAN : -(-end // F8_SPAN)]
    return Matrix(matrix.format, end - first, matrix.cols, matrix.data[first:end], scale)


def is_finite(matrix: Matrix) -> bool:
    """Tell whether no stored value is a NaN or an infinity, by its codes and scales.

    The last scales before the NaN of E8M0 count as infinite: the largest code overflows there.
    """
    data, fmt = matrix.data, matrix.format
    if fmt == blocks.FP4:
        return int(matrix.scale.max()) <= _MOST_FP4
    if fmt == blocks.F8:
        codes_finite = not bool(((data & 0x7F) == 0x7F).any())
        return codes_finite and int(matrix.scale.max()) <= _MOST_F8
    if fmt in _WORDS:
        dtype, exponent = _WORDS[fmt]
        words = np.ascontiguousarray(data).view(dtype)
        return not bool(((words & exponent) == exponent).any())
    unit = blocks.UNITS[fmt][1]
    units = data.reshape(-1, unit)
    if fmt == blocks.MXFP4:
        return int(units[:, 0].max()) <= _MOST_FP4
    for at in _HALVES[fmt]:
        high = units[:, at + 1] & 0x7C  # the upper byte of a half: its exponent is all ones
        if bool((high == 0x7C).any()):
            return False
    return True


_MOST_FP4 = 252  # 6 * 2^(252 - 127) is finite
_MOST_F8 = 246  # 448 * 2^(246 - 127) is finite
_WORDS: Mapping[int, tuple[str, int]] = {
    blocks.F32: ("<u4", 0x7F800000),
    blocks.F16: ("<u2", 0x7C00),
    blocks.BF16: ("<u2", 0x7F80),
}
_HALVES = {
    **dict.fromkeys((blocks.Q8_0, blocks.Q4_0, blocks.IQ4_NL), (0,)),
    **dict.fromkeys((blocks.IQ4_XS, blocks.IQ2_XXS), (0,)),
    **dict.fromkeys((blocks.Q4_K, blocks.Q5_K), (0, 2)),
    blocks.Q2_K: (80, 82),
    blocks.Q3_K: (108,),
    blocks.Q6_K: (208,),
}
"""Where the f16 scales of a block begin."""


def give_back(matrix: Matrix) -> None:
    """Tell the system that the pages of a mapped matrix are not needed in memory any more.

    They stay in the page cache; but mapped pages count as memory of this process, and a source may
    be far larger than that.
    """
    for part in (matrix.data, matrix.scale):
        _give_back_pages(part)


def _give_back_pages(part: Packed) -> None:
    owner = part.base
    while isinstance(owner, np.ndarray):
        owner = owner.base
    if isinstance(owner, memoryview):
        owner = owner.obj
    if not isinstance(owner, mmap.mmap) or not hasattr(mmap, "MADV_DONTNEED") or part.size == 0:
        return
    start = np.frombuffer(owner, np.uint8, 1).ctypes.data
    begin = (part.ctypes.data - start) // mmap.PAGESIZE * mmap.PAGESIZE
    end = part.ctypes.data - start + part.nbytes
    owner.madvise(mmap.MADV_DONTNEED, begin, min(end, len(owner)) - begin)
