"""NumPy twins of the packed formats, of the quantised activations and of their products."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from reference_blocks import E2M1, e4m3, e8m0

from localv4.kernels.buffers import aligned_bytes
from localv4.kernels.packed import MX4, Q4, Q8, PackedFormat, packed_bytes

Bytes = NDArray[np.uint8]
Floats = NDArray[np.float32]
Wide = NDArray[np.float64]

F32 = np.float32


def address(array: NDArray[np.generic]) -> int:
    """Where the values of an array start."""
    return int(array.ctypes.data)


def aligned(raw: NDArray[np.generic]) -> Bytes:
    """A copy of the bytes of an array that starts on a cache line and has slack behind."""
    source = np.ascontiguousarray(raw).view(np.uint8).reshape(-1)
    copy = aligned_bytes(source.size)
    copy[:] = source
    return copy


def floats(*shape: int, fill: float = np.nan) -> Floats:
    """An aligned float32 array."""
    array = aligned_bytes(4 * int(np.prod(shape))).view(F32).reshape(shape)
    array[...] = fill
    return array


def four_bit_codes(blocks: Bytes) -> Bytes:
    """blocks (groups, n, 256) -> codes (groups * 16, n * 32)."""
    groups, n = blocks.shape[:2]
    halves = np.stack([blocks & 15, blocks >> 4])  # high, group, block, byte
    split = halves.reshape(2, groups, n, 4, 16, 4)  # high, group, block, line, lane, i
    return split.transpose(1, 4, 2, 3, 0, 5).reshape(groups * 16, n * 32)


def unpack_scales(first_lines: Bytes, blocks: int, dtype: str) -> NDArray[np.generic]:
    """first_lines (groups, superblocks, 64) -> scales (groups * 16, superblocks * blocks)."""
    groups, n = first_lines.shape[:2]
    scales = np.ascontiguousarray(first_lines).view(dtype).reshape(groups, n, blocks, 16)
    return scales.transpose(0, 3, 1, 2).reshape(groups * 16, n * blocks)


def superblocks(fmt: PackedFormat, packed: Bytes, rows: int, cols: int) -> Bytes:
    """The bytes of a matrix -> (groups, superblocks, superblock bytes)."""
    assert packed.size == packed_bytes(fmt, rows, cols)
    return packed.reshape(rows // 16, cols // fmt.columns, fmt.superblock_bytes)


def integers_and_scales(
    fmt: PackedFormat, packed: Bytes, rows: int, cols: int
) -> tuple[Wide, Wide]:
    """The integers (rows, cols) of MX4 (doubled), Q4 or Q8, and scales (rows, cols / 32)."""
    parts = superblocks(fmt, packed, rows, cols)
    head, body = parts[:, :, :64], np.ascontiguousarray(parts[:, :, 64:])
    if fmt is MX4:
        codes = four_bit_codes(body.reshape(rows // 16, -1, 256))
        signed = np.where(codes & 8, -2 * E2M1[codes & 7], 2 * E2M1[codes & 7])
        exponents = unpack_scales(head, 4, "u1").astype(np.uint8)
        return signed.astype(np.float64), e8m0(exponents).astype(np.float64) / 2
    scales = unpack_scales(head, 2, "<f2").astype(np.float64)
    if fmt is Q4:
        return four_bit_codes(body.reshape(rows // 16, -1, 256)) - 8.0, scales
    assert fmt is Q8
    lines = body.view(np.int8).reshape(rows // 16, -1, 16, 4)  # group, line, lane, i
    return lines.transpose(0, 2, 1, 3).reshape(rows, cols).astype(np.float64), scales


def unpack(fmt: PackedFormat, packed: Bytes, rows: int, cols: int) -> Floats:
    """The values of a packed MX4, Q4 or Q8 matrix, exact."""
    integers, scales = integers_and_scales(fmt, packed, rows, cols)
    values: Floats = (integers * np.repeat(scales, 32, axis=1)).astype(F32)
    return values


def unpack_f8(packed: Bytes, scale: Floats, rows: int, cols: int) -> Floats:
    """The values of a packed F8 matrix with scales (rows / 128 up, cols / 128)."""
    codes = packed.reshape(rows // 16, cols, 16).transpose(0, 2, 1).reshape(rows, cols)
    spread = np.repeat(np.repeat(scale, 128, axis=0)[:rows], 128, axis=1)
    values: Floats = e4m3(codes) * spread
    return values


@dataclass
class Quantised:
    """Activations (tokens, cols) as the kernels get them: int8, scales, sums in their buffers."""

    q: NDArray[np.int8]
    d: Floats
    b: NDArray[np.int32]

    @property
    def values(self) -> Wide:
        """What the integers and scales stand for."""
        return self.q * np.repeat(self.d.astype(np.float64), 32, axis=1)


def quantise(x: Floats, code_bias: int, byte_bias: int) -> Quantised:
    """Twin of `activations.quantize` for x (tokens, cols)."""
    parts = x.reshape(len(x), -1, 32)
    size = np.maximum(np.abs(parts).max(axis=2), F32(1e-30))
    factor = (F32(127) / size)[:, :, None]
    q = np.rint(parts * factor).astype(np.int32)
    sums = q.sum(axis=2)
    halves = q.reshape(*q.shape[:2], 2, -1).sum(axis=3)
    kinds = [-code_bias * sums, -byte_bias * sums, halves[..., 0], halves[..., 1]]
    biased = np.stack(kinds, axis=2)
    return Quantised(
        q.reshape(x.shape).astype(np.int8), size * F32(1 / 127), biased.astype(np.int32)
    )


def distance(actual: NDArray[np.floating], expected: Wide) -> float:
    """Relative L2 distance."""
    size = float(np.linalg.norm(expected))
    return float(np.linalg.norm(actual - expected)) / (size or 1.0)


def random_weights(seed: int, fmt: PackedFormat, rows: int, cols: int) -> Bytes:
    """Random packed bytes with finite scales of ordinary size and all codes."""
    rng = np.random.default_rng(seed)
    size = packed_bytes(fmt, rows, cols)
    weights = aligned(rng.integers(0, 256, size, dtype=np.uint8))
    heads = weights.reshape(-1, fmt.superblock_bytes)[:, :64]
    if fmt is MX4:
        heads[...] = rng.integers(110, 125, heads.shape)
    else:
        scales = rng.normal(0, 0.01, (len(heads), 32)).astype(np.float16)
        heads[...] = scales.view(np.uint8)
    return weights


def weight_values(fmt: PackedFormat, weights: Bytes, rows: int, cols: int) -> Wide:
    """The values of a packed MX4, Q4 or Q8 matrix in float64."""
    integers, scales = integers_and_scales(fmt, weights, rows, cols)
    return integers * np.repeat(scales, 32, axis=1)
