"""NumPy twins of the forms of compressed rows: how they are written and what they read as."""

import numpy as np
from numpy.typing import NDArray

F32 = np.float32
Floats = NDArray[np.float32]
Bytes = NDArray[np.uint8]

_E2M1 = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6], F32)


def _e4m3_values() -> Floats:
    codes = np.arange(127)
    exponent, fraction = codes >> 3, codes & 7
    normal = (8 + fraction) * 2.0 ** (exponent - 10)
    return np.where(exponent == 0, fraction * 2.0**-9, normal).astype(F32)


_E4M3 = _e4m3_values()


def _nearest(values: Floats, table: Floats) -> NDArray[np.uint8]:
    """Codes of the nearest values of a table, of two equally near ones the even code; and signs."""
    size = np.abs(values).astype(np.float64)
    high = np.clip(np.searchsorted(table, size), 1, len(table) - 1)
    low = high - 1
    below, above = size - table[low], table[high] - size
    take_high = (above < below) | ((above == below) & (high % 2 == 0))
    codes = np.where(take_high, high, low).astype(np.uint8)
    return codes | (np.signbit(values).astype(np.uint8) * len(_half(table)))


def _half(table: Floats) -> range:
    """As many numbers as there are codes of one sign."""
    return range(128 if len(table) > 8 else 8)


def _exponents(groups: Floats, largest: float) -> NDArray[np.int64]:
    """The smallest k of each row for which all |values| / 2^k are at most `largest`."""
    size = np.abs(groups).max(-1).astype(np.float64)
    with np.errstate(divide="ignore"):
        k = np.ceil(np.log2(size / largest))
    return np.where(np.isfinite(k), k, -10_000).astype(np.int64)


def bf16(values: Floats) -> NDArray[np.uint16]:
    """bfloat16, rounded to the nearest even."""
    bits = np.ascontiguousarray(values, F32).view(np.uint32).astype(np.uint64)
    return ((bits + 0x7FFF + (bits >> 16 & 1)) >> 16).astype(np.uint16)


def from_bf16(values: NDArray[np.uint16]) -> Floats:
    """The float32 of bfloat16."""
    return (values.astype(np.uint32) << 16).view(F32)


def rounded(values: Floats) -> Floats:
    """The float32 nearest to what bfloat16 can hold."""
    return from_bf16(bf16(values))


def mixed(rows: Floats) -> Floats:
    """Rows (any, n) after the Hadamard transform, with the additions of the kernels."""
    n = rows.shape[-1]
    block, distance = n & -n, 1
    while distance < block:
        pairs = rows.reshape(*rows.shape[:-1], -1, 2, distance)
        low, high = pairs[..., 0, :], pairs[..., 1, :]
        rows = np.stack([low + high, low - high], -2).reshape(rows.shape)
        distance *= 2
    result: Floats = rows * (F32(1) / np.sqrt(F32(block)))
    return result


def encode(name: str, rows: Floats, rope: int) -> Bytes:
    """Rows (any, n) of float32 as bytes of a form."""
    count, n = rows.shape
    if name == "F32":
        return rows.copy().view(np.uint8)
    if name == "BF16":
        return bf16(rows).view(np.uint8)
    if name == "E2M1":
        groups = mixed(rows).reshape(count, -1, 32)
        k = np.maximum(_exponents(groups, 6), -127)
        k = np.maximum(k, k.max(1, keepdims=True) - 3)
        codes = _nearest(np.ldexp(groups, -k[:, :, None]), _E2M1)
        pairs = codes[:, :, :16] | codes[:, :, 16:] << 4
        scales = (k + 127 + 14).astype(np.uint8)
        return np.concatenate([pairs.reshape(count, -1), scales], 1)
    coded = (n - rope) // 16 * 16
    starts = range(0, coded, 64)
    parts, scales = [], np.zeros((count, -(-len(starts) // 8) * 8), np.uint8)
    for number, first in enumerate(starts):
        group = rows[:, first : min(first + 64, coded)]
        k = np.maximum(_exponents(group, 448), -127)
        parts.append(_nearest(np.ldexp(group, -k[:, None]), _E4M3))
        scales[:, number] = k + 127 + 8
    rest = bf16(rows[:, coded:]).view(np.uint8)
    return np.concatenate([*parts, rest, scales], 1)


def decode(name: str, stored: Bytes, n: int, rope: int) -> Floats:
    """What stored rows read as; those of E2M1 stay mixed."""
    count = len(stored)
    if name == "F32":
        return np.ascontiguousarray(stored).view(F32)
    if name == "BF16":
        return from_bf16(np.ascontiguousarray(stored).view(np.uint16))
    if name == "E2M1":
        pairs = stored[:, : n // 2].reshape(count, -1, 16)
        codes = np.concatenate([pairs & 15, pairs >> 4], 2)
        values = np.where(codes & 8, -1, 1) * _E2M1[codes & 7]
        k = stored[:, n // 2 :].astype(np.int64) - 127 - 14
        result: Floats = np.ldexp(values, k[:, :, None]).reshape(count, n).astype(F32)
        return result
    coded = (n - rope) // 16 * 16
    codes, end = stored[:, :coded], 2 * n - coded
    values = np.where(codes & 128, -1, 1) * _E4M3[codes & 127]
    k = np.repeat(stored[:, end:].astype(np.int64) - 127 - 8, 64, 1)[:, :coded]
    rest = from_bf16(np.ascontiguousarray(stored[:, coded:end]).view(np.uint16))
    result = np.concatenate([np.ldexp(values, k).astype(F32), rest], 1)
    return result
