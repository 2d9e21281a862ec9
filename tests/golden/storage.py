"""Storage as in the official checkpoints: BF16, FP8 in blocks of 128 x 128, FP4 in rows of 32."""

from collections.abc import Mapping
from dataclasses import dataclass

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

from golden.weights import Array

Floats = NDArray[np.float32]
Bytes = NDArray[np.uint8]

F8_BLOCK = 128
FP4_BLOCK = 32
FP4_MAGNITUDES = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6], np.float32)
FP4_MIDPOINTS = (FP4_MAGNITUDES[1:] + FP4_MAGNITUDES[:-1]) / 2

FP8_MATRICES = (
    *("attn.wq_a", "attn.wq_b", "attn.wkv", "attn.wo_a", "attn.wo_b", "attn.indexer.wq_b"),
    *("shared_experts.w1", "shared_experts.w2", "shared_experts.w3"),
)
# What stays as it is: F32, and I64 for the table of hash routing.
PLAIN = ("attn_sink", "ape", "_fn", "_base", "_scale", "gate.bias", "tid2eid")


@dataclass(frozen=True, slots=True)
class Stored:
    """A tensor as it is in a safetensors file: raw bytes with a type name and a shape."""

    dtype: str
    shape: tuple[int, ...]
    data: bytes

    @classmethod
    def of(cls, array: Array) -> "Stored":
        """Keep an array as it is."""
        names = {"float32": "F32", "int64": "I64"}
        return cls(names[array.dtype.name], array.shape, array.tobytes())


def official_storage(
    weights: Mapping[str, Array],
) -> tuple[dict[str, Stored], dict[str, Array]]:
    """Return the tensors of the official files and the float32 values that they stand for."""
    stored: dict[str, Stored] = {}
    exact: dict[str, Array] = {}
    for name, values in weights.items():
        base = name.removesuffix(".weight")
        if name.endswith(PLAIN):
            stored[name], exact[name] = Stored.of(values), values
        elif base.endswith(FP8_MATRICES):
            codes, scale, exact[name] = quantize_fp8(values.astype(np.float32))
            stored[name] = Stored("F8_E4M3", codes.shape, codes.tobytes())
            stored[base + ".scale"] = Stored("F8_E8M0", scale.shape, scale.tobytes())
        elif ".experts." in name:
            codes, scale, exact[name] = quantize_fp4(values.astype(np.float32))
            stored[name] = Stored("I8", codes.shape, codes.tobytes())
            stored[base + ".scale"] = Stored("F8_E8M0", scale.shape, scale.tobytes())
        else:
            rounded = values.astype(ml_dtypes.bfloat16)
            stored[name] = Stored("BF16", values.shape, rounded.tobytes())
            exact[name] = rounded.astype(np.float32)
    return stored, exact


def quantize_fp8(values: Floats) -> tuple[Bytes, Bytes, Floats]:
    """Return codes (rows, cols), scales (ceil(rows / 128), ceil(cols / 128)) and exact values."""
    rows, cols = values.shape
    padded = np.pad(values, ((0, -rows % F8_BLOCK), (0, -cols % F8_BLOCK)))
    tiles = padded.reshape(-(-rows // F8_BLOCK), F8_BLOCK, -(-cols // F8_BLOCK), F8_BLOCK)
    largest = np.maximum(np.abs(tiles).max(axis=(1, 3)), np.float32(1e-4))
    exponent = _exponent_above(largest / np.float32(448))
    power = np.ldexp(np.float32(1), exponent)[:, None, :, None]
    codes = np.clip(tiles / power, -448, 448).astype(ml_dtypes.float8_e4m3fn)
    exact = (codes.astype(np.float32) * power).reshape(padded.shape)[:rows, :cols]
    raw = codes.view(np.uint8).reshape(padded.shape)[:rows, :cols]
    return np.ascontiguousarray(raw), _e8m0(exponent), np.ascontiguousarray(exact)


def quantize_fp4(values: Floats) -> tuple[Bytes, Bytes, Floats]:
    """Return packed codes (rows, cols / 2), scales (rows, cols / 32) and exact values."""
    rows, cols = values.shape
    groups = values.reshape(rows, cols // FP4_BLOCK, FP4_BLOCK)
    largest = np.maximum(np.abs(groups).max(axis=-1), np.float32(6 * 2.0**-126))
    exponent = _exponent_above(largest / np.float32(6))
    power = np.ldexp(np.float32(1), exponent)[:, :, None]
    scaled = np.clip(groups / power, -6, 6)
    magnitude = np.searchsorted(FP4_MIDPOINTS, np.abs(scaled), side="left")
    negative = (scaled < 0) & (magnitude > 0)
    exact = np.where(negative, -FP4_MAGNITUDES[magnitude], FP4_MAGNITUDES[magnitude]) * power
    pairs = (magnitude + 8 * negative).astype(np.uint8).reshape(rows, cols // 2, 2)
    packed = (pairs[:, :, 0] | pairs[:, :, 1] << 4).astype(np.uint8)
    return packed, _e8m0(exponent), exact.reshape(rows, cols).astype(np.float32)


def _exponent_above(values: Floats) -> NDArray[np.int32]:
    """Return the exponent of the smallest power of two that is not below each value."""
    fraction, exponent = np.frexp(values)
    above: NDArray[np.int32] = exponent - (fraction == np.float32(0.5))
    return above


def _e8m0(exponent: NDArray[np.int32]) -> Bytes:
    return (exponent + 127).astype(np.uint8)
