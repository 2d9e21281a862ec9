"""Packing keeps every value, whoever does which part of it."""

import mmap

import numba
import numpy as np
import pytest
from numpy.typing import NDArray
from reference_blocks import random_blocks
from reference_packed import aligned, unpack, unpack_f8

from localv4.kernels import blocks, matmul, packed, packing
from localv4.kernels.buffers import LARGE_BYTES, SLACK_BYTES, aligned_bytes

Bytes = NDArray[np.uint8]
Floats = NDArray[np.float32]

needs_jit = pytest.mark.skipif(bool(numba.config.DISABLE_JIT), reason="packers use addresses")

NO_SCALE = np.zeros((1, 1), np.uint8)
SHAPES = [(16, 128), (48, 256), (32, 640)]
GGML = {
    "MXFP4": (packed.MX4, packing.pack_mxfp4),
    "Q4_0": (packed.Q4, packing.pack_q4_0),
    "Q8_0": (packed.Q8, packing.pack_q8_0),
}


def decode(fmt: int, data: Bytes, cols: int, scale: Bytes = NO_SCALE) -> Floats:
    """All rows of a stored matrix."""
    out = np.empty((len(data), cols), np.float32)
    matmul.gather_rows(out, np.arange(len(data)), fmt, data, scale)
    return out


def assert_same_bits(actual: Floats, expected: Floats) -> None:
    np.testing.assert_array_equal(actual.view(np.uint32), expected.view(np.uint32))


def frozen(array: Bytes) -> Bytes:
    """The bytes of an array in a row, read-only as a file's are."""
    flat = array.reshape(-1)
    flat.flags.writeable = False
    return flat


