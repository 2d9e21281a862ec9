"""Mixture of experts as operations: for one token inside its program, for many wave by wave."""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from localv4.kernels import route
from localv4.kernels.formats import OPERATIONS
from localv4.kernels.operation import float_bits
from localv4.kernels.packed import GROUP_ROWS
from localv4.kernels.single_token import quantize
from localv4.model.config import ModelConfig
from localv4.model.experts import ExpertStore
from localv4.model.fast_shared import FastShared, SharedBuffers
from localv4.model.packing import ExpertForm
from localv4.model.program import Input, Program, Rounded, Rows
from localv4.model.weights import Expert, Router
from localv4.model.workspace import ChunkBuffers

WAVE_SLOTS = 4096
"""Pairs of token and expert that are multiplied together: bounds the memory of activations."""


class HiddenLayers:
    """The hidden layers of the experts of one token, and where their records are."""

    def __init__(self, config: ModelConfig) -> None:
        experts, inner = config.experts_per_token, config.expert_width
        self.records = np.zeros(experts, np.int64)
        self.values, self.rounded = Rows(experts, inner), Rounded(experts, inner)
        self.shared = SharedBuffers(1, inner * config.shared_experts)


class WaveBuffers:
    """Activations of the experts of a wave; a slot is a pair of a token and one of its experts."""

    def __init__(self, config: ModelConfig, tokens: int) -> None:
        inner = config.expert_width
        self.slots = max(tokens, min(WAVE_SLOTS, tokens * config.experts_per_token))
        self.x, self.hidden = Rounded(self.slots, config.hidden_size), Rounded(self.slots, inner)
        self.shared = SharedBuffers(tokens, inner * config.shared_experts)


@dataclass(frozen=True, slots=True)
class Wave:
    """Some experts and their slots: expert i has slots starts[i] ... starts[i + 1] - 1.

    `tokens` and `shares` have the token of each slot and its weight there.
    """

    experts: NDArray[np.int64]
    records: NDArray[np.int64]
    starts: NDArray[np.int64]
    tokens: NDArray[np.int64]
    shares: NDArray[np.float32]


