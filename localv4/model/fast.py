"""Arithmetic `fast`: packed weights, activations rounded to int8 in blocks of 32.

That is finer than the FP8 activations in blocks of 128 that the released models were trained with.
Float matrices (router, hyper-connections, compressors, head of official files), whatever has no
packed form, and FP8 weights see unrounded activations.
"""

import numpy as np
from numpy.typing import NDArray

from localv4.kernels import activations, program
from localv4.kernels.packed import (
    BLOCK,
    F8,
    F8_SPAN,
    FORMATS,
    GROUP_ROWS,
    down_offset,
    group_bytes,
)
from localv4.kernels.program import ALONGSIDE, DOWN, GATE_UP, MATVEC, QUANTIZE
from localv4.model.matrix import F32, Floats, Matrix, Numerics
from localv4.model.packing import ExpertCache, ExpertRecord, PackedMatrix, record_addresses
from localv4.model.weights import Expert

Program = NDArray[np.int64]


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


class FastNumerics(Numerics):
    """Products with packed weights by a team of threads; everything else as in `exact`."""

    name = "fast"

    def __init__(self, threads: int, widest: int, expert_budget_bytes: int) -> None:
        super().__init__(threads, widest)
        self._experts = ExpertCache(expert_budget_bytes)

    def linear(self, x: Floats, weight: Matrix, groups: int = 1) -> Floats:
        """Return weight . x for each token; x (tokens, groups * cols) -> (tokens, rows)."""
        if not isinstance(weight, PackedMatrix) or not _can_split(weight, groups):
            return super().linear(x, weight, groups)
        self.check_cancelled()
        out = np.empty((x.shape[0], weight.rows), F32)
        inputs = Activations(x.size)
        steps = _matvecs(out, x, weight, groups, inputs)
        if weight.form is not F8:
            steps = np.concatenate([_quantize(x, inputs), steps])
        self.team.run(steps)
        return out

    def mix_experts(
        self,
        x: Floats,
        chosen: NDArray[np.int64],
        weights: Floats,
        layer: int,
        experts: tuple[Expert, ...],
        limit: np.float32,
    ) -> Floats:
        """Return the weighted sum of each token's experts (tokens, hidden)."""
        out = np.empty_like(x)
        for token in range(x.shape[0]):
            self.check_cancelled()
            # ascending order makes the sum independent of the order of choice
            order = np.argsort(chosen[token], kind="stable")
            numbers = chosen[token][order]
            records = [self._experts.get(layer, int(n), experts[n]) for n in numbers]
            packed = [record for record in records if record is not None]
            if len(packed) < len(records):
                return super().mix_experts(x, chosen, weights, layer, experts, limit)
            self._mix(out[token], x[token], packed, weights[token][order], experts[0], limit)
        return out

    def _mix(
        self,
        out: Floats,
        x: Floats,
        records: list[ExpertRecord],
        weights: Floats,
        shape: Expert,
        limit: np.float32,
    ) -> None:
        """Run one token through its experts; `shape` has their dimensions."""
        hidden, inner, form = shape.w1.cols, shape.w1.rows, records[0].form
        count, code = len(records), FORMATS.index(form)
        where = record_addresses(records)
        middle = np.empty((count, inner), F32)
        inputs, inner_inputs = Activations(hidden), Activations(middle.size)
        steps = np.zeros((4, program.WORDS), np.int64)
        steps[0:1] = _quantize(x, inputs)
        common = (code, where.ctypes.data, count)
        limit_bits = int(np.array([limit], F32).view(np.uint32)[0])
        steps[1, :11] = (
            *(GATE_UP, *common, inner // GROUP_ROWS, hidden, *inputs.addresses()),
            *(middle.ctypes.data, limit_bits),
        )
        steps[2:3] = _quantize(middle, inner_inputs)
        steps[3, :12] = (
            *(DOWN, *common, hidden // GROUP_ROWS, inner, *inner_inputs.addresses()),
            *(out.ctypes.data, weights.ctypes.data, down_offset(form, hidden, inner)),
        )
        self.team.run(steps)


def _can_split(weight: PackedMatrix, groups: int) -> bool:
    """Say whether blocks of a block-diagonal matrix are whole row groups, and whole FP8 blocks."""
    unit = F8_SPAN if weight.form is F8 and groups > 1 else GROUP_ROWS
    return weight.rows // groups % unit == 0


def _quantize(x: Floats, inputs: Activations) -> Program:
    """Return the operation that rounds all of x."""
    step = np.zeros((1, program.WORDS), np.int64)
    step[0, :6] = (QUANTIZE, x.ctypes.data, x.size // BLOCK, *inputs.addresses())
    return step


def _matvecs(
    out: Floats, x: Floats, weight: PackedMatrix, groups: int, inputs: Activations
) -> Program:
    """Return the operations that multiply every token with every block of a matrix."""
    tokens, rows = x.shape[0], weight.rows // groups
    block_bytes = rows // GROUP_ROWS * group_bytes(weight.form, weight.cols)
    steps = np.zeros((tokens * groups, program.WORDS), np.int64)
    for token in range(tokens):
        for group in range(groups):
            first = token * x.shape[1] + group * weight.cols
            q, d, b = inputs.addresses(first)
            if weight.scales is not None:
                q = x.ctypes.data + 4 * first
                above = group * rows // F8_SPAN * weight.scales.shape[1]
                d = weight.scales.ctypes.data + 4 * above
            block = weight.packed.ctypes.data + group * block_bytes
            steps[token * groups + group, :9] = (
                *(MATVEC, FORMATS.index(weight.form), block),
                *(rows // GROUP_ROWS, weight.cols, q, d, b),
                out.ctypes.data + 4 * (token * weight.rows + group * rows),
            )
    steps[:, ALONGSIDE] = 1
    return steps
