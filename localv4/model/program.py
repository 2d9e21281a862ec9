"""Programs for the team of threads: operations (`kernels.operation`) on buffers of activations."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from copy import copy
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from localv4.kernels import activations, gemm, gemm_floats
from localv4.kernels.buffers import aligned_bytes
from localv4.kernels.compiler import Entry
from localv4.kernels.float_operations import OPERATIONS as FLOAT_OPERATIONS
from localv4.kernels.formats import OPERATIONS
from localv4.kernels.operation import ALONGSIDE, WORDS
from localv4.kernels.packed import BLOCK, F8, F8_SPAN, GROUP_ROWS, PackedFormat, group_bytes
from localv4.kernels.pairs import PAIRS_ROW, SPARE_ROWS
from localv4.kernels.single_token import ROW_GAP, quantize
from localv4.kernels.stored import stored_product
from localv4.model.matrix import F32, Matrix
from localv4.model.packing import PackedMatrix


class Rows:
    """Float32 activations (tokens, cols), with a gap between rows (`kernels.activations`).

    `stride` is the distance of rows in floats, `values` the array, without the gaps.
    """

    def __init__(self, tokens: int, cols: int) -> None:
        self.cols = cols
        self.stride = -(-cols // GROUP_ROWS) * GROUP_ROWS + ROW_GAP
        raw = aligned_bytes(4 * self.stride * (tokens + gemm.SPARE_TOKENS))
        self.values = raw.view(F32).reshape(-1, self.stride)[:, :cols]
        self._start: int = self.values.ctypes.data

    def at(self, column: int = 0) -> int:
        """Return the address of a value of the first row."""
        return self._start + 4 * column

    @property
    def nbytes(self) -> int:
        """Bytes of memory."""
        return int(self.values.shape[0]) * self.stride * F32().itemsize

    def part(self, first: int) -> "Rows":
        """Return the rows from `first` on."""
        rows = copy(self)
        rows.values = self.values[first:]
        rows._start = self._start + 4 * first * self.stride
        return rows


class Rounded:
    """Activations (tokens, cols) as int8 with scales (`kernels.activations`).

    `addresses` are those of the buffers q, d and b, `pairs` is that of the same as bfloat16 and its
    distance (`kernels.pairs`), two zeros without `has_pairs`.
    """

    def __init__(self, tokens: int, cols: int, *, has_pairs: bool = False) -> None:
        self.cols = cols
        rows = tokens + gemm.SPARE_TOKENS
        self._buffers = [aligned_bytes(rows * nbytes) for nbytes in activations.row_bytes(cols)]
        q, d, b = (buffer.ctypes.data for buffer in self._buffers)
        self.addresses: tuple[int, int, int] = (q, d, b)
        self.pairs: tuple[int, int] = (0, 0)
        if has_pairs:
            distance = (tokens + SPARE_ROWS) * PAIRS_ROW
            self._buffers.append(aligned_bytes(cols // BLOCK * distance))
            self.pairs = (self._buffers[-1].ctypes.data, distance)

    @property
    def nbytes(self) -> int:
        """Bytes of memory, of a part those of the whole."""
        return sum(buffer.nbytes for buffer in self._buffers)

    @property
    def start(self) -> int:
        """Where the memory starts, of a part that of the whole."""
        address: int = self._buffers[0].ctypes.data
        return address

    def part(self, first: int) -> "Rounded":
        """Return the rows from `first` on."""
        rows = copy(self)
        pairs = zip(self.addresses, activations.row_bytes(self.cols), strict=True)
        q, d, b = (address + first * nbytes for address, nbytes in pairs)
        rows.addresses = (q, d, b)
        start, distance = self.pairs
        rows.pairs = (start + PAIRS_ROW * first if start else 0, distance)
        return rows


@dataclass(frozen=True, slots=True)
class Scratch:
    """Memory of the members: for panels of integers and of floats, and a row for stored matrices.

    Both kinds of products can run at the same time, so neither may use the other's memory.
    """

    panels: NDArray[np.uint8]
    float_panels: NDArray[np.uint8]
    rows: NDArray[np.float32]

    @classmethod
    def of(cls, members: int, widest: int) -> "Scratch":
        """Allocate for so many members and matrices of at most `widest` columns."""
        panels = aligned_bytes(members * gemm.SCRATCH_BYTES)
        float_panels = aligned_bytes(members * gemm_floats.SCRATCH_BYTES)
        return cls(panels, float_panels, np.empty((members, widest + 4), F32))

    @property
    def nbytes(self) -> int:
        """Bytes of memory."""
        return self.panels.nbytes + self.float_panels.nbytes + self.rows.nbytes


class Program:
    """A list of operations that is being built."""

    def __init__(self, scratch: Scratch) -> None:
        self.scratch = scratch
        self._operations: list[list[int]] = []
        self._alongside: set[int] = set()

    @property
    def panels(self) -> int:
        """Where the scratch memory for products of many tokens is."""
        address: int = self.scratch.panels.ctypes.data
        return address

    def __len__(self) -> int:
        return len(self._operations)

    def add(self, entry: Entry, *words: int) -> None:
        """Append an operation."""
        self._operations.append([entry.address, *words])

    @contextmanager
    def alongside(self) -> Iterator[None]:
        """Let the operations that are added inside run at the same time."""
        first = len(self)
        yield
        self._alongside.update(range(first, len(self) - 1))

    def finish(self) -> NDArray[np.int64]:
        """Return the program as an array for the team."""
        steps = np.zeros((len(self), WORDS), np.int64)
        for row, operation in zip(steps, self._operations, strict=True):
            row[: len(operation)] = operation
        steps[list(self._alongside), ALONGSIDE] = 1
        return steps

    def round(
        self, out: Rounded, x: Rows, tokens: int, column: int = 0, *, binary: bool = False
    ) -> None:
        """Round out.cols columns of x from `column` on, for each token."""
        cut = x.at(column), x.stride, 0, tokens, out.cols
        self.add(quantize, *cut, *out.addresses, int(binary))

    def multiply(self, out: Rows, weight: Matrix, x: "Input", tokens: int) -> None:
        """out[t] = weight . x[t] for each token; rounded x[t] where weights are integers."""
        if isinstance(weight, PackedMatrix):
            self._multiply_packed(out, weight, x, tokens, 0, weight.rows)
        else:
            self._multiply_stored(out, weight, x, tokens, 1)

    def multiply_blocks(
        self, out: Rows, weight: Matrix, x: Rows, rounded: "Sequence[Rounded]", tokens: int
    ) -> None:
        """The same for a block-diagonal matrix: block i takes the columns that rounded[i] has."""
        count = len(rounded)
        rows = weight.rows // count
        if not isinstance(weight, PackedMatrix) or rows % _row_unit(weight.form, count):
            self._multiply_stored(out, weight, Input(x), tokens, count)
            return
        with self.alongside():
            for number, part in enumerate(rounded):
                source = Input(x, part, column=number * weight.cols)
                self._multiply_packed(out, weight, source, tokens, number * rows, rows)

    def _multiply_packed(
        self, out: Rows, weight: PackedMatrix, x: "Input", tokens: int, row: int, rows: int
    ) -> None:
        """Multiply with `rows` rows of a matrix from `row` on."""
        name, groups = weight.form.name, -(-rows // GROUP_ROWS)
        start = weight.packed.ctypes.data
        start += row // GROUP_ROWS * group_bytes(weight.form, weight.cols)
        source, target = (start, groups, weight.cols), out.at(row)
        many = (tokens, target, 4 * out.stride)
        if name in OPERATIONS:
            assert x.rounded is not None
            inputs = x.rounded.addresses
            if tokens == 1:
                self.add(OPERATIONS[name].matvec, *source, *inputs, target)
            else:
                self.add(OPERATIONS[name].gemm, *source, *inputs, *many, self.panels)
            return
        scales = 0
        if weight.scales is not None:
            scales = weight.scales.ctypes.data + 4 * (row // F8_SPAN) * weight.scales.shape[1]
        at = x.rows.at(x.column)
        if tokens == 1:
            self.add(FLOAT_OPERATIONS[name].matvec, *source, at, scales, 0, target)
        else:
            gemm_of, scratch = FLOAT_OPERATIONS[name].gemm, self.scratch.float_panels.ctypes.data
            self.add(gemm_of, *source, at, scales, x.rows.stride, *many, scratch)

    def _multiply_stored(
        self, out: Rows, weight: Matrix, x: "Input", tokens: int, blocks: int
    ) -> None:
        self.add(
            stored_product,
            *(weight.format, weight.data.ctypes.data, *weight.data.shape),
            *(weight.scale.ctypes.data, weight.scale.shape[1]),
            *(x.rows.at(), x.rows.stride, tokens, weight.cols, blocks),
            *(out.at(), out.stride),
            *(self.scratch.rows.ctypes.data, self.scratch.rows.shape[1]),
        )


@dataclass(frozen=True, slots=True)
class Input:
    """What a product takes: rows from a column on, and their rounded form where it is needed."""

    rows: Rows
    rounded: Rounded | None = None
    column: int = 0


def _row_unit(form: PackedFormat, blocks: int) -> int:
    """Return what the rows of a block are a multiple of: whole groups, and whole FP8 scales."""
    return F8_SPAN if form is F8 and blocks > 1 else GROUP_ROWS