class FastMoe:
    """The feed-forward part of one layer."""

    def __init__(
        self, index: int, router: Router, shared: Expert, store: ExpertStore, config: ModelConfig
    ) -> None:
        self.index, self.router, self.store, self.config = index, router, store, config
        self.shared = FastShared(shared, config.shared_swiglu_limits[index])
        self.limit = float_bits(config.swiglu_limits[index])

    @property
    def form(self) -> ExpertForm | None:
        """The form of the layer's packed experts; None: they are multiplied as they are stored."""
        return self.store.forms[self.index]

    def add_router(self, program: Program, chunk: ChunkBuffers, tokens: int) -> None:
        """Choose the experts of each token."""
        router, logits = self.router, chunk.logits
        program.multiply(logits, router.weight, Input(chunk.x, chunk.x_rounded), tokens)
        bias = router.bias.ctypes.data if router.bias is not None else 0
        table = router.table.ctypes.data if router.table is not None else 0
        program.add(
            route.route,
            *(logits.at(), logits.stride, self.config.n_experts, bias, table),
            *(chunk.ids.ctypes.data, self.config.experts_per_token),
            float_bits(self.config.routed_scaling),
            *(chunk.chosen.ctypes.data, chunk.shares.ctypes.data, tokens),
        )

    def add_resolve(
        self, program: Program, chunk: ChunkBuffers, hidden: HiddenLayers, halt: int
    ) -> None:
        """Look up the experts of one token; the program halts here when one is not in memory."""
        store = self.store
        program.add(
            route.resolve,
            *(chunk.chosen.ctypes.data, self.config.experts_per_token),
            *(store.addresses[self.index].ctypes.data, hidden.records.ctypes.data),
            *(store.ticks[self.index].ctypes.data, store.tick.ctypes.data, halt),
        )

    def add_experts(self, program: Program, chunk: ChunkBuffers, hidden: HiddenLayers) -> None:
        """Compute `update` and `shared_update` of one token, whose experts are looked up."""
        form, count = self.form, self.config.experts_per_token
        assert form is not None
        gate_up, down = OPERATIONS[form.gate_up.name].gate_up, OPERATIONS[form.down.name].down
        records = (hidden.records.ctypes.data, count)
        x = Input(chunk.x, chunk.x_rounded)
        with program.alongside():
            program.add(
                gate_up,
                *(*records, form.inner // GROUP_ROWS, form.hidden, *chunk.x_rounded.addresses),
                *(hidden.values.at(), self.limit),
            )
            self.shared.add_gate_up(program, hidden.shared, x, 1)
        program.round(hidden.rounded, hidden.values, count)
        self.shared.add_rounding(program, hidden.shared, 1)
        with program.alongside():
            program.add(
                down,
                *(*records, form.hidden // GROUP_ROWS, form.inner, *hidden.rounded.addresses),
                *(chunk.update.at(), chunk.shares.ctypes.data, form.offset),
            )
            self.shared.add_down(program, chunk.shared_update, hidden.shared, 1)

    def add_shared(
        self, program: Program, chunk: ChunkBuffers, buffers: SharedBuffers, tokens: int
    ) -> None:
        """Compute `shared_update` alone."""
        x = Input(chunk.x, chunk.x_rounded)
        with program.alongside():
            self.shared.add_gate_up(program, buffers, x, tokens)
        self.shared.add_rounding(program, buffers, tokens)
        self.shared.add_down(program, chunk.shared_update, buffers, tokens)

    def waves(self, chunk: ChunkBuffers, buffers: WaveBuffers, tokens: int) -> Iterator[Wave]:
        """Yield the chosen experts in ascending order, as many at a time as there is room for.

        Their records are in memory until the next wave is asked for. Ends early when an expert
        cannot be packed: `form` is None then.
        """
        count = self.config.experts_per_token
        slots = np.argsort(chunk.chosen[:tokens], axis=None, kind="stable")
        sizes = np.bincount(chunk.chosen[:tokens].ravel(), minlength=self.config.n_experts)
        used = np.flatnonzero(sizes)
        first, largest = 0, self.store.largest_wave(self.index)
        start = 0
        while first < len(used):
            ends = np.cumsum(sizes[used[first : first + largest]])
            fitting = max(1, int(np.searchsorted(ends, buffers.slots, side="right")))
            experts, ends = used[first : first + fitting], ends[:fitting]
            if not self.store.ensure(self.index, experts.tolist()):
                return
            mine = slots[start : start + ends[-1]]
            yield Wave(
                experts,
                self.store.addresses[self.index, experts],
                np.concatenate([[0], ends]),
                mine // count,
                chunk.shares.ravel()[mine],
            )
            first, start = first + fitting, start + int(ends[-1])

    def add_wave(
        self, program: Program, chunk: ChunkBuffers, buffers: WaveBuffers, wave: Wave
    ) -> None:
        """Add the weighted outputs of the experts of a wave to `update`."""
        form = self.form
        assert form is not None
        up, down = OPERATIONS[form.gate_up.name], OPERATIONS[form.down.name]
        experts = (wave.records.ctypes.data, len(wave.experts), wave.starts.ctypes.data)
        tokens, x = wave.tokens.ctypes.data, chunk.x
        program.add(
            quantize,
            *(x.at(), x.stride, tokens, len(wave.tokens), form.hidden, *buffers.x.addresses),
        )
        program.add(
            up.experts_gate_up,
            *(*experts, 2 * form.inner // GROUP_ROWS, form.hidden, *buffers.x.addresses),
            *(*buffers.hidden.addresses, program.panels, self.limit),
        )
        program.add(
            down.experts_down,
            *(*experts, form.hidden // GROUP_ROWS, form.inner, *buffers.hidden.addresses),
            *(chunk.update.at(), 4 * chunk.update.stride, program.panels),
            *(tokens, wave.shares.ctypes.data, form.offset),
        )
