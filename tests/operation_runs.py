"""Running single operations of programs: by teams of any size, tokens together or one by one."""

from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray
from reference_packed import address, floats

from localv4.kernels import activations
from localv4.kernels.compiler import Entry
from localv4.kernels.operation import WORDS
from localv4.kernels.team import Team

F32 = np.float32
Floats = NDArray[np.float32]
Indices = NDArray[np.int64]

ROW_GAP = 16
"""Floats between two rows of activations."""


def padded(values: Floats) -> Floats:
    """A copy of a matrix in rows with a gap of NaN behind each."""
    rows = floats(values.shape[0], values.shape[1] + ROW_GAP)
    rows[:, : values.shape[1]] = values
    return rows[:, : values.shape[1]]


def stride(rows: NDArray[np.generic]) -> int:
    """Elements from one row to the next."""
    return rows.strides[0] // rows.itemsize


def cell(array: NDArray[np.generic]) -> Indices:
    """A word that holds the address of an array."""
    return np.array([address(array)])


def run(members: int, entry: Entry, words: Sequence[int]) -> None:
    """Run one operation."""
    program = np.zeros((1, WORDS), np.int64)
    program[0, : 1 + len(words)] = (entry.address, *words)
    team = Team(members)
    assert team.run(program) == 1
    team.close()


def run_all_ways(
    entry: Entry,
    tokens: int,
    outputs: Sequence[NDArray[np.generic]],
    words: Callable[[int, int], Sequence[int]],
) -> None:
    """Run an operation on all tokens at once and one by one, by 1 and by 3 members.

    `words(first, count)` are the operands for some tokens. Each way starts from the outputs as they
    are at first and must leave the same bits in them.
    """
    before = [output.copy() for output in outputs]
    expected: list[NDArray[np.generic]] = []
    for members in (1, 3):
        for step in (tokens, 1):
            for output, start in zip(outputs, before, strict=True):
                output[...] = start
            for first in range(0, tokens, step):
                run(members, entry, words(first, step))
            expected = expected or [output.copy() for output in outputs]
            for output, bits in zip(outputs, expected, strict=True):
                assert_same_bits(output, bits)


def assert_same_bits(actual: NDArray[np.generic], expected: NDArray[np.generic]) -> None:
    """Compare arrays, NaN with NaN."""
    raw = f"u{actual.itemsize}"
    np.testing.assert_array_equal(
        np.ascontiguousarray(actual).view(raw), np.ascontiguousarray(expected).view(raw)
    )


def block_scales(size: Floats, *, binary: bool) -> tuple[Floats, Floats]:
    """The scales of blocks of such sizes, and what their values are multiplied by."""
    scales: Floats = size * F32(1 / 127)
    if not binary:
        return scales, F32(127) / size
    scales = np.exp2(np.ceil(np.log2(scales.astype(np.float64)))).astype(F32)
    return scales, 1 / scales


class Rounded:
    """Buffers of int8 activations for some tokens, and what they hold."""

    def __init__(self, tokens: int, cols: int) -> None:
        q_row, d_row, b_row = activations.row_bytes(cols)
        self.cols = cols
        self.q = np.zeros((tokens, q_row), np.int8)
        self.d = np.zeros((tokens, d_row), np.uint8)
        self.b = np.zeros((tokens, b_row), np.uint8)

    @property
    def buffers(self) -> list[NDArray[np.generic]]:
        """All arrays."""
        return [self.q, self.d, self.b]

    def addresses(self, token: int) -> tuple[int, int, int]:
        """Where q, d, b of a token begin."""
        return address(self.q[token:]), address(self.d[token:]), address(self.b[token:])

    def assert_holds(self, x: Floats, *, binary: bool = False) -> None:
        """Compare with the rounded form of x (tokens, columns)."""
        blocks = x.reshape(len(x), -1, 32)
        size = np.abs(blocks).max(2)
        scales, factors = block_scales(size, binary=binary)
        np.testing.assert_array_equal(self.d.view(F32), scales)
        codes = self.q[:, : self.cols].reshape(blocks.shape).astype(int)
        exact = blocks * factors[:, :, None]
        assert np.abs(codes - exact).max() <= 0.5001
        sums = self.b.view(np.int32).reshape(len(x), -1, 4)
        np.testing.assert_array_equal(sums[:, :, 2], codes[:, :, :16].sum(2))
        np.testing.assert_array_equal(sums[:, :, 3], codes[:, :, 16:].sum(2))
