"""Mixture of experts as operations: for one token inside its program, for many wave by wave."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from localv4.kernels import route
from localv4.kernels.formats import OPERATIONS
from localv4.kernels.isa import ISA
from localv4.kernels.operation import float_bits
from localv4.kernels.packed import GROUP_ROWS, MX4
from localv4.kernels.rows import clear
from localv4.kernels.single_token import quantize
from localv4.model.config import ModelConfig
from localv4.model.experts import Experts
from localv4.model.fast_shared import FastShared, SharedBuffers
from localv4.model.packing import ExpertForm
from localv4.model.program import Input, Program, Rounded, Rows
from localv4.model.weights import Expert, Router
from localv4.model.workspace import ChunkBuffers
from localv4.paging.store import ABSENT, ExpertStore

SHARED_TOKENS = 960
"""Tokens that go through the shared expert in one program: what Ctrl-C waits for."""

WAVE_SLOTS = 4096
"""Pairs of token and expert that are multiplied together: bounds the memory of activations."""


SURE_USES = 4
"""Uses for each expert of a layer from which on nearly every one is used."""


class HiddenLayers:
    """The hidden layers of the experts of one token, and where their records are.

    `records` (forms, experts of a token) i64 has the addresses of those of each form, else 0;
    `early` (experts of a token) i64 those of records that are there before others.
    """

    def __init__(self, config: ModelConfig, forms: int = 1) -> None:
        experts, inner = config.experts_per_token, config.expert_width
        self.records = np.zeros((forms, experts), np.int64)
        self.early = np.zeros(experts, np.int64)
        self.values, self.rounded = Rows(experts, inner), Rounded(experts, inner)
        self.shared = SharedBuffers(1, inner * config.shared_experts)


class WaveBuffers:
    """Activations of the experts of a wave; a slot is a pair of a token and one of its experts.

    `records`, `starts`, `tokens` and `shares` have room for those of a `Wave`.
    """

    def __init__(self, config: ModelConfig, tokens: int) -> None:
        inner = config.expert_width
        self.slots = max(tokens, min(WAVE_SLOTS, tokens * config.experts_per_token))
        self.records = np.zeros(config.n_experts, np.int64)
        self.starts = np.zeros(config.n_experts + 1, np.int64)
        self.tokens = np.zeros(self.slots, np.int64)
        self.shares = np.zeros(self.slots, np.float32)
        self.x = Rounded(self.slots, config.hidden_size, has_pairs=ISA.amx)
        self.hidden = Rounded(self.slots, inner, has_pairs=ISA.amx)
        self.shared = SharedBuffers(min(tokens, SHARED_TOKENS), inner * config.shared_experts)


class ExpertGroups:
    """The experts of several rows, sorted as products of many tokens take them (`route.group`).

    `records` (forms, slots), `starts` (forms, slots + 1), `tokens` (slots,) i64, `shares` (slots,);
    `x` and `hidden` are the inputs of gate and up, and of down, of each slot.
    """

    def __init__(self, config: ModelConfig, rows: int, forms: int) -> None:
        slots, inner = rows * config.experts_per_token, config.expert_width
        self.records = np.zeros((forms, slots), np.int64)
        self.starts = np.zeros((forms, slots + 1), np.int64)
        self.tokens = np.zeros(slots, np.int64)
        self.shares = np.zeros(slots, np.float32)
        self.x, self.hidden = Rounded(slots, config.hidden_size), Rounded(slots, inner)
        self.shared = SharedBuffers(rows, inner * config.shared_experts)


@dataclass(frozen=True, slots=True)
class Wave:
    """Some experts of one form, and their slots: i has slots starts[i] ... starts[i + 1] - 1.

    `tokens` and `shares` have the token of each slot and its weight there. They are valid until the
    next wave.
    """

    form: ExpertForm
    records: NDArray[np.int64]
    starts: NDArray[np.int64]
    tokens: NDArray[np.int64]
    shares: NDArray[np.float32]

    @property
    def arrays(self) -> tuple[NDArray[np.generic], ...]:
        """All that a program reads of it."""
        return self.records, self.starts, self.tokens, self.shares


@dataclass(frozen=True, slots=True)
class Slots:
    """Pairs of tokens and experts, sorted by expert: `sizes` how many each expert has."""

    sizes: NDArray[np.int64]
    starts: NDArray[np.int64]
    pairs: NDArray[np.int64]

    @classmethod
    def of(cls, chosen: NDArray[np.int64], experts: int) -> "Slots":
        """Sort the pairs of tokens with their experts, `chosen` (tokens, k)."""
        sizes = np.bincount(chosen.ravel(), minlength=experts)
        starts = np.concatenate([[0], np.cumsum(sizes)])
        return cls(sizes, starts, np.argsort(chosen, axis=None, kind="stable"))

    def of_experts(self, numbers: NDArray[np.int64]) -> NDArray[np.int64]:
        """Return the pairs of some experts, one after the other."""
        parts = [self.pairs[self.starts[e] : self.starts[e + 1]] for e in numbers]
        return np.concatenate(parts)


class FastMoe:
    """The feed-forward part of one layer."""

    def __init__(
        self,
        index: int,
        router: Router,
        shared: Expert,
        experts: Experts,
        store: ExpertStore,
        config: ModelConfig,
    ) -> None:
        self.index, self.router, self.config = index, router, config
        self.experts, self.store = experts, store
        self.shared = FastShared(shared, config.shared_swiglu_limits[index])
        self.limit = float_bits(config.swiglu_limits[index])

    @property
    def forms(self) -> tuple[ExpertForm, ...]:
        """The forms of the layer's records; none: they are multiplied as they are stored."""
        return self.experts.forms[self.index]

    @property
    def has_binary_inputs(self) -> bool:
        """Whether the scales of inputs of gate and up are powers of two (`kernels.activations`).

        All are where some may be used as pairs: every form takes the same inputs.
        """
        return ISA.amx and any(form.gate_up == MX4 for form in self.forms)

    @property
    def has_binary_hidden(self) -> bool:
        """The same of the inputs of down."""
        return ISA.amx and any(form.down == MX4 for form in self.forms)

    @property
    def can_guess(self) -> bool:
        """Whether the layer's experts can be guessed: those of a table are known, not guessed."""
        return self.router.table is None and bool(self.forms)

    def known(self, token: int) -> list[int]:
        """Return the experts that a table names for a token; none if there is no table."""
        if self.router.table is None or not self.forms:
            return []
        numbers: list[int] = self.router.table[token].tolist()
        return numbers

    def likeliest_first(self, guess: ChunkBuffers) -> list[int]:
        """Return the experts that one token is guessed to choose by what their router gives."""
        chosen = guess.chosen[0]
        merit = np.sqrt(np.logaddexp(0, guess.logits.values[0, chosen]))
        if self.router.bias is not None:
            merit += self.router.bias[chosen]
        numbers: list[int] = chosen[np.argsort(-merit)].tolist()
        return numbers

    def request_first(self, tokens: int) -> None:
        """Have the first experts read before it is known which ones many tokens choose."""
        slots = tokens * self.config.experts_per_token
        if self.forms and slots >= SURE_USES * self.config.n_experts:
            self._read_ahead(np.arange(self.config.n_experts))

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
        store, index, uses = self.store, self.index, self.store.uses
        program.add(
            route.resolve,
            *(chunk.chosen.ctypes.data, self.config.experts_per_token),
            *(store.addresses[index].ctypes.data, self.experts.form_numbers[index].ctypes.data),
            *(len(self.forms), hidden.records.ctypes.data),
            *(uses.heat[index].ctypes.data, uses.last[index].ctypes.data, uses.clock.ctypes.data),
            *(uses.decay.ctypes.data, len(uses.decay), halt),
        )

    def add_glance(self, program: Program, guess: ChunkBuffers, halt: int) -> None:
        """Halt if one of the experts that one token is guessed to choose is absent."""
        chosen, table = guess.chosen.ctypes.data, self.store.addresses[self.index].ctypes.data
        program.add(route.glance, chosen, guess.chosen.shape[1], table, halt)

    def add_gate_up(self, program: Program, chunk: ChunkBuffers, hidden: HiddenLayers) -> None:
        """Compute the hidden layers of one token's experts, which are looked up."""
        x, count = Input(chunk.x, chunk.x_rounded), self.config.experts_per_token
        with program.alongside():
            for form, records in zip(self.forms, hidden.records, strict=False):
                self._add_gate_up(program, chunk, form, records.ctypes.data, count, hidden, 0)
            self.shared.add_gate_up(program, hidden.shared, x, 1)

    def add_early_gate_up(
        self, program: Program, chunk: ChunkBuffers, hidden: HiddenLayers, places: Sequence[int]
    ) -> None:
        """The same for some of the token's experts, by their places, and not the shared one."""
        with program.alongside():
            for place in places:
                form = self.experts.form(self.index, int(chunk.chosen[0, place]))
                record = hidden.early[place : place + 1].ctypes.data
                self._add_gate_up(program, chunk, form, record, 1, hidden, place)
        with program.alongside():
            for place in places:
                own, values = hidden.rounded.part(place), hidden.values.part(place)
                program.round(own, values, 1, binary=self.has_binary_hidden)

    def add_early_down(
        self, program: Program, chunk: ChunkBuffers, hidden: HiddenLayers, places: range
    ) -> None:
        """Add the outputs of neighbours among the token's experts to `update`, in their order.

        Those at place 0 begin the sum. All experts of the layer have one form.
        """
        first = places.start
        program.add(
            OPERATIONS[self.forms[0].down.name].down,
            *(hidden.early[first:].ctypes.data, len(places)),
            *(self.forms[0].hidden // GROUP_ROWS, self.forms[0].inner),
            *(*hidden.rounded.part(first).addresses, chunk.update.at()),
            *(chunk.shares[0, first:].ctypes.data, self.forms[0].offset, int(first > 0)),
        )

    def _add_gate_up(
        self,
        program: Program,
        chunk: ChunkBuffers,
        form: ExpertForm,
        records: int,
        count: int,
        hidden: HiddenLayers,
        place: int,
    ) -> None:
        """Compute the hidden layers of `count` experts, the first at `place` among the token's."""
        program.add(
            OPERATIONS[form.gate_up.name].gate_up,
            *(records, count, form.inner // GROUP_ROWS, form.hidden),
            *(*chunk.x_rounded.addresses, hidden.values.part(place).at(), self.limit),
        )

    def add_rounding(self, program: Program, hidden: HiddenLayers) -> None:
        """Round the hidden layers of one token, of its experts and of the shared one."""
        with program.alongside():
            experts, binary = self.config.experts_per_token, self.has_binary_hidden
            program.round(hidden.rounded, hidden.values, experts, binary=binary)
            if self.shared.is_packed:
                self.shared.add_rounding(program, hidden.shared, 1)
        if not self.shared.is_packed:
            self.shared.add_rounding(program, hidden.shared, 1)

    def add_down(self, program: Program, chunk: ChunkBuffers, hidden: HiddenLayers) -> None:
        """Compute `update` and `shared_update` of one token from the hidden layers."""
        self.add_rounding(program, hidden)
        with program.alongside():
            self.shared.add_down(program, chunk.shared_update, hidden.shared, 1)
            self._add_down(program, chunk, hidden, 0)
        for form in range(1, len(self.forms)):
            self._add_down(program, chunk, hidden, form)

    def add_late_down(self, program: Program, chunk: ChunkBuffers, hidden: HiddenLayers) -> None:
        """Compute `update` alone, of hidden layers that are rounded."""
        for form in range(len(self.forms)):
            self._add_down(program, chunk, hidden, form)

    def _add_down(
        self, program: Program, chunk: ChunkBuffers, hidden: HiddenLayers, number: int
    ) -> None:
        """Add the outputs of the experts of one form; those of the first begin the sum."""
        form, records = self.forms[number], hidden.records[number]
        program.add(
            OPERATIONS[form.down.name].down,
            *(records.ctypes.data, len(records), form.hidden // GROUP_ROWS, form.inner),
            *(*hidden.rounded.addresses, chunk.update.at(), chunk.shares.ctypes.data),
            *(form.offset, int(number > 0)),
        )

    def add_groups(
        self, program: Program, chunk: ChunkBuffers, groups: ExpertGroups, halt: int
    ) -> None:
        """Compute `update` of several rows; the program halts here when an expert is absent."""
        store, index, uses, k = self.store, self.index, self.store.uses, chunk.chosen.shape[1]
        update, rows = chunk.update, groups.shared.tokens
        program.add(
            route.group,
            *(chunk.chosen.ctypes.data, k, store.addresses[index].ctypes.data),
            *(self.experts.form_numbers[index].ctypes.data, len(self.forms)),
            *(groups.records.ctypes.data, uses.heat[index].ctypes.data),
            *(uses.last[index].ctypes.data, uses.clock.ctypes.data, uses.decay.ctypes.data),
            *(len(uses.decay), halt, rows, groups.starts.ctypes.data, groups.tokens.ctypes.data),
            *(chunk.shares.ctypes.data, groups.shares.ctypes.data, self.config.n_experts),
        )
        tokens = groups.tokens.ctypes.data
        with program.alongside():
            program.add(
                quantize,
                *(chunk.x.at(), chunk.x.stride, tokens, len(groups.tokens), chunk.x.cols),
                *(*groups.x.addresses, int(self.has_binary_inputs)),
            )
            self.add_clearing(program, chunk, rows)
        for form, records, starts in zip(self.forms, groups.records, groups.starts, strict=False):
            experts = (records.ctypes.data, len(records), starts.ctypes.data)
            slots = (tokens, groups.shares.ctypes.data)
            self._add_experts(program, form, experts, groups.x, groups.hidden, update, slots)

    def add_shared(
        self, program: Program, chunk: ChunkBuffers, buffers: SharedBuffers, tokens: int
    ) -> None:
        """Compute `shared_update` alone."""
        x = Input(chunk.x, chunk.x_rounded)
        with program.alongside():
            self.shared.add_gate_up(program, buffers, x, tokens)
        self.shared.add_rounding(program, buffers, tokens)
        self.shared.add_down(program, chunk.shared_update, buffers, tokens)

    def add_clearing(self, program: Program, chunk: ChunkBuffers, tokens: int) -> None:
        """Set `update` to zero, to which waves are added."""
        update = chunk.update
        program.add(clear, update.at(), update.stride, tokens, update.cols)

    def waves(self, chunk: ChunkBuffers, buffers: WaveBuffers, tokens: int) -> Iterator[Wave]:
        """Yield the chosen experts, form by form and in ascending order, some at a time.

        Those of a wave are in memory until the next one is asked for, and later ones on their way.
        """
        chosen, store = chunk.chosen[:tokens], self.store
        if not self.forms:
            return
        slots = Slots.of(chosen, self.config.n_experts)
        store.begin_prompt(self.index, chosen)
        parts = list(self.parts(slots.sizes, buffers.slots, store.largest_claim(self.index)))
        left = np.concatenate(parts)
        try:
            for part in parts:
                left = left[len(part) :]
                store.claim(self.index, part.tolist())
                self._read_ahead(left)
                while (store.addresses[self.index, part] <= 0).any():
                    store.wait(self.index, part.tolist())
                wave = self.wave(buffers, part, slots, chunk.shares)
                wave.records[:] = store.addresses[self.index, part]
                yield wave
                store.release(self.index, part.tolist())
        finally:
            store.end_prompt(self.index)

    def wave(
        self,
        buffers: WaveBuffers,
        part: NDArray[np.int64],
        slots: Slots,
        shares: NDArray[np.float32],
    ) -> Wave:
        """Return the wave of some experts, whose records are still to be named."""
        mine, sizes = slots.of_experts(part), slots.sizes[part]
        wave = Wave(
            self.experts.form(self.index, int(part[0])),
            buffers.records[: len(part)],
            buffers.starts[: len(part) + 1],
            buffers.tokens[: len(mine)],
            buffers.shares[: len(mine)],
        )
        wave.records[:] = ABSENT
        np.cumsum(sizes, out=wave.starts[1:])
        wave.tokens[:], wave.shares[:] = mine // shares.shape[1], shares.ravel()[mine]
        return wave

    def _read_ahead(self, left: NDArray[np.int64]) -> None:
        """Keep two waves of absent ones among the experts that come next claimed, no more.

        Those that have come count, too: where the disk is faster than the products, all of a layer
        would be claimed one after the other, and small memory would not hold them.
        """
        store, absent = self.store, left[self.store.addresses[self.index, left] == ABSENT]
        room = 2 * store.largest_claim(self.index) - store.count_claimed(self.index, left.tolist())
        store.claim(self.index, absent[: max(0, room)].tolist())

    def parts(
        self, sizes: NDArray[np.int64], slots: int, largest: int
    ) -> Iterator[NDArray[np.int64]]:
        """Yield the experts in use, those of one form that fit into some slots at a time.

        There are `largest` at most; `sizes` are the slots of each expert.
        """
        for form in range(len(self.forms)):
            used = np.flatnonzero((sizes > 0) & (self.experts.form_numbers[self.index] == form))
            while len(used):
                ends = np.cumsum(sizes[used[:largest]])
                fitting = max(1, int(np.searchsorted(ends, slots, side="right")))
                yield used[:fitting]
                used = used[fitting:]

    def add_wave(
        self, program: Program, chunk: ChunkBuffers, buffers: WaveBuffers, wave: Wave
    ) -> None:
        """Add the weighted outputs of the experts of a wave to `update`."""
        experts = (wave.records.ctypes.data, len(wave.records), wave.starts.ctypes.data)
        tokens, x = wave.tokens.ctypes.data, chunk.x
        program.add(
            quantize,
            *(x.at(), x.stride, tokens, len(wave.tokens), x.cols, *buffers.x.addresses),
            *(int(self.has_binary_inputs), *buffers.x.pairs),
        )
        slots = (tokens, wave.shares.ctypes.data)
        self._add_experts(
            program, wave.form, experts, buffers.x, buffers.hidden, chunk.update, slots
        )

    def _add_experts(
        self,
        program: Program,
        form: ExpertForm,
        experts: tuple[int, int, int],
        x: Rounded,
        hidden: Rounded,
        update: Rows,
        slots: tuple[int, int],
    ) -> None:
        """Add the weighted outputs of experts of one form to `update`.

        `experts` are records, their number and starts, `slots` the tokens and shares of slots.
        """
        self.add_hidden(program, form, experts, x, hidden)
        out = update.at(), 4 * update.stride
        self.add_outputs(program, form, experts, hidden, out, slots)

    def add_hidden(
        self,
        program: Program,
        form: ExpertForm,
        experts: tuple[int, int, int],
        x: Rounded,
        hidden: Rounded,
    ) -> None:
        """Compute the hidden layers of the slots of experts: records, their number and starts."""
        program.add(
            OPERATIONS[form.gate_up.name].experts_gate_up,
            *(*experts, 2 * form.inner // GROUP_ROWS, form.hidden, *x.addresses),
            *(*hidden.addresses, program.panels, self.limit, int(self.has_binary_hidden)),
            *(*x.pairs, *hidden.pairs),
        )

    def add_outputs(
        self,
        program: Program,
        form: ExpertForm,
        experts: tuple[int, int, int],
        hidden: Rounded,
        out: tuple[int, int],
        slots: tuple[int, int],
    ) -> None:
        """Add the weighted outputs of experts to rows of `out`: an address, and bytes of a row.

        `slots` are the row of each slot and its weight.
        """
        program.add(
            OPERATIONS[form.down.name].experts_down,
            *(*experts, form.hidden // GROUP_ROWS, form.inner, *hidden.addresses),
            *(*out, program.panels, *slots, form.offset, *hidden.pairs),
        )
