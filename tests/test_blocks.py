"""The block decoders equal their NumPy twins, the gguf package and ml_dtypes to the bit."""

import gguf
import ml_dtypes
import numpy as np
import pytest
from numpy.typing import NDArray
from reference_blocks import TWINS, e4m3, e8m0, f8, fp4, iq2_xxs, random_blocks

from localv4.kernels import blocks
from localv4.kernels.iquants import GRID

Bytes = NDArray[np.uint8]
Floats = NDArray[np.float32]

NO_SCALE = np.zeros((1, 1), np.uint8)
GGML_NAMES = blocks.FORMATS[blocks.Q8_0 :]


def decode(fmt: int, data: Bytes, cols: int, scale: Bytes = NO_SCALE) -> Floats:
    """All rows of `data` -> (rows, cols), with guards around each row that must stay."""
    frozen, frozen_scale = data.copy(), scale.copy()
    frozen.flags.writeable = frozen_scale.flags.writeable = False
    out = np.full((len(data), cols + 16), 7, np.float32)
    # Compiled code sets no error state; without the compiler NumPy reports each overflow.
    with np.errstate(all="ignore"):
        for row in range(len(data)):
            blocks.decode_row(out[row, 8:-8], fmt, frozen, frozen_scale, row)
    assert (out[:, :8] == 7).all() and (out[:, -8:] == 7).all()
    return out[:, 8:-8]


def assert_same_bits(actual: Floats, expected: Floats) -> None:
    """Equal bit by bit, save for the payload of a NaN."""
    actual, expected = np.ascontiguousarray(actual), np.ascontiguousarray(expected)
    assert actual.dtype == expected.dtype == np.float32
    assert actual.shape == expected.shape
    assert np.array_equal(np.isnan(actual), np.isnan(expected))
    bits, wanted = actual.view(np.uint32), expected.view(np.uint32)
    assert np.array_equal(bits[~np.isnan(actual)], wanted[~np.isnan(expected)])


def random_rows(name: str, rows: int, seed: int) -> tuple[Bytes, int]:
    """Rows of random legal blocks of a ggml type, and their number of columns."""
    fmt = blocks.FORMATS.index(name)
    block, size = blocks.UNITS[fmt]
    cols = 512
    raw = random_blocks(np.random.default_rng(seed), name, rows * cols // block, size)
    return raw.reshape(rows, blocks.row_bytes(fmt, cols)), cols


@pytest.mark.parametrize("name", GGML_NAMES)
def test_ggml_blocks_equal_the_gguf_package(name: str) -> None:
    data, cols = random_rows(name, rows=5, seed=1)
    with np.errstate(all="ignore"):
        expected = gguf.quants.dequantize(data, gguf.GGMLQuantizationType[name])
    assert_same_bits(decode(blocks.FORMATS.index(name), data, cols), expected)


@pytest.mark.parametrize("name", GGML_NAMES)
def test_ggml_blocks_equal_their_twin(name: str) -> None:
    data, cols = random_rows(name, rows=4, seed=2)
    fmt = blocks.FORMATS.index(name)
    raw = data.reshape(-1, blocks.UNITS[fmt][1])
    with np.errstate(over="ignore"):
        expected = iq2_xxs(raw, GRID) if name == "IQ2_XXS" else TWINS[name](raw)
    assert_same_bits(decode(fmt, data, cols), expected.reshape(4, cols))


@pytest.mark.parametrize("name", GGML_NAMES)
def test_the_bytes_of_a_row_follow_the_ggml_table(name: str) -> None:
    fmt = blocks.FORMATS.index(name)
    block, size = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[name]]
    assert blocks.UNITS[fmt] == (block, size)
    assert blocks.row_bytes(fmt, 3 * block) == 3 * size
    with pytest.raises(ValueError, match=name):
        blocks.row_bytes(fmt, block + 1)


def test_the_bytes_of_a_plain_row() -> None:
    codes = (blocks.F32, blocks.F16, blocks.BF16, blocks.F8, blocks.FP4)
    assert [blocks.row_bytes(fmt, 6) for fmt in codes] == [24, 12, 12, 6, 3]
    with pytest.raises(ValueError, match="FP4"):
        blocks.row_bytes(blocks.FP4, 5)


def test_float32_is_copied() -> None:
    values = np.array([[0.0, -0.0, 1e-40, np.inf, -np.nan, 3.5]], np.float32)
    assert_same_bits(decode(blocks.F32, values.view(np.uint8), 6), values)


