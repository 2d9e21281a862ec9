"""Arithmetic `fast`: packed weights, activations rounded to int8 in blocks of 32.

That is finer than the FP8 activations in blocks of 128 that the released models were trained with.
Float matrices (router, hyper-connections, compressors, head of official files), whatever has no
packed form, and FP8 weights see unrounded activations.
"""

from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray

from localv4.kernels import activations, gemm_f8, panels
from localv4.kernels.buffers import aligned_bytes
from localv4.kernels.gemm import SCRATCH_BYTES
from localv4.kernels.operation import (
    ALONGSIDE,
    DOWN,
    FLOAT_TILES,
    GATE_UP,
    GEMM,
    GEMM_DOWN,
    GEMM_GATE_UP,
    INPUTS,
    MATVEC,
    QUANTIZE,
    WORDS,
)
from localv4.kernels.operation import TILES as OP_TILES
from localv4.kernels.packed import (
    BLOCK,
    F8,
    F8_SPAN,
    FORMATS,
    GROUP_ROWS,
    down_offset,
    group_bytes,
)
from localv4.model.matrix import F32, Floats, Matrix, Numerics
from localv4.model.packing import (
    ExpertCache,
    ExpertRecord,
    PackedMatrix,
    expert_form,
    record_addresses,
)
from localv4.model.weights import Expert

Program = NDArray[np.int64]

FEW_FLOAT_TOKENS = 3
"""Tokens up to which FP8 weights are multiplied one token at a time."""

FEW_TOKENS = 8
"""Tokens of an expert up to which rows of activations are faster than tiles."""


class Activations:
    """Buffers of rounded activations; layouts in `kernels.activations`."""

    def __init__(self, count: int) -> None:
        self.q = np.empty(count, np.int8)
        self.d = np.empty(activations.scale_bytes(count), np.uint8)
        self.b = np.empty(activations.sum_bytes(count), np.uint8)

    def addresses(self, first: int = 0) -> tuple[int, int, int]:
        """Return (q, d, b) from activation `first` on, a multiple of 32."""
        q, d, b = self.q.ctypes.data, self.d.ctypes.data, self.b.ctypes.data
        return (
            q + first,
            d + activations.scale_bytes(first),
            b + activations.sum_bytes(first),
        )


class Tiles:
    """Buffers of rounded activations of many tokens; layouts in `kernels.panels`."""

    def __init__(self, tokens: int, cols: int) -> None:
        self.q = aligned_bytes(panels.q_bytes(tokens, cols))
        self.d = aligned_bytes(panels.d_bytes(tokens, cols))
        self.s = aligned_bytes(panels.s_bytes(tokens, cols))

    def addresses(self) -> tuple[int, int, int]:
        """Return (q, d, s)."""
        return self.q.ctypes.data, self.d.ctypes.data, self.s.ctypes.data


class FloatTiles:
    """A buffer of float32 activations of many tokens; layout in `kernels.gemm_f8`."""

    def __init__(self, tokens: int, cols: int) -> None:
        self.x = aligned_bytes(gemm_f8.x_bytes(tokens, cols))

    def addresses(self) -> tuple[int, int, int]:
        """Return (tiles, 0, 0)."""
        return self.x.ctypes.data, 0, 0