def random_rows(rng: np.random.Generator, name: str, rows: int, cols: int) -> Bytes:
    """A stored matrix of a ggml format with every kind of scale but NaN."""
    unit, size = blocks.UNITS[blocks.FORMATS.index(name)]
    data = random_blocks(rng, name, rows * cols // unit, size)
    if name == "MXFP4":
        data[:, 0] = rng.integers(0, 250, len(data))
    return data.reshape(rows, -1)


@needs_jit
@pytest.mark.parametrize("name", GGML)
@pytest.mark.parametrize(("rows", "cols"), SHAPES)
def test_ggml_blocks_keep_their_values(name: str, rows: int, cols: int) -> None:
    data = random_rows(np.random.default_rng(rows), name, rows, cols)
    fmt, pack = GGML[name]
    out = aligned_bytes(packed.packed_bytes(fmt, rows, cols))
    assert pack(out, frozen(data), cols, 0, rows // 16, 1) == 0
    expected = decode(blocks.FORMATS.index(name), data, cols)
    assert_same_bits(unpack(fmt, out, rows, cols), expected)


@needs_jit
@pytest.mark.parametrize(("rows", "cols"), SHAPES)
def test_official_fp4_keeps_its_values(rows: int, cols: int) -> None:
    rng = np.random.default_rng(rows)
    data = rng.integers(0, 256, (rows, cols // 2), dtype=np.uint8)
    scale = rng.integers(0, 253, (rows, cols // 32), dtype=np.uint8)
    scale[0, 0], scale[1, 0] = 0, 252
    out = aligned_bytes(packed.packed_bytes(packed.MX4, rows, cols))
    assert packing.pack_fp4(out, frozen(data), frozen(scale), cols, 0, rows // 16, 1) == 0
    expected = decode(blocks.FP4, data, cols, scale)
    assert_same_bits(unpack(packed.MX4, out, rows, cols), expected)


@needs_jit
@pytest.mark.parametrize(("rows", "cols"), [(16, 128), (144, 256)])
def test_official_f8_keeps_its_values(rows: int, cols: int) -> None:
    rng = np.random.default_rng(rows)
    data = rng.integers(0, 256, (rows, cols), dtype=np.uint8)
    data[data & 0x7F == 0x7F] = 1
    scale = rng.integers(1, 240, (-(-rows // 128), cols // 128), dtype=np.uint8)
    scale[0, 0] = 0
    out = aligned_bytes(packed.packed_bytes(packed.F8, rows, cols))
    assert packing.pack_f8(out, frozen(data), cols, 0, rows // 16, 1) == 0
    expected = decode(blocks.F8, data, cols, scale)
    assert_same_bits(unpack_f8(out, packing.f8_scales(scale), rows, cols), expected)


@needs_jit
def test_codes_that_mean_nan_are_counted() -> None:
    data = random_rows(np.random.default_rng(1), "MXFP4", 32, 128)
    data.reshape(-1, 17)[[3, 50, 80], 0] = 255
    out = aligned_bytes(packed.packed_bytes(packed.MX4, 32, 128))
    assert packing.pack_mxfp4(out, frozen(data), 128, 0, 2, 1) == 3
    assert packing.pack_mxfp4(out, frozen(data), 128, 1, 2, 1) == 1
    scale = np.full((16, 4), 255, np.uint8)
    codes = np.zeros((16, 64), np.uint8)
    assert packing.pack_fp4(out, frozen(codes), frozen(scale), 128, 0, 1, 1) == 64
    f8 = np.zeros((16, 128), np.uint8)
    f8[3, 5], f8[15, 127], f8[0, 0] = 0x7F, 0xFF, 0x7E
    assert packing.pack_f8(out, frozen(f8), 128, 0, 1, 1) == 2
    assert np.isnan(packing.f8_scales(np.array([255], np.uint8))[0])


@needs_jit
@pytest.mark.parametrize("name", GGML)
def test_parts_make_the_whole_and_touch_nothing_else(name: str) -> None:
    rows, cols = 64, 128
    data = random_rows(np.random.default_rng(2), name, rows, cols)
    fmt, pack = GGML[name]
    size = packed.group_bytes(fmt, cols)
    whole = aligned_bytes(4 * size)
    pack(whole, frozen(data), cols, 0, 4, 1)
    parts = aligned_bytes(4 * size)
    for first, end in ((1, 3), (0, 1)):
        pack(parts, frozen(data), cols, first, end, 1)
    assert np.array_equal(parts[: 3 * size], whole[: 3 * size])
    assert not parts[3 * size :].any()


@needs_jit
def test_gate_and_up_alternate() -> None:
    rng = np.random.default_rng(3)
    gate, up = (random_rows(rng, "MXFP4", 32, 128) for _ in range(2))
    size = packed.group_bytes(packed.MX4, 128)
    record = aligned_bytes(4 * size)
    packing.pack_mxfp4(record, frozen(gate), 128, 0, 2, 2)
    packing.pack_mxfp4(record[size:], frozen(up), 128, 0, 2, 2)
    pairs = record.reshape(2, 2, size)
    for i, source in enumerate((gate, up)):
        found = unpack(packed.MX4, pairs[:, i].reshape(-1).copy(), 32, 128)
        assert_same_bits(found, decode(blocks.MXFP4, source, 128))


def test_sizes() -> None:
    assert packed.packed_bytes(packed.MX4, 4096, 2048) * 3 == 13_369_344
    assert packed.expert_bytes(packed.MX4, 4096, 2048) == 13_369_344
    assert packed.down_offset(packed.MX4, 4096, 2048) == 2 * 4_456_448
    assert packed.packed_bytes(packed.Q4, 16, 64) == 576
    assert packed.packed_bytes(packed.Q8, 32, 128) == 4 * 1088
    assert packed.packed_bytes(packed.F8, 16, 256) == 4096


@pytest.mark.parametrize("fmt", packed.FORMATS, ids=lambda fmt: fmt.name)
def test_what_has_no_packed_form(fmt: packed.PackedFormat) -> None:
    assert packed.can_pack(fmt, 32, 256)
    for rows, cols in ((8, 128), (17, 128), (0, 128), (16, 0), (16, 96), (-16, 128)):
        assert not packed.can_pack(fmt, rows, cols)
        with pytest.raises(ValueError, match="no packed form"):
            packed.packed_bytes(fmt, rows, cols)
    assert packed.can_pack(fmt, 16, 64) == (fmt in (packed.Q4, packed.Q8))


@pytest.mark.parametrize("nbytes", [1, 1000, LARGE_BYTES, LARGE_BYTES + 77])
def test_buffers_are_aligned_zero_and_have_slack(nbytes: int) -> None:
    buffer = aligned_bytes(nbytes)
    assert buffer.size == nbytes and buffer.dtype == np.uint8
    assert buffer.ctypes.data % 64 == 0 and not buffer.any()
    buffer[...] = 7
    base = buffer
    while isinstance(base.base, np.ndarray):
        base = base.base
    end_of_base = base.ctypes.data + base.nbytes
    assert buffer.ctypes.data + nbytes + SLACK_BYTES <= end_of_base


def test_large_buffers_without_an_anonymous_map(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise OSError("no memory")

    monkeypatch.setattr(mmap, "mmap", refuse)
    assert aligned_bytes(LARGE_BYTES).size == LARGE_BYTES
    monkeypatch.delattr(mmap, "MAP_PRIVATE", raising=False)
    assert aligned_bytes(LARGE_BYTES).ctypes.data % 64 == 0


def test_an_aligned_copy_is_equal() -> None:
    source = np.arange(70, dtype=np.float32)
    assert np.array_equal(aligned(source).view(np.float32), source)
