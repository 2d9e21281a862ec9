"""Decoding: one token through all layers in one program."""

from copy import copy
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

    `looks_ahead`: what the experts of a layer may be is guessed, and read meanwhile. Its router is
    asked for what the streams hold before its attention, and, while the layer before waits for
    experts, for what they would hold without these.
    """

    def __init__(self, network: FastNetwork) -> None:
        self._network = network
        self._chunk = ChunkBuffers(network.config, 1)
        self._hidden = HiddenLayers(network.config, network.most_forms)
        self._guess = ChunkBuffers(network.config, 1)
        self._outlook = copy(self._guess)  # with streams of its own: the others go on
        self._guess.streams = self._chunk.streams
        self._positions = 0
        self._attention: AttentionBuffers
        self._segments: list[Segment] = []
        self._outlooks: dict[int, NDArray[np.int64]] = {}
        self.looks_ahead = False

    @property
    def nbytes(self) -> int:
        """Bytes of the buffers."""
        owners = [self._chunk, self._hidden, self._guess]
        owners += [self._attention] if self._segments else []
        return sum(map(buffer_bytes, owners)) + self._outlook.streams.nbytes

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
        known = {layer.moe.index: layer.moe.known(int(ids[0])) for layer in network.layers}
        network.store.foresee({layer: numbers for layer, numbers in known.items() if numbers})
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
            done += network.run_some(segment.program[done:])
            if done == len(segment.program):
                return True
            last = done - 1
            if last in segment.glances:
                self._read_guess(segment.glances[last])
                continue
            layer = segment.lookups[last]
            try:
                self._fetch(layer)
            except UnpackableError:
                network.experts.drop_forms(layer)
                return False
            assert (network.store.addresses[layer, self._chunk.chosen[0]] > 0).all()
            network.run_some(segment.program[last:done])
            if len(network.layers[layer].moe.forms) > 1:
                self._run_late_down(layer)
            done = segment.resumes[layer]

    def _fetch(self, layer: int) -> None:
        """Bring the token's experts of a layer into memory; compute with those that are there.

        When there is nothing to compute, and the disk would soon rest, the next layer is guessed.
        Outputs are added as far as their order allows: up to the first that is not there. Experts
        of several forms have another order: nothing is added of those.
        """
        network, store = self._network, self._network.store
        moe, numbers = network.layers[layer].moe, self._chunk.chosen[0]
        store.request(layer, numbers.tolist())  # before anything else: the disk shall not rest
        store.count_misses(layer, numbers.tolist())
        self._run_shared(layer)
        ready = np.zeros(len(numbers) + 1, bool)
        added, looked_with = 0, -1
        while not ready[:-1].all():
            records = store.addresses[layer, numbers]
            there = np.flatnonzero((records > 0) & ~ready[:-1]).tolist()
            if not there:
                network.check_cancelled()
                count = int(ready.sum())
                if layer in self._outlooks and looked_with < count and store.may_guess:
                    self._look_further(layer, ready[:-1])
                    looked_with = count
                else:
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

    def _look_further(self, layer: int, ready: NDArray[np.bool_]) -> None:
        """Guess what the next layer needs from the outputs of those experts that are `ready`."""
        network, hidden = self._network, self._hidden
        numbers = self._chunk.chosen[0]
        forms = np.arange(len(hidden.records))[:, None]
        is_there = (network.experts.form_numbers[layer, numbers] == forms) & ready
        hidden.records[:] = np.where(is_there, network.store.addresses[layer, numbers], 0)
        self._outlook.streams[:] = self._chunk.streams
        network.team.run(self._outlooks[layer])
        self._read_guess(layer + 1)

    def _read_guess(self, layer: int) -> None:
        """Have that read which the buffers of guesses say of a layer."""
        numbers = self._network.layers[layer].moe.likeliest_first(self._guess)
        self._network.store.guess(layer, numbers)

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
        ahead = range(1, len(network.layers)) if self.looks_ahead else ()
        self._outlooks = {
            index - 1: self._build_outlook(index)
            for index in ahead
            if network.layers[index].moe.can_guess and network.layers[index - 1].moe.forms
        }

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

    def _build_outlook(self, index: int) -> NDArray[np.int64]:
        """Choose what a layer would without its attention and what has not come for the one before.

        `add_late_down` leaves out experts that have no address in `hidden.records`.
        """
        network, chunk, outlook = self._network, self._chunk, self._outlook
        before, layer = network.layers[index - 1], network.layers[index]
        leaving = copy(outlook)  # of the token: what of the layer before is not its experts' sum
        leaving.mix, leaving.shares = chunk.mix, chunk.shares
        leaving.shared_update = chunk.shared_update
        program = network.new_program()
        before.moe.add_late_down(program, leaving, self._hidden)
        layer.ffn_site.add_mixing(program, leaving, 1, updates=2, leaves=True)
        layer.ffn_site.add_entry(program, outlook, 1, binary=layer.moe.has_binary_inputs)
        layer.moe.add_router(program, outlook, 1)
        return program.finish()

    def _add_head(self, program: Program) -> None:
        site = self._network.head_site
        site.add_mixing(program, self._chunk, 1, updates=2, leaves=True)
        site.add_head_entry(program, self._chunk, 1)
