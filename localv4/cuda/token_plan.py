"""Decoding on a GPU: one token through all layers, as recorded launches."""

from copy import copy
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from localv4.cuda.gpu import Recording
from localv4.cuda.missing_experts import MissingExperts
from localv4.cuda.network import GpuNetwork
from localv4.cuda.program import GpuProgram, twin_of
from localv4.cuda.twins.products import COMBINE
from localv4.cuda.vram_store import VramStore
from localv4.kernels.formats import OPERATIONS
from localv4.kernels.packed import GROUP_ROWS
from localv4.model.fast_moe import FastMoe, HiddenLayers
from localv4.model.fast_token import FIRST_POSITIONS
from localv4.model.matrix import F32, Floats
from localv4.model.program import Program
from localv4.model.state import State
from localv4.model.workspace import AttentionBuffers, ChunkBuffers, Seen, buffer_bytes


class GpuTokenPlan:
    """The program for one token; recorded again when the context outgrows its buffers.

    While all experts are on the GPU it is one recording. Otherwise each layer has two: up to its
    router, and the experts. Between them the host learns what was chosen, and computes with those
    that it has while the GPU computes with its own.
    """

    def __init__(self, network: GpuNetwork, store: VramStore) -> None:
        config = network.config
        self._network, self._store = network, store
        self._chunk = ChunkBuffers(config, 1)
        self._hidden = HiddenLayers(config, network.most_forms)
        k, layers = config.experts_per_token, config.n_layers
        self._chosen = np.zeros((layers, k), np.int64)
        self._shares = np.zeros((layers, k), F32)
        self._missing = MissingExperts(network, store)
        self._positions = 0
        self._attention: AttentionBuffers | None = None
        self._recordings: list[Recording] = []
        self._whole = False
        network.adopt(self._chunk, self._hidden, self._chosen, self._shares)

    @property
    def nbytes(self) -> int:
        """Bytes of the buffers."""
        owners = (self._chunk, self._hidden, self._attention)
        return sum(buffer_bytes(owner) for owner in owners if owner is not None)

    def run(self, ids: NDArray[np.int64], state: State) -> Floats:
        """Process the one token of `ids`; return its final vector (1, hidden)."""
        network, store = self._network, self._store
        if state.position >= self._positions or store.is_whole != self._whole:
            self._record(max(FIRST_POSITIONS, 2 * (state.position + 1)))
        assert self._attention is not None
        network.begin(self._chunk, ids, state)
        self._attention.context[0] = state.position
        network.publish(self._attention.context)
        if self._whole:
            network.check_cancelled()
            self._recordings[0].replay()
        else:
            self._run_layers()
        network.fetch(self._chunk.x.values[:1])
        self._note()
        return self._chunk.x.values[:1].copy()

    def _run_layers(self) -> None:
        """Run layer by layer; what only the host has, it computes meanwhile."""
        network, missing = self._network, self._missing
        network.publish(self._store.addresses)
        for layer in range(network.config.n_layers):
            network.check_cancelled()
            self._recordings[2 * layer].replay()
            missing.ask(self._chosen[layer : layer + 1], self._chunk.x)
            self._recordings[2 * layer + 1].replay()
            missing.compute(layer)
        self._recordings[-1].replay()

    def _record(self, positions: int) -> None:
        """Build the program for positions below a bound, and record it."""
        network, config = self._network, self._network.config
        network.disown(self._attention)
        self._attention = AttentionBuffers(config, 1, Seen.before(positions, config), 1)
        network.adopt(self._attention)
        self._positions, self._whole = positions, self._store.is_whole
        program = network.new_program()
        self._attention.add_angles(program, 1)
        self._recordings = []
        for index, layer in enumerate(network.layers):
            chunk = self._chunk_of(index)
            layer.add_mixing(program, chunk, 1)
            layer.add_attention(program, chunk, self._attention, 1)
            layer.add_router(program, chunk, 1)
            layer.moe.add_resolve(program, chunk, self._hidden, 0)
            if self._whole:
                layer.moe.add_gate_up(program, chunk, self._hidden)
                layer.moe.add_down(program, chunk, self._hidden)
                continue
            self._recordings.append(network.record(program))
            self._recordings.append(network.record(self._with_experts(layer.moe, chunk)))
            program = network.new_program()
            self._add_sum(program, chunk)
        network.head_site.add_mixing(program, self._chunk, 1, updates=2, leaves=True)
        network.head_site.add_head_entry(program, self._chunk, 1)
        self._recordings.append(network.record(program))

    def _chunk_of(self, layer: int) -> ChunkBuffers:
        """Return the buffers with places of their own for what a layer chooses."""
        chunk = copy(self._chunk)
        chunk.chosen = self._chosen[layer : layer + 1]
        chunk.shares = self._shares[layer : layer + 1]
        return chunk

    def _with_experts(self, moe: FastMoe, chunk: ChunkBuffers) -> Program:
        """Return the program of the experts that are on the GPU, their outputs not summed yet."""
        program, hidden = self._network.new_program(), self._hidden
        assert isinstance(program, GpuProgram)
        moe.add_gate_up(program, chunk, hidden)
        program.round(hidden.rounded, hidden.values, len(hidden.early))
        moe.shared.add_rounding(program, hidden.shared, 1)
        with program.alongside():
            for form, records in zip(moe.forms, hidden.records, strict=False):
                parts = self._missing.parts
                twin = twin_of(OPERATIONS[form.down.name].down)
                program.add_twin(
                    replace(twin, kernels=twin.kernels[:1]),
                    *(records.ctypes.data, len(records), form.hidden // GROUP_ROWS, form.inner),
                    *(*hidden.rounded.addresses, 0, 0, form.offset, 0),
                    scratch=parts.ctypes.data,
                )
            moe.shared.add_down(program, chunk.shared_update, hidden.shared, 1)
        return program

    def _add_sum(self, program: Program, chunk: ChunkBuffers) -> None:
        """Add the weighted outputs of all experts."""
        assert isinstance(program, GpuProgram)
        parts = self._missing.parts
        program.add_twin(
            COMBINE,
            *(parts.ctypes.data, parts.shape[1], len(parts), parts.shape[1]),
            *(chunk.shares.ctypes.data, chunk.update.at(), 0),
        )

    def _note(self) -> None:
        """Tell the store and whoever listens what was chosen."""
        network, store = self._network, self._store
        if store.is_whole and network.on_routes is None:
            return
        network.fetch(self._chosen)
        for layer, numbers in enumerate(self._chosen):
            store.uses.record(layer, numbers)
        store.end_token()
        if not store.is_whole:
            store.promote([(layer, n) for layer, row in enumerate(self._chosen.tolist()) for n in row])
        if network.on_routes is not None:
            network.on_routes(self._chosen[None], False)
