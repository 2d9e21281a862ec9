"""Decoding: one token through all layers in one program."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

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

    `resolving` maps those that look up a layer's experts to the layer: there a segment can halt.
    After it the experts of layer `stored` are multiplied as they are stored, if it is not None.
    """

    program: NDArray[np.int64]
    resolving: dict[int, int]
    stored: int | None


class TokenPlan:
    """The program for one token; built again when the context outgrows its buffers."""

    def __init__(self, network: FastNetwork) -> None:
        self._network = network
        self._chunk = ChunkBuffers(network.config, 1)
        self._hidden = HiddenLayers(network.config)
        self._positions = 0
        self._attention: AttentionBuffers
        self._segments: list[Segment] = []

    @property
    def nbytes(self) -> int:
        """Bytes of the buffers."""
        owners = [self._chunk, self._hidden, *([self._attention] if self._segments else [])]
        return sum(map(buffer_bytes, owners))

    def run(self, ids: NDArray[np.int64], state: State) -> Floats:
        """Process the one token of `ids`; return its final vector (1, hidden)."""
        if state.position >= self._positions:
            self._positions = max(FIRST_POSITIONS, 2 * (state.position + 1))
            self._build()
        while not self._run_once(ids, state):
            self._build()
        return self._chunk.x.values[:1].copy()

    def _run_once(self, ids: NDArray[np.int64], state: State) -> bool:
        """Run all segments; return False if the plan is out of date, with nothing lost."""
        network = self._network
        network.begin(self._chunk, ids, state)
        self._attention.context[0] = state.position
        for segment in self._segments:
            network.check_cancelled()
            if not self._run_segment(segment):
                return False
            if segment.stored is not None:
                network.mix_stored(segment.stored, self._chunk, 1)
        return True

    def _run_segment(self, segment: Segment) -> bool:
        """Run a segment, fetching experts where it halts; False if a layer's cannot be packed."""
        network, done = self._network, 0
        while True:
            done += network.team.run(segment.program[done:])
            if done == len(segment.program):
                return True
            layer = segment.resolving[done - 1]
            if not network.store.ensure(layer, self._chunk.chosen[0].tolist()):
                return False
            done -= 1

    def _build(self) -> None:
        network, chunk = self._network, self._chunk
        seen = Seen.before(self._positions, network.config)
        self._attention = AttentionBuffers(network.config, 1, seen, 1)
        self._segments = []
        program, resolving = network.new_program(), dict[int, int]()
        self._attention.add_angles(program, 1)
        for index, layer in enumerate(network.layers):
            layer.add_mixing(program, chunk, 1)
            layer.add_attention(program, chunk, self._attention, 1)
            layer.add_router(program, chunk, 1)
            if layer.moe.form is None:
                layer.moe.add_shared(program, chunk, self._hidden.shared, 1)
                self._segments.append(Segment(program.finish(), resolving, index))
                program, resolving = network.new_program(), {}
                continue
            resolving[len(program)] = index
            layer.moe.add_resolve(program, chunk, self._hidden, network.team.halt_address)
            layer.moe.add_experts(program, chunk, self._hidden)
        self._add_head(program)
        self._segments.append(Segment(program.finish(), resolving, None))

    def _add_head(self, program: Program) -> None:
        site = self._network.head_site
        site.add_mixing(program, self._chunk, 1, updates=2, leaves=True)
        site.add_head_entry(program, self._chunk, 1)
