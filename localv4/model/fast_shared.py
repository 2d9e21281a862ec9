"""The shared expert as operations: every token goes through it, beside its routed experts."""

import numpy as np

from localv4.kernels import rows
from localv4.kernels.formats import OPERATIONS
from localv4.kernels.operation import float_bits
from localv4.kernels.packed import GROUP_ROWS
from localv4.model.packing import PackedExpert
from localv4.model.program import Input, Program, Rounded, Rows
from localv4.model.weights import Expert


class SharedBuffers:
    """Activations between the two halves of the shared expert, for some tokens."""

    def __init__(self, tokens: int, inner: int) -> None:
        self.tokens = tokens
        self.gate, self.up = Rows(tokens, inner), Rows(tokens, inner)
        self.rounded = Rounded(tokens, inner)
        self.span = np.array([0, tokens], np.int64)


class FastShared:
    """The shared expert of one layer, in one packed record or in three matrices."""

    def __init__(self, expert: Expert, limit: float) -> None:
        self.expert = expert
        self.limit = float_bits(limit)
        self.records = np.zeros(1, np.int64)
        if isinstance(expert, PackedExpert):
            self.records[0] = expert.record.ctypes.data

    @property
    def is_packed(self) -> bool:
        """Whether the expert is one record, which `records` (1,) i64 has the address of."""
        return isinstance(self.expert, PackedExpert)

    def add_gate_up(self, program: Program, buffers: SharedBuffers, x: Input, tokens: int) -> None:
        """Multiply with gate and up; to be followed by `add_rounding`."""
        expert = self.expert
        if not isinstance(expert, PackedExpert):
            program.multiply(buffers.gate, expert.w1, x, tokens)
            program.multiply(buffers.up, expert.w3, x, tokens)
            return
        assert x.rounded is not None
        form, record = expert.form, self.records.ctypes.data
        operations, source = OPERATIONS[form.gate_up.name], x.rounded.addresses
        groups = form.inner // GROUP_ROWS
        if tokens == 1:
            program.add(
                operations.gate_up,
                *(record, 1, groups, form.hidden, *source, buffers.gate.at(), self.limit),
            )
        else:
            buffers.span[1] = tokens
            program.add(
                operations.experts_gate_up,
                *(record, 1, buffers.span.ctypes.data, 2 * groups, form.hidden, *source),
                *(*buffers.rounded.addresses, program.panels, self.limit),
            )

    def add_rounding(self, program: Program, buffers: SharedBuffers, tokens: int) -> None:
        """Gate what `add_gate_up` left, and round it."""
        packed = isinstance(self.expert, PackedExpert)
        gate = buffers.gate
        if not packed:
            program.add(
                rows.swiglu,
                *(gate.at(), buffers.up.at(), gate.stride, gate.at(), gate.stride, self.limit),
                *(tokens, gate.cols),
            )
        if not packed or tokens == 1:
            program.round(buffers.rounded, gate, tokens)

    def add_down(self, program: Program, out: Rows, buffers: SharedBuffers, tokens: int) -> None:
        """Multiply with down."""
        expert = self.expert
        if not isinstance(expert, PackedExpert):
            program.multiply(out, expert.w2, Input(buffers.gate, buffers.rounded), tokens)
            return
        form = expert.form
        operations, source = OPERATIONS[form.down.name], buffers.rounded.addresses
        matrix = (self.records[0] + form.offset, form.hidden // GROUP_ROWS, form.inner, *source)
        if tokens == 1:
            program.add(operations.matvec, *matrix, out.at())
        else:
            program.add(operations.gemm, *matrix, tokens, out.at(), 4 * out.stride, program.panels)
