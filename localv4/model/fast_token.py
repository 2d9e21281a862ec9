"""Decoding: one token through all layers in one program."""

from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from localv4.kernels.operation import WORDS
from localv4.model.experts import UnpackableError
from localv4.model.fast_moe import HiddenLayers
from localv4.model.fast_network import FastNetwork
from localv4.model.matrix import Floats
from localv4.model.program import Program
from localv4.model.state import State
from localv4.model.workspace import AttentionBuffers, ChunkBuffers, Seen, buffer_bytes

FIRST_POSITIONS = 4096
"""Positions that the buffers of attention have room for at first."""


@dataclass(frozen=True, slots=True)
class Segment:
    """Operations of the token's program.

    `lookups` maps those that look up a layer's experts, where the segment can halt, to the layer,
    `glances` those that guess them. `resumes` maps a layer to the operation behind its experts.
    After the segment the experts of layer `stored` are multiplied as they are stored, if it is not
    None.
    """

    program: NDArray[np.int64]
    lookups: dict[int, int]
    glances: dict[int, int]
    resumes: dict[int, int]
    stored: int | None


class TokenPlan:
    """The program for one token; built again when the context outgrows its buffers.

    `looks_ahead`: what the experts of a layer may be is guessed before its attention, and read
    meanwhile: its router is asked for what the streams hold then.
    """

    def __init__(self, network: FastNetwork) -> None:
        self._network = network
        self._chunk = ChunkBuffers(network.config, 1)
        self._hidden = HiddenLayers(network.config, network.most_forms)
        self._guess = ChunkBuffers(network.config, 1)
        self._guess.streams = self._chunk.streams
        self._positions = 0
        self._attention: AttentionBuffers
        self._segments: list[Segment] = []
        self.looks_ahead = False

    @property
    def nbytes(self) -> int:
        """Bytes of the buffers."""
        owners = [self._chunk, self._hidden, self._guess]
        owners += [self._attention] if self._segments else []
        return sum(map(buffer_bytes, owners))

    def run(self, ids: NDArray[np.int64], state: State) -> Floats:
        """Process the one token of `ids`; return its final vector (1, hidden)."""
        if state.position >= self._positions:
            self._positions = max(FIRST_POSITIONS, 2 * (state.position + 1))
            self._build()
        while not self._run_once(ids, state):
            self._build()
        self._network.store.end_token()
        if self._network.on_routes is not None:
            self._network.on_routes(self._routes(), False)
        return self._chunk.x.values[:1].copy()

    def _routes(self) -> NDArray[np.int64]:
        """Return the experts (1, layers, k) that the token has used, as the store was told.

        Layers that are not packed are not known: theirs are the first ones.
        """
        network, k = self._network, self._chunk.chosen.shape[1]
        uses = network.store.uses
        routes = np.tile(np.arange(k), (1, len(network.layers), 1))
        for index, layer in enumerate(network.layers):
            if layer.moe.forms:
                routes[0, index] = np.flatnonzero(uses.last[index] == uses.clock)
        return routes

    def look_ahead(self, wanted: bool) -> None:
        """Guess what the next layer needs, from the next token on, or stop doing so."""
        if wanted != self.looks_ahead and self._segments:
            self.looks_ahead = wanted
            self._build()
        self.looks_ahead = wanted

    def _run_once(self, ids: NDArray[np.int64], state: State) -> bool:
        """Run all segments; return False if the plan is out of date, with nothing lost."""
        network = self._network
        network.begin(self._chunk, ids, state)
        state.make_way(1)
        self._attention.context[0] = state.position
        for layer in network.layers:
            layer.moe.request_known(int(ids[0]))
        for segment in self._segments:
            network.check_cancelled()
            if not self._run_segment(segment):
                return False
            if segment.stored is not None:
                network.mix_stored(segment.stored, self._chunk, 1)
        return True

    def _run_segment(self, segment: Segment) -> bool:
        """Run a segment, seeing to experts where it halts; False if a layer cannot be packed."""
        network, done = self._network, 0
        while True:
            done += network.team.run(segment.program[done:])
            if done == len(segment.program):
                return True
            last = done - 1
            if last in segment.glances:
                network.store.guess(segment.glances[last], self._guess.chosen[0].tolist())
                continue
            layer = segment.lookups[last]
            try:
                self._fetch(layer)
            except UnpackableError:
                network.experts.drop_forms(layer)
                return False
            assert (network.store.addresses[layer, self._chunk.chosen[0]] > 0).all()
            network.team.run(segment.program[last:done])
            if len(network.layers[layer].moe.forms) > 1:
                self._run_late_down(layer)
            done = segment.resumes[layer]

    def _fetch(self, layer: int) -> None:
        """Bring the token's experts of a layer into memory; compute with those that are there.

        Their outputs are added as far as their order allows: up to the first that is not there.
        Experts of several forms have another order: nothing is added of those.
        """
        network, store = self._network, self._network.store
        moe, numbers = network.layers[layer].moe, self._chunk.chosen[0]
        store.request(layer, numbers.tolist())  # before anything else: the disk shall not rest
        store.count_misses(layer, numbers.tolist())
        self._run_shared(layer)
        ready = np.zeros(len(numbers) + 1, bool)
        added = 0
        while not ready[:-1].all():
            records = store.addresses[layer, numbers]
            there = np.flatnonzero((records > 0) & ~ready[:-1]).tolist()
            if not there:
                network.check_cancelled()
                store.wait(layer, numbers.tolist())
                continue
            self._hidden.early[:] = records
            program = network.new_program()
            moe.add_early_gate_up(program, self._chunk, self._hidden, there)
            ready[there] = True
            end = int(ready.argmin())
            if end > added and len(moe.forms) == 1:
                moe.add_early_down(program, self._chunk, self._hidden, range(added, end))
                added = end
            network.run(program)

    def _run_late_down(self, layer: int) -> None:
        program, moe = self._network.new_program(), self._network.layers[layer].moe
        moe.add_late_down(program, self._chunk, self._hidden)
        self._network.run(program)

    def _run_shared(self, layer: int) -> None:
        program, moe = self._network.new_program(), self._network.layers[layer].moe
        moe.add_shared(program, self._chunk, self._hidden.shared, 1)
        self._network.run(program)

    def _build(self) -> None:
        network, chunk = self._network, self._chunk
        seen = Seen.before(self._positions, network.config)
        self._attention = AttentionBuffers(network.config, 1, seen, 1)
        self._segments = []
        program, segment = self._new_segment()
        self._attention.add_angles(program, 1)
        for index, layer in enumerate(network.layers):
            layer.add_mixing(program, chunk, 1)
            if self.looks_ahead and layer.moe.can_guess:
                self._add_glance(program, segment, index)
            layer.add_attention(program, chunk, self._attention, 1)
            layer.add_router(program, chunk, 1)
            if not layer.moe.forms:
                layer.moe.add_shared(program, chunk, self._hidden.shared, 1)
                self._segments.append(replace(segment, program=program.finish(), stored=index))
                program, segment = self._new_segment()
                continue
            self._add_experts(program, segment, index)
        self._add_head(program)
        self._segments.append(replace(segment, program=program.finish()))

    def _new_segment(self) -> tuple[Program, Segment]:
        nothing = np.zeros((0, WORDS), np.int64)
        return self._network.new_program(), Segment(nothing, {}, {}, {}, None)

    def _add_experts(self, program: Program, segment: Segment, index: int) -> None:
        """Add the experts of a layer."""
        network, chunk, hidden = self._network, self._chunk, self._hidden
        moe, halt = network.layers[index].moe, network.team.halt_address
        segment.lookups[len(program)] = index
        moe.add_resolve(program, chunk, hidden, halt)
        moe.add_gate_up(program, chunk, hidden)
        moe.add_down(program, chunk, hidden)
        segment.resumes[index] = len(program)

    def _add_glance(self, program: Program, segment: Segment, index: int) -> None:
        """Choose what a layer would if its attention added nothing; halt if one is absent."""
        layer = self._network.layers[index]
        layer.add_router(program, self._guess, 1, leaves=False)
        layer.moe.add_glance(program, self._guess, self._network.team.halt_address)
        segment.glances[len(program) - 1] = index

    def _add_head(self, program: Program) -> None:
        site = self._network.head_site
        site.add_mixing(program, self._chunk, 1, updates=2, leaves=True)
        site.add_head_entry(program, self._chunk, 1)
