"""Decoding on a GPU: one token through all layers, as recorded launches."""

import time
from collections.abc import Sequence
from copy import copy

import numpy as np
from numpy.typing import NDArray

from localv4.cuda.gpu import OnCompile, Recording
from localv4.cuda.host_layers import HostLayers
from localv4.cuda.missing_experts import MissingExperts
from localv4.cuda.network import GpuNetwork
from localv4.cuda.program import GpuProgram, name_of
from localv4.cuda.twins.products import COMBINE, DOWN_PARTS
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
    router, and the experts that are there. Meanwhile the host learns what was chosen, and computes
    with the experts that only it has: all of them where they have no packed form.
    """

    def __init__(self, network: GpuNetwork) -> None:
        config = network.config
        self._network, self._store = network, network.store
        self._chunk = ChunkBuffers(config, 1)
        self._hidden = HiddenLayers(config, network.most_forms)
        k = config.experts_per_token
        self._chosen = np.zeros((network.on_gpu, k), np.int64)
        self._shares = np.zeros((network.on_gpu, k), F32)
        self._missing = MissingExperts(network)
        self._positions = 0
        self._attention: AttentionBuffers | None = None
        self._recordings: list[Recording] = []
        self._has_all = False
        self._host: HostLayers | None = None
        network.adopt(self._chunk, self._hidden, self._chosen, self._shares)

    @property
    def nbytes(self) -> int:
        """Bytes of the buffers."""
        owners = (self._chunk, self._hidden, self._attention)
        return sum(buffer_bytes(owner) for owner in owners if owner is not None)

    def run(self, ids: NDArray[np.int64], state: State) -> Floats:
        """Process the one token of `ids`; return its final vector (1, hidden)."""
        network, chunk = self._network, self._chunk
        if state.position >= self._positions or network.has_all_experts != self._has_all:
            self._record(max(FIRST_POSITIONS, 2 * (state.position + 1)))
        assert self._attention is not None
        network.begin(chunk, ids, state)
        self._attention.context[0] = state.position
        network.publish(self._attention.context)
        network.check_cancelled()
        if self._has_all:
            self._recordings[0].replay()
        else:
            self._run_layers()
        if self._host is not None:
            network.enter_layer(network.on_gpu, chunk, 1)
            self._host.run()
        network.fetch(chunk.x.values[:1])
        self._note()
        return chunk.x.values[:1].copy()

    def _run_layers(self) -> None:
        """Run layer by layer; what only the host has, it computes meanwhile."""
        network, missing = self._network, self._missing
        network.publish(self._store.addresses)
        for layer in range(network.on_gpu):
            network.check_cancelled()
            self._recordings[2 * layer].replay()
            if not network.layers[layer].moe.forms:
                self._recordings[2 * layer + 1].replay()
                self._mix_stored(layer)
                continue
            missing.ask(self._chosen[layer : layer + 1], self._chunk.x)
            self._recordings[2 * layer + 1].replay()
            missing.compute(layer)
        self._recordings[-1].replay()

    def _mix_stored(self, layer: int) -> None:
        """Have the host compute with experts that have no packed form."""
        start = time.perf_counter()
        self._network.mix_stored(layer, self._chunk_of(layer), 1)
        self._store.count_misses(layer, self._chosen[layer].tolist())
        self._store.counts.host_s += time.perf_counter() - start

    def _note(self) -> None:
        """Tell the store and whoever listens what was chosen."""
        network, store = self._network, self._store
        if self._has_all and network.on_routes is None:
            store.end_token()
            return
        network.pull(self._chosen)
        for layer, numbers in enumerate(self._chosen):
            store.uses.record(layer, numbers)
        store.end_token()
        if not self._has_all:
            store.promote(
                (layer, n) for layer, row in enumerate(self._chosen.tolist()) for n in row
            )
        if network.on_routes is not None and network.is_whole:
            network.on_routes(self._chosen[None], False)

    def prepare(self, others: Sequence[str], on_compile: OnCompile | None = None) -> None:
        """Record before the first token; what is compiled for that is, and `others` with it."""
        self._record(FIRST_POSITIONS, others, on_compile)

    def _record(
        self, positions: int, others: Sequence[str] = (), on_compile: OnCompile | None = None
    ) -> None:
        """Build the program for positions below a bound, and record it."""
        network, config = self._network, self._network.config
        network.disown(self._attention)
        self._attention = AttentionBuffers(config, 1, Seen.before(positions, config), 1)
        network.adopt(self._attention)
        self._positions, self._has_all = positions, network.has_all_experts
        programs: list[Program] = []
        network.mirrors.push(self._store.addresses)
        program = GpuProgram(network.scratch)
        self._attention.add_angles(program, 1)
        for index, layer in enumerate(network.layers[: network.on_gpu]):
            chunk = self._chunk_of(index)
            layer.add_mixing(program, chunk, 1)
            layer.add_attention(program, chunk, self._attention, 1)
            layer.add_router(program, chunk, 1)
            if not layer.moe.forms:
                shared = GpuProgram(network.scratch)
                layer.moe.add_shared(shared, chunk, self._hidden.shared, 1)
                programs += [program, shared]
                program = GpuProgram(network.scratch)
                continue
            layer.moe.add_resolve(program, chunk, self._hidden, 0)
            if self._has_all:
                layer.moe.add_gate_up(program, chunk, self._hidden)
                layer.moe.add_down(program, chunk, self._hidden)
                continue
            programs += [program, self._with_experts(layer.moe, chunk)]
            program = GpuProgram(network.scratch)
            self._add_sum(program, chunk)
        if network.is_whole:
            network.head_site.add_mixing(program, self._chunk, 1, updates=2, leaves=True)
            network.head_site.add_head_entry(program, self._chunk, 1)
        else:
            self._host = HostLayers(network, self._chunk, self._attention)
        self._recordings = network.record_all([*programs, program], others, on_compile)

    def _chunk_of(self, layer: int) -> ChunkBuffers:
        """Return the buffers with places of their own for what a layer chooses."""
        chunk = copy(self._chunk)
        chunk.chosen = self._chosen[layer : layer + 1]
        chunk.shares = self._shares[layer : layer + 1]
        return chunk

    def _with_experts(self, moe: FastMoe, chunk: ChunkBuffers) -> Program:
        """Return the program of the experts that are on the GPU, their outputs not summed yet."""
        program, hidden = GpuProgram(self._network.scratch), self._hidden
        moe.add_gate_up(program, chunk, hidden)
        moe.add_rounding(program, hidden)
        with program.alongside():
            for form, records in zip(moe.forms, hidden.records, strict=False):
                program.add_twin(
                    DOWN_PARTS[name_of(OPERATIONS[form.down.name].down)],
                    *(records.ctypes.data, len(records), form.hidden // GROUP_ROWS, form.inner),
                    *(*hidden.rounded.addresses, self._missing.parts.ctypes.data),
                    *(chunk.shares.ctypes.data, form.offset, 0),
                )
            moe.shared.add_down(program, chunk.shared_update, hidden.shared, 1)
        return program

    def _add_sum(self, program: GpuProgram, chunk: ChunkBuffers) -> None:
        """Add the weighted outputs of all experts."""
        parts = self._missing.parts
        program.add_twin(
            COMBINE,
            *(parts.ctypes.data, parts.shape[1], len(parts), parts.shape[1]),
            *(chunk.shares.ctypes.data, chunk.update.at(), 0, self._missing.turns.ctypes.data),
        )