def test_every_float16() -> None:
    codes = np.arange(1 << 16, dtype=np.uint16).reshape(1, -1)
    expected = codes.view(np.float16).astype(np.float32)
    assert_same_bits(decode(blocks.F16, codes.view(np.uint8), codes.size), expected)


def test_every_bfloat16() -> None:
    codes = np.arange(1 << 16, dtype=np.uint16).reshape(1, -1)
    with np.errstate(invalid="ignore"):
        expected = codes.view(ml_dtypes.bfloat16).astype(np.float32)
    assert_same_bits(decode(blocks.BF16, codes.view(np.uint8), codes.size), expected)


def test_every_float8_code_with_every_scale() -> None:
    codes = np.repeat(np.arange(256, dtype=np.uint8)[None], 2, axis=0)
    expected = codes.view(ml_dtypes.float8_e4m3fn).astype(np.float32)
    assert_same_bits(e4m3(codes), expected)
    for scale in (0, 1, 2, 100, 127, 128, 246, 254, 255):
        factors = np.full((1, 2), scale, np.uint8)
        with np.errstate(over="ignore"):
            product = expected * factors.view(ml_dtypes.float8_e8m0fnu).astype(np.float32)[0, 0]
        assert_same_bits(decode(blocks.F8, codes, 256, factors), product)


def test_float8_blocks_may_be_partial() -> None:
    rng = np.random.default_rng(3)
    rows, cols = 130, 133
    codes = rng.integers(0, 256, (rows, cols), dtype=np.uint8)
    scale = rng.integers(110, 140, (2, 2), dtype=np.uint8)
    assert_same_bits(decode(blocks.F8, codes, cols, scale), f8(codes, scale))


def test_a_scale_code_is_a_power_of_two() -> None:
    codes = np.arange(256, dtype=np.uint8)
    assert_same_bits(e8m0(codes), codes.view(ml_dtypes.float8_e8m0fnu).astype(np.float32))
    assert e8m0(codes)[0] == np.float32(2.0**-127)


def test_every_float4_pair_with_every_scale() -> None:
    packed = np.repeat(np.arange(256, dtype=np.uint8)[None], 9, axis=0)
    codes = np.stack([packed & 15, packed >> 4], axis=-1).reshape(9, 512)
    values = codes.view(ml_dtypes.float4_e2m1fn).astype(np.float32)
    scale = np.array([0, 1, 2, 100, 127, 128, 252, 254, 255], np.uint8)[:, None].repeat(16, axis=1)
    with np.errstate(over="ignore"):
        expected = values * scale.view(ml_dtypes.float8_e8m0fnu).astype(np.float32)[:, :1]
        assert_same_bits(fp4(packed, scale), expected)
    assert_same_bits(decode(blocks.FP4, packed, 512, scale), expected)


def test_float4_blocks_may_be_partial() -> None:
    rng = np.random.default_rng(4)
    packed = rng.integers(0, 256, (3, 40), dtype=np.uint8)
    scale = rng.integers(110, 140, (3, 3), dtype=np.uint8)
    assert_same_bits(decode(blocks.FP4, packed, 80, scale), fp4(packed, scale))


def test_official_float4_repacks_to_mxfp4_without_loss() -> None:
    rng = np.random.default_rng(5)
    packed = rng.integers(0, 256, (4, 32), dtype=np.uint8)
    scale = rng.integers(0, 255, (4, 2), dtype=np.uint8)
    codes = np.stack([packed & 15, packed >> 4], axis=-1).reshape(8, 32)
    nibbles = codes[:, :16] | codes[:, 16:] << 4
    repacked = np.concatenate([scale.reshape(8, 1), nibbles], axis=1).reshape(4, 34)
    expected = decode(blocks.FP4, packed, 64, scale)
    assert np.array_equal(decode(blocks.MXFP4, repacked, 64), expected)


@pytest.mark.parametrize("scale", [0, 1, 2, 254, 255])
def test_mxfp4_at_the_ends_of_the_scale(scale: int) -> None:
    data = np.concatenate([[scale], np.arange(16) * 17]).astype(np.uint8)[None]
    with np.errstate(over="ignore"):
        expected = gguf.quants.dequantize(data, gguf.GGMLQuantizationType.MXFP4)
        assert_same_bits(TWINS["MXFP4"](data), expected)
    assert_same_bits(decode(blocks.MXFP4, data, 32), expected)


@pytest.mark.parametrize("fmt", [-1, len(blocks.FORMATS)])
def test_an_unknown_code_gives_nan_instead_of_old_values(fmt: int) -> None:
    assert np.isnan(decode(fmt, np.zeros((1, 32), np.uint8), 8)).all()
