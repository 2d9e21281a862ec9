"""Files of log-probabilities in the format that llama.cpp writes with `--kl-divergence-base`.

    "_logits_", u32 window size, i32 vocabulary, i32 windows, i32 tokens of all windows, then for
    each counted prediction a row of u16: f32 scale, f32 smallest log p, a u16 for every token.

All is little-endian. A row holds log p = scale * u16 + smallest, over the 16 nats below the
likeliest token; tokens less likely than that have u16 = 0. An odd vocabulary has one u16 more.
"""

import struct
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import BinaryIO, Self

import numpy as np
from numpy.typing import NDArray

from localv4.engine.windows import Windows
from localv4.errors import BadFileError, NotFoundError

MAGIC = b"_logits_"
SPAN = np.float32(16)
"""Nats below the likeliest token that a row covers."""
LEAST_LOG_P = -16.0
"""llama.cpp leaves less likely tokens out of a divergence: their stored values are bounds."""

MAX_WINDOW = 1 << 24
MAX_VOCABULARY = 1 << 24
_HEADER = struct.Struct("<8sIii")
_EXTRA = 4  # u16 in front of a row: two floats
_STEPS = np.float32(65535)
_MOST_SUM, _LEAST_SUM = 1.1, 0.9
_BYTES_AT_ONCE = 1 << 24


def row_length(vocab: int) -> int:
    """Return the u16 of a row."""
    return 2 * ((vocab + 1) // 2) + _EXTRA


def file_bytes(windows: Windows, vocab: int) -> int:
    """Return the size of a file."""
    rows = len(windows) * windows.counted
    return _HEADER.size + 4 * windows.tokens.size + 2 * rows * row_length(vocab)


def header(windows: Windows, vocab: int) -> bytes:
    """Return what comes before the rows."""
    start = _HEADER.pack(MAGIC, windows.size, vocab, len(windows))
    return start + windows.tokens.astype("<i4").tobytes()


def encode(logits: NDArray[np.float32]) -> NDArray[np.uint16]:
    """Return the row for logits (vocab,), all finite, in llama.cpp's float32 arithmetic."""
    largest = logits.max()
    smallest = max(logits.min(), largest - SPAN)
    log_sum = np.float32(np.log(np.exp((logits - largest).astype(np.float64)).sum()))
    scale = (largest - smallest) / _STEPS
    row = np.zeros(row_length(logits.size), "<u2")
    row[:_EXTRA].view("<f4")[:] = scale, smallest - largest - log_sum
    if scale > 0:
        steps = np.rint((logits - smallest) * (np.float32(1) / scale))
        row[_EXTRA : _EXTRA + logits.size] = steps.clip(0, _STEPS)
    return row


def decode(row: NDArray[np.uint16], vocab: int) -> NDArray[np.float64]:
    """Return log p (vocab,) of a row; ValueError when it is no distribution."""
    scale, smallest = row[:_EXTRA].view("<f4").astype(np.float64)
    # NaN compares false
    if not 0 <= scale <= 1 or not -1e4 < smallest <= 0:
        raise ValueError(f"scale {scale:g} and smallest log p {smallest:g}")
    log_p: NDArray[np.float64] = scale * row[_EXTRA : _EXTRA + vocab] + smallest
    total = np.exp(log_p).sum()
    if not _LEAST_SUM < total < _MOST_SUM:
        raise ValueError(f"its probabilities sum to {total:.4g}")
    return log_p


class LogitsFile:
    """An opened file of log-probabilities; `windows` are those that it was made from.

    Raises NotFoundError, or BadFileError for what is no such file or not all of one.
    """

    least_log_p = LEAST_LOG_P

    def __init__(self, path: Path, bos: int, most: int | None = None) -> None:
        """Check the header and the size; show at most so many windows.

        Windows begin with `bos` when the text does: the file does not say.
        """
        self.path = path
        try:
            self._file: BinaryIO = path.open("rb")
        except FileNotFoundError:
            raise NotFoundError(f"no such file: {path}") from None
        try:
            self.vocab, self.windows = self._read_header(bos, most)
        except BaseException:
            self._file.close()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        """Close the file."""
        self._file.close()

    def rows(self, index: int) -> Iterator[NDArray[np.float64]]:
        """Yield log p (vocab,) for each counted prediction of a window; reads in pieces."""
        length = row_length(self.vocab)
        at_once = max(1, _BYTES_AT_ONCE // (2 * length))
        start = self._start + 2 * length * self.windows.counted * index
        for first in range(0, self.windows.counted, at_once):
            count = min(at_once, self.windows.counted - first)
            data = self._read(start + 2 * length * first, 2 * length * count)
            for number, row in enumerate(np.frombuffer(data, "<u2").reshape(count, length), first):
                try:
                    yield decode(row, self.vocab)
                except ValueError as error:
                    place = f"window {index}, row {number}"
                    raise BadFileError(self.path, f"{place}: {error}") from error

    def _read_header(self, bos: int, most: int | None) -> tuple[int, Windows]:
        nbytes = self.path.stat().st_size
        if nbytes < _HEADER.size:
            raise BadFileError(self.path, "too short for a file of log-probabilities")
        magic, size, vocab, count = _HEADER.unpack(self._read(0, _HEADER.size))
        if magic != MAGIC:
            raise BadFileError(self.path, "not a file of log-probabilities (_logits_)")
        if not 2 < size <= MAX_WINDOW or not 0 < vocab <= MAX_VOCABULARY or count < 1:
            raise BadFileError(
                self.path, f"{count} windows of {size} tokens from a vocabulary of {vocab}"
            )
        self._start = _HEADER.size + 4 * size * count
        expected = self._start + 2 * row_length(vocab) * (size - 1 - size // 2) * count
        if nbytes != expected:
            raise BadFileError(
                self.path, f"has {nbytes} bytes, its header asks for {expected}: it is not whole"
            )
        tokens = np.frombuffer(self._read(_HEADER.size, 4 * size * count), "<i4")
        if tokens.min() < 0 or tokens.max() >= vocab:
            raise BadFileError(self.path, f"names a token outside the vocabulary of {vocab}")
        grid = tokens.astype(np.int32).reshape(count, size)
        return vocab, Windows(grid[:most], size // 2, bos if grid[0, 0] == bos else None)

    def _read(self, start: int, count: int) -> bytes:
        self._file.seek(start)
        data = self._file.read(count)
        if len(data) != count:
            raise BadFileError(self.path, "became shorter while it was read")
        return data
