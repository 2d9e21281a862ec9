"""Files of log-probabilities: every byte of a small one, what they keep, and damage."""

import struct
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from localv4.engine.logits_file import (
    LogitsFile,
    decode,
    encode,
    file_bytes,
    header,
    row_length,
)
from localv4.engine.scoring import log_softmax
from localv4.engine.windows import Windows, cut
from localv4.errors import BadFileError, NotFoundError

VOCAB = 7
WINDOWS = cut([1, 2, 3, 4, 5, 6, 1, 2, 3, 4], 5, bos=0)  # [0 1 2 3 4] [5 6 1 2 3]: 2 rows each


def rows(seed: int = 1, vocab: int = VOCAB, count: int = 4) -> NDArray[np.float32]:
    """Logits of some predictions."""
    chance = np.random.default_rng(seed)
    return (2 * chance.standard_normal((count, vocab))).astype(np.float32)


def write(path: Path, windows: Windows = WINDOWS) -> bytes:
    """Write a whole file and return its bytes."""
    data = header(windows, VOCAB) + b"".join(encode(row).tobytes() for row in rows())
    path.write_bytes(data)
    return data


def test_bytes_of_a_row() -> None:
    # a twin of llama.cpp's function in Python's own numbers: 0.5 and two of 0.25
    row = encode(np.log(np.array([0.5, 0.25, 0.25], np.float32)))
    scale, smallest = struct.unpack("<ff", row[:4].tobytes())
    assert row.dtype == np.dtype("<u2")
    assert scale == pytest.approx(np.log(2) / 65535, rel=1e-6)
    assert smallest == pytest.approx(np.log(0.25), rel=1e-6)
    assert row[4:].tolist() == [65535, 0, 0, 0]  # and one to make the number even


def test_what_is_far_below_the_best_is_cut_off() -> None:
    row = encode(np.array([0, -8, -15.9, -16, -17, -1000], np.float32))
    assert row[4:].tolist() == [65535, 32768, 410, 0, 0, 0]


def test_equal_logits() -> None:
    assert encode(np.full(4, 3.5, np.float32))[4:].tolist() == [0, 0, 0, 0]
    np.testing.assert_allclose(decode(encode(np.full(4, 3.5, np.float32)), 4), np.log(0.25))


@settings(max_examples=50, deadline=None)
@given(st.integers(2, 300), st.floats(0.01, 30), st.integers(0, 2**32))
def test_rows_keep_log_probabilities_to_half_a_step(vocab: int, width: float, seed: int) -> None:
    logits = (width * np.random.default_rng(seed).standard_normal(vocab)).astype(np.float32)
    log_p = log_softmax(logits)
    kept = decode(encode(logits), vocab)
    held = log_p > log_p.max() - 16
    span = log_p.max() - max(log_p.min(), log_p.max() - 16)
    assert np.abs(kept - log_p)[held].max() < 0.51 * span / 65535 + 3e-6
    assert np.abs(kept[~held] - (log_p.max() - 16)).max(initial=0) < 1e-4


def test_bytes_of_a_file(tmp_path: Path) -> None:
    data = write(tmp_path / "base")
    assert data[:8] == b"_logits_"
    assert struct.unpack("<Iii", data[8:20]) == (5, 7, 2)
    assert struct.unpack("<10i", data[20:60]) == (0, 1, 2, 3, 4, 5, 6, 1, 2, 3)
    assert row_length(VOCAB) == 12
    assert len(data) == 60 + 4 * 24 == file_bytes(WINDOWS, VOCAB)


def test_a_file_is_read_as_it_was_written(tmp_path: Path) -> None:
    write(tmp_path / "base")
    with LogitsFile(tmp_path / "base", bos=0) as base:
        assert base.vocab == VOCAB
        assert np.array_equal(base.windows.tokens, WINDOWS.tokens)
        assert (base.windows.first, base.windows.bos) == (2, 0)
        found = np.array([row for index in (0, 1) for row in base.rows(index)])
    np.testing.assert_allclose(found, log_softmax(rows()), atol=2e-4)
    with LogitsFile(tmp_path / "base", bos=5, most=1) as base:
        assert base.windows.bos is None and len(base.windows) == 1


@pytest.mark.parametrize(
    ("place", "value", "said"),
    [
        (0, b"_l0gits_", "not a file of log-probabilities"),
        (8, struct.pack("<I", 2), "windows of 2 tokens"),
        (8, struct.pack("<I", 6), "its header asks for"),
        (8, b"\xff\xff\xff\xff", "windows of 4294967295 tokens"),
        (12, struct.pack("<i", -1), "vocabulary of -1"),
        (12, struct.pack("<i", 9), "its header asks for"),
        (16, struct.pack("<i", 0), "0 windows"),
        (24, struct.pack("<i", 7), "outside the vocabulary of 7"),
        (24, struct.pack("<i", -3), "outside the vocabulary of 7"),
    ],
)
def test_damaged_headers(place: int, value: bytes, said: str, tmp_path: Path) -> None:
    data = bytearray(write(tmp_path / "base"))
    data[place : place + len(value)] = value
    (tmp_path / "base").write_bytes(data)
    with pytest.raises(BadFileError, match=said):
        LogitsFile(tmp_path / "base", bos=0)


@pytest.mark.parametrize("value", [np.nan, np.inf, -1.0, 1e30])
@pytest.mark.parametrize("place", [60 + 24, 60 + 24 + 4])
def test_damaged_rows(value: float, place: int, tmp_path: Path) -> None:
    data = bytearray(write(tmp_path / "base"))
    if place == 88 and value == -1.0:
        value = -60.0  # a smallest log p of -1 is possible, that of nothing but is not
    data[place : place + 4] = struct.pack("<f", value)
    (tmp_path / "base").write_bytes(data)
    with (
        LogitsFile(tmp_path / "base", bos=0) as base,
        pytest.raises(BadFileError, match="window 0, row 1"),
    ):
        list(base.rows(0))


@pytest.mark.parametrize("count", [0, 7, 19, 20, 59, 155])
def test_files_cut_short(count: int, tmp_path: Path) -> None:
    data = write(tmp_path / "base")
    (tmp_path / "base").write_bytes(data[:count])
    with pytest.raises(BadFileError):
        LogitsFile(tmp_path / "base", bos=0)


def test_no_file(tmp_path: Path) -> None:
    with pytest.raises(NotFoundError):
        LogitsFile(tmp_path / "base", bos=0)