class FastNumerics(Numerics):
    """Products with packed weights by a team of threads; everything else as in `exact`."""

    name = "fast"

    def __init__(self, threads: int, widest: int, expert_budget_bytes: int) -> None:
        super().__init__(threads, widest)
        self._experts = ExpertCache(expert_budget_bytes, threads)
        self._panels = aligned_bytes(threads * SCRATCH_BYTES)

    def linear(self, x: Floats, weight: Matrix, groups: int = 1) -> Floats:
        """Return weight . x for each token; x (tokens, groups * cols) -> (tokens, rows)."""
        if not isinstance(weight, PackedMatrix) or not _can_split(weight, groups):
            return super().linear(x, weight, groups)
        self.check_cancelled()
        out = np.empty((x.shape[0], weight.rows), F32)
        if x.shape[0] > (FEW_FLOAT_TOKENS if weight.form is F8 else 1):
            self._multiply_many(out, x, weight, groups)
        elif weight.form is F8:
            self.team.run(_matvecs(out, x, weight, groups, Activations(0)))
        else:
            inputs = Activations(x.size)
            steps = [_quantize(x, inputs), _matvecs(out, x, weight, groups, inputs)]
            self.team.run(np.concatenate(steps))
        return out

    def _multiply_many(self, out: Floats, x: Floats, weight: PackedMatrix, groups: int) -> None:
        """Multiply many tokens, each block of a block-diagonal matrix with its slice of x."""
        tokens, rows = x.shape[0], weight.rows // groups
        everyone = np.arange(tokens)
        tiles = (FloatTiles if weight.form is F8 else Tiles)(tokens, weight.cols)
        for group in range(groups):
            part = np.ascontiguousarray(x[:, group * weight.cols : (group + 1) * weight.cols])
            first = group * rows // GROUP_ROWS * group_bytes(weight.form, weight.cols)
            q, d, s = tiles.addresses()
            if weight.scales is not None:
                d = _scale_address(weight.scales, group * rows)
            step = np.zeros((1, WORDS), np.int64)
            step[0, :12] = (
                *(GEMM, FORMATS.index(weight.form), weight.packed.ctypes.data + first),
                *(rows // GROUP_ROWS, weight.cols, q, d, s, tokens),
                *(out.ctypes.data + 4 * group * rows, 4 * weight.rows, self._panels.ctypes.data),
            )
            self.team.run(np.concatenate([_tiles(part, everyone, tiles), step]))

    def mix_experts(
        self,
        x: Floats,
        chosen: NDArray[np.int64],
        weights: Floats,
        layer: int,
        experts: tuple[Expert, ...],
        limit: np.float32,
    ) -> Floats:
        """Return the weighted sum of each token's experts (tokens, hidden).

        Ascending order of experts makes the sum independent of neighbours and order of choice.
        """
        numbers = [int(number) for number in np.unique(chosen)]
        forms = {expert_form(experts[number]) for number in numbers}
        records = self._experts.get_all(layer, numbers, experts) if None not in forms else None
        if records is None:
            return super().mix_experts(x, chosen, weights, layer, experts, limit)
        if x.shape[0] > 1:
            return self._mix_many(x, chosen, weights, records, experts[0], limit)
        out = np.empty_like(x)
        order = np.argsort(chosen[0], kind="stable")
        picked = [records[int(number)] for number in chosen[0][order]]
        self._mix_one(out[0], x[0], picked, weights[0][order], experts[0], limit)
        return out

    def _mix_many(
        self,
        x: Floats,
        chosen: NDArray[np.int64],
        weights: Floats,
        records: Mapping[int, ExpertRecord],
        shape: Expert,
        limit: np.float32,
    ) -> Floats:
        """Run many tokens through their experts, expert by expert; `shape` has the dimensions."""
        out = np.zeros_like(x)
        inner = shape.w1.rows
        inputs = Activations(x.size)
        self.team.run(_quantize(x, inputs))
        for number, record in records.items():
            self.check_cancelled()
            slots = np.flatnonzero(chosen == number)
            rows, share = slots // chosen.shape[1], weights.ravel()[slots]
            middle = np.empty((len(rows), inner), F32)
            few = len(rows) <= FEW_TOKENS
            self._gate_up_many(middle, x, rows, inputs if few else None, record, limit)
            self._down_many(out, middle, rows, share, few, record)
        return out

    def _gate_up_many(
        self,
        middle: Floats,
        x: Floats,
        rows: NDArray[np.int64],
        inputs: Activations | None,
        record: ExpertRecord,
        limit: np.float32,
    ) -> None:
        """Fill middle with the hidden layer of x[rows]; `inputs`: x in rows, for a few tokens."""
        count, inner = middle.shape
        source = inputs or Tiles(count, x.shape[1])
        step = np.zeros((1, WORDS), np.int64)
        step[0, :13] = (
            *(GEMM_GATE_UP, FORMATS.index(record.form), record.data.ctypes.data),
            *(2 * inner // GROUP_ROWS, x.shape[1], *source.addresses(), count),
            *(middle.ctypes.data, 4 * inner, self._panels.ctypes.data, _float_bits(limit)),
        )
        if isinstance(source, Tiles):
            step = np.concatenate([_tiles(x, rows, source), step])
        else:
            step[0, INPUTS] = rows.ctypes.data
        self.team.run(step)

    def _down_many(
        self,
        out: Floats,
        middle: Floats,
        rows: NDArray[np.int64],
        share: Floats,
        few: bool,
        record: ExpertRecord,
    ) -> None:
        """Add the expert's output, weighted by `share`, to out[rows]."""
        count, inner = middle.shape
        hidden, everyone = out.shape[1], np.arange(count)
        inputs = Activations(middle.size) if few else Tiles(count, inner)
        start = record.data.ctypes.data + down_offset(record.form, hidden, inner)
        step = np.zeros((1, WORDS), np.int64)
        step[0, :14] = (
            *(GEMM_DOWN, FORMATS.index(record.form), start, hidden // GROUP_ROWS, inner),
            *(*inputs.addresses(), count, out.ctypes.data, 4 * hidden, self._panels.ctypes.data),
            *(rows.ctypes.data, share.ctypes.data),
        )
        if isinstance(inputs, Activations):
            step[0, INPUTS] = everyone.ctypes.data
            self.team.run(np.concatenate([_quantize(middle, inputs), step]))
        else:
            self.team.run(np.concatenate([_tiles(middle, everyone, inputs), step]))

    def _mix_one(
        self,
        out: Floats,
        x: Floats,
        records: list[ExpertRecord],
        weights: Floats,
        shape: Expert,
        limit: np.float32,
    ) -> None:
        """Run one token through its experts at once; `shape` has their dimensions."""
        hidden, inner, form = shape.w1.cols, shape.w1.rows, records[0].form
        where = record_addresses(records)
        middle = np.empty((len(records), inner), F32)
        inputs, inner_inputs = Activations(hidden), Activations(middle.size)
        steps = np.zeros((4, WORDS), np.int64)
        steps[0:1] = _quantize(x, inputs)
        common = (FORMATS.index(form), where.ctypes.data, len(records))
        steps[1, :11] = (
            *(GATE_UP, *common, inner // GROUP_ROWS, hidden, *inputs.addresses()),
            *(middle.ctypes.data, _float_bits(limit)),
        )
        steps[2:3] = _quantize(middle, inner_inputs)
        steps[3, :12] = (
            *(DOWN, *common, hidden // GROUP_ROWS, inner, *inner_inputs.addresses()),
            *(out.ctypes.data, weights.ctypes.data, down_offset(form, hidden, inner)),
        )
        self.team.run(steps)


def _float_bits(value: np.float32) -> int:
    """Return the bits of an f32, as an operand of a program."""
    return int(np.array([value], F32).view(np.uint32)[0])


def _can_split(weight: PackedMatrix, groups: int) -> bool:
    """Say whether blocks of a block-diagonal matrix are whole row groups, and whole FP8 blocks."""
    unit = F8_SPAN if weight.form is F8 and groups > 1 else GROUP_ROWS
    return weight.rows // groups % unit == 0


def _quantize(x: Floats, inputs: Activations) -> Program:
    """Return the operation that rounds all of x."""
    step = np.zeros((1, WORDS), np.int64)
    step[0, :6] = (QUANTIZE, x.ctypes.data, x.size // BLOCK, *inputs.addresses())
    return step


def _scale_address(scales: Floats, row: int) -> int:
    """Return where the FP8 scales of a row begin, which is the first of its block."""
    start: int = scales.ctypes.data
    above: int = row // F8_SPAN * scales.shape[1]
    return start + 4 * above


def _tiles(x: Floats, rows: NDArray[np.int64], tiles: "Tiles | FloatTiles") -> Program:
    """Return the operation that sorts x[rows] into tiles, rounded or as they are."""
    step = np.zeros((1, WORDS), np.int64)
    source = (x.ctypes.data, rows.ctypes.data, len(rows), x.shape[1])
    if isinstance(tiles, Tiles):
        step[0, :8] = (OP_TILES, *tiles.addresses(), *source)
    else:
        step[0, :6] = (FLOAT_TILES, tiles.addresses()[0], *source)
    return step


def _matvecs(
    out: Floats, x: Floats, weight: PackedMatrix, groups: int, inputs: Activations
) -> Program:
    """Return the operations that multiply every token with every block of a matrix."""
    tokens, rows = x.shape[0], weight.rows // groups
    block_bytes = rows // GROUP_ROWS * group_bytes(weight.form, weight.cols)
    steps = np.zeros((tokens * groups, WORDS), np.int64)
    for token in range(tokens):
        for group in range(groups):
            first = token * x.shape[1] + group * weight.cols
            q, d, b = inputs.addresses(first)
            if weight.scales is not None:
                q = x.ctypes.data + 4 * first
                d = _scale_address(weight.scales, group * rows)
            block = weight.packed.ctypes.data + group * block_bytes
            steps[token * groups + group, :9] = (
                *(MATVEC, FORMATS.index(weight.form), block),
                *(rows // GROUP_ROWS, weight.cols, q, d, b),
                out.ctypes.data + 4 * (token * weight.rows + group * rows),
            )
    steps[:, ALONGSIDE] = 1
    return steps
