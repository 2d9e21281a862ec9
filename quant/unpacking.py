"""The values of packed matrices in NumPy, by the tables of `kernels.packed*` alone.

What packs and what multiplies is compiled code elsewhere; a proof that they keep values must not
use it. Every function takes groups of sixteen rows, `lines` (groups, superblocks, bytes), and
returns rows (16 * groups, columns) as float32, with the operations of ggml in their order.
"""

from collections.abc import Callable, Mapping

import numpy as np
from numpy.typing import NDArray

from localv4.kernels.iquants import GRID
from localv4.kernels.packed import F8, F8_SPAN, GROUP_ROWS, MX4, Q4, Q8, PackedFormat, group_bytes
from localv4.kernels.packed_kquants import IQ2, Q2, Q3, Q4K, Q6
from localv4.kernels.packing_floats import B16, F32R
from localv4.model.matrix import Floats, Packed
from localv4.model.packing import PackedMatrix

F32 = np.float32
_HEAD, _STEPS = 64, 4

E2M1 = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6], F32)
_FP4 = np.concatenate([E2M1, -E2M1])
_PARITY = np.array([bin(number).count("1") & 1 for number in range(128)], np.uint8)


def unpacked(matrix: PackedMatrix, first: int, end: int) -> Floats:
    """Return rows `first` to `end` of a packed matrix; `first` is a multiple of 128."""
    nbytes = group_bytes(matrix.form, matrix.cols)
    groups = matrix.packed.reshape(-1, nbytes)[first // GROUP_ROWS : -(-end // GROUP_ROWS)]
    lines = np.ascontiguousarray(groups).reshape(len(groups), -1, matrix.form.superblock_bytes)
    values = _UNPACKERS[matrix.form](lines)[: end - first]
    if matrix.scales is not None:
        scales = matrix.scales[first // F8_SPAN : -(-end // F8_SPAN)]
        values = values * np.repeat(np.repeat(scales, F8_SPAN, 0)[: len(values)], F8_SPAN, 1)
    return values


def _rows(values: NDArray[np.generic]) -> Floats:
    """(groups, superblocks, 16, columns) to rows."""
    groups = values.shape[0]
    turned = values.transpose(0, 2, 1, 3).reshape(GROUP_ROWS * groups, -1)
    return np.ascontiguousarray(turned, F32)


def _nibbles(lines: Packed) -> Packed:
    """Blocks of four lines (..., 256): columns 8j + i low, 8j + 4 + i high, to (..., 16, 32)."""
    halves = np.stack([lines & 15, lines >> 4], -1)  # ..., byte, half
    split = halves.reshape(*lines.shape[:-1], 4, 16, 4, 2)  # ..., line, lane, i, half
    order = (*range(lines.ndim - 1), *(lines.ndim - 1 + k for k in (1, 0, 3, 2)))
    return split.transpose(order).reshape(*lines.shape[:-1], 16, 32)


def _mx4(lines: Packed) -> Floats:
    scales = lines[:, :, :_HEAD].reshape(*lines.shape[:2], 4, 16).transpose(0, 1, 3, 2)
    codes = _lanes_first(_nibbles(lines[:, :, _HEAD:].reshape(*lines.shape[:2], 4, 256)))
    values = _FP4[codes] * _powers(scales)[..., None]
    return _rows(values.reshape(*values.shape[:3], -1))


def _lanes_first(blocks: Packed) -> Packed:
    """(groups, superblocks, blocks, 16, n) to (groups, superblocks, 16, blocks, n)."""
    return blocks.transpose(0, 1, 3, 2, 4)


def _powers(codes: Packed) -> Floats:
    """UE8M0 to float32."""
    bits: NDArray[np.uint32] = codes.astype(np.uint32) << np.uint32(23)
    bits[codes == 0] = 0x00400000
    return bits.view(F32)


def _half_scales(lines: Packed) -> Floats:
    halves = np.ascontiguousarray(lines[:, :, :_HEAD]).view("<f2")
    return halves.reshape(*lines.shape[:2], 2, 16).transpose(0, 1, 3, 2).astype(F32)


def _q4(lines: Packed) -> Floats:
    codes = _lanes_first(_nibbles(lines[:, :, _HEAD:].reshape(*lines.shape[:2], 2, 256)))
    values = (codes.astype(F32) - F32(8)) * _half_scales(lines)[..., None]
    return _rows(values.reshape(*values.shape[:3], -1))


def _q8(lines: Packed) -> Floats:
    shape = (*lines.shape[:2], 2, 8, 16, 4)  # block, line, lane, i
    codes = lines[:, :, _HEAD:].view(np.int8).reshape(shape).transpose(0, 1, 4, 2, 3, 5)
    values = codes.reshape(*codes.shape[:4], 32).astype(F32) * _half_scales(lines)[..., None]
    return _rows(values.reshape(*values.shape[:3], -1))


def _f8(lines: Packed) -> Floats:
    codes = lines.transpose(0, 2, 1).reshape(-1, lines.shape[1]).astype(np.uint32)
    exponent, mantissa = (codes >> 3) & 15, codes & 7
    small = mantissa.astype(F32) * F32(2.0**-9)
    normal = (((exponent + 120) << 23) | (mantissa << 20)).view(F32)
    size = np.where(exponent == 0, small, normal)
    return np.where(codes & 0x80, -size, size).astype(F32)


def _b16(lines: Packed) -> Floats:
    bits = np.ascontiguousarray(lines).view("<u2").astype(np.uint32) << 16
    return np.ascontiguousarray(bits.view(F32).transpose(0, 2, 1)).reshape(-1, lines.shape[1])


def _f32r(lines: Packed) -> Floats:
    values = np.ascontiguousarray(lines).view("<f4").transpose(0, 2, 1)
    return np.ascontiguousarray(values, F32).reshape(-1, lines.shape[1])


# --- formats of superblocks of 256 columns, in steps of 64


def _cut(lines: Packed, scale_lines: int) -> tuple[Packed, Packed, Packed]:
    """Return head, scales (groups, superblocks, bytes) and codes (..., steps, bytes of a step)."""
    begin = _HEAD * (1 + scale_lines)
    codes = lines[:, :, begin:].reshape(*lines.shape[:2], _STEPS, -1)
    return lines[:, :, :_HEAD], lines[:, :, _HEAD:begin], codes


def _float_heads(head: Packed) -> Floats:
    return np.ascontiguousarray(head).view("<f4").astype(F32)[:, :, :, None]


def _half_heads(head: Packed) -> tuple[Floats, Floats]:
    halves = np.ascontiguousarray(head).view("<f2").astype(F32)
    return halves[:, :, :16, None], halves[:, :, 16:, None]


def _six_bit_numbers(scales: Packed) -> Packed:
    """Three lines to (groups, superblocks, 16, steps, 4): the numbers n0 ... n3 of each step."""
    shape = (*scales.shape[:2], _STEPS, 16)
    words = np.ascontiguousarray(scales[:, :, :128]).view("<u2").reshape(shape).astype(np.uint8)
    upper = np.ascontiguousarray(scales[:, :, :128]).view("<u2").reshape(shape) >> 8
    high = scales[:, :, 128:].reshape(shape)
    low, top = words, upper.astype(np.uint8)
    third = (low >> 6) | ((high & 15) << 2)
    fourth = (top >> 6) | ((high >> 4) << 2)
    numbers = np.stack([low & 63, top & 63, third, fourth], -1)
    return numbers.transpose(0, 1, 3, 2, 4)


def _scaled(codes: NDArray[np.generic], scales: Floats, least: Floats | None = None) -> Floats:
    """codes (groups, superblocks, 16, parts, n) with the factors of their parts, to rows."""
    values = scales[..., None] * codes.astype(F32)
    if least is not None:
        values = values - least[..., None]
    return _rows(values.reshape(*values.shape[:3], -1))


def _q4k(lines: Packed) -> Floats:
    head, scales, codes = _cut(lines, 3)
    d, m = _half_heads(head)
    numbers = _six_bit_numbers(scales).astype(F32)
    shape = (*numbers.shape[:3], 8)
    blocks = _lanes_first(_nibbles(codes.reshape(*codes.shape[:2], 8, 256)))
    step = d * numbers[..., :2].reshape(shape)
    return _scaled(blocks, step, m * numbers[..., 2:].reshape(shape))


def _q6(lines: Packed) -> Floats:
    head, scales, codes = _cut(lines, 4)
    parts = scales.view(np.int8).reshape(*scales.shape[:2], 16, 16).transpose(0, 1, 3, 2)
    split = codes.reshape(*codes.shape[:2], 16, 3, 16, 4)  # part, line, lane, i
    low, top = split & 63, split >> 6
    last = top[..., 0, :, :] | (top[..., 1, :, :] << 2) | (top[..., 2, :, :] << 4)
    columns = np.concatenate([low, last[..., None, :, :]], -3)  # part, quarter, lane, i
    turned = columns.transpose(0, 1, 4, 2, 3, 5).reshape(*codes.shape[:2], 16, 16, 16)
    return _scaled(turned.astype(F32) - F32(32), _float_heads(head) * parts.astype(F32))


def _q3(lines: Packed) -> Floats:
    head, scales, codes = _cut(lines, 3)
    numbers = _six_bit_numbers(scales).astype(F32) - F32(32)
    factors = _float_heads(head) * numbers.reshape(*numbers.shape[:3], 16)
    split = codes.reshape(*codes.shape[:2], 8, 3, 16, 4)  # block, line, lane, i
    low, high, top = split & 7, (split >> 3) & 7, split >> 6
    eights = np.stack([low, high], -3).reshape(*codes.shape[:2], 8, 6, 16, 4)
    sixth = top[..., 0, :, :] | ((top[..., 2, :, :] & 1) << 2)
    seventh = top[..., 1, :, :] | ((top[..., 2, :, :] >> 1) << 2)
    tail = np.stack([sixth, seventh], -3)
    columns = np.concatenate([eights, tail], -3)  # block, eighth, lane, i
    turned = columns.transpose(0, 1, 4, 2, 3, 5).reshape(*codes.shape[:2], 16, 16, 16)
    return _scaled(turned.astype(F32) - F32(4), factors)


def _q2(lines: Packed) -> Floats:
    head, scales, codes = _cut(lines, 4)
    d, m = _half_heads(head)
    words = np.ascontiguousarray(scales).view("<u4").reshape(*scales.shape[:2], _STEPS, 16)
    shifts = np.arange(0, 32, 4, dtype=np.uint32)
    nibbles = ((words[..., None] >> shifts) & 15).transpose(0, 1, 3, 2, 4).astype(F32)
    shape = (*nibbles.shape[:3], 16)
    scale = nibbles[..., [0, 4, 1, 5]].reshape(shape)
    least = nibbles[..., [2, 6, 3, 7]].reshape(shape)
    split = codes.reshape(*codes.shape[:2], 16, 16, 4)  # part, lane, i
    columns = np.stack([(split >> (2 * j)) & 3 for j in range(4)], -2)  # part, lane, j, i
    turned = columns.transpose(0, 1, 3, 2, 4, 5).reshape(*codes.shape[:2], 16, 16, 16)
    return _scaled(turned, d * scale, m * least)


_SIGN_BITS = (2, 5, 3, 4, 6, 1, 0)
"""Which bit has the sign of a column, of the first seven as the table of IQ2 counts them."""

_SIGN_COLUMNS = (0, 1, 2, 3, 4, 5, 7)


def _iq2(lines: Packed) -> Floats:
    head, _, codes = _cut(lines, 0)
    split = codes.reshape(*codes.shape[:2], 8, 2, 16, 4)  # block, line, lane, i
    points, signs = split[..., 0, :, :], split[..., 1, :, :]
    scale = sum((signs[..., i] >> 7).astype(np.uint8) << i for i in range(4))
    minus = np.zeros((*signs.shape, 8), bool)
    for column, bit in zip(_SIGN_COLUMNS, _SIGN_BITS, strict=True):
        minus[..., column] = (signs >> bit) & 1
    minus[..., 6] = _PARITY[signs & 127]
    values = GRID[points]
    values = np.where(minus, -values, values)
    values = values.reshape(*codes.shape[:2], 8, 16, 32).transpose(0, 1, 3, 2, 4)
    steps = (2 * np.asarray(scale, np.int32) + 1).astype(F32).transpose(0, 1, 3, 2)
    return _scaled(values, _float_heads(head) * steps)


_UNPACKERS: Mapping[PackedFormat, Callable[[Packed], Floats]] = {
    **{MX4: _mx4, Q4: _q4, Q8: _q8, F8: _f8, B16: _b16, F32R: _f32r},
    **{Q4K: _q4k, Q6: _q6, Q3: _q3, Q2: _q2, IQ2: _iq2},
}
