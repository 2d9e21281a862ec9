"""Prefill: many tokens, layer by layer, so that each expert is read once for all of them."""

import numpy as np
from numpy.typing import NDArray

from localv4.model.experts import UnpackableError
from localv4.model.fast_layer import FastLayer
from localv4.model.fast_moe import SHARED_TOKENS, WaveBuffers
from localv4.model.fast_network import FastNetwork
from localv4.model.matrix import Floats
from localv4.model.state import State
from localv4.model.workspace import AttentionBuffers, ChunkBuffers, Seen, buffer_bytes


class ChunkPlan:
    """The programs for a chunk of tokens, of which attention takes `together` at a time."""

    def __init__(self, network: FastNetwork, together: int) -> None:
        self._network, self._together = network, together
        self._chunk: ChunkBuffers | None = None
        self._attention: AttentionBuffers | None = None
        self._waves: WaveBuffers | None = None

    @property
    def nbytes(self) -> int:
        """Bytes of the buffers."""
        owners = (self._chunk, self._attention, self._waves)
        return sum(buffer_bytes(owner) for owner in owners if owner is not None)

    def run(self, ids: NDArray[np.int64], state: State) -> Floats:
        """Process tokens; return their final vectors (tokens, hidden).

        When anything is raised, the state has what it had before.
        """
        put_back = state.hold() if len(ids) > self._together else None
        try:
            return self._run(ids, state)
        except BaseException:
            if put_back is not None:
                put_back()
            raise

    def _run(self, ids: NDArray[np.int64], state: State) -> Floats:
        network, tokens = self._network, len(ids)
        chunk, attention, waves = self._buffers(tokens, state.position + tokens)
        network.begin(chunk, ids, state)
        routes = []
        for index, layer in enumerate(network.layers):
            network.enter_layer(index, chunk, tokens)
            self._attend(layer, chunk, attention, tokens, state.position)
            self._mix(layer, index, chunk, waves, tokens)
            state.settle()
            if network.on_routes is not None:
                routes.append(chunk.chosen[:tokens].astype(np.int16))
        if network.on_routes is not None:
            network.on_routes(np.stack(routes, 1), True)
        program = network.new_program()
        network.head_site.add_mixing(program, chunk, tokens, updates=2, leaves=True)
        network.head_site.add_head_entry(program, chunk, tokens)
        network.run(program)
        network.fetch(chunk.x.values[:tokens])
        return chunk.x.values[:tokens].copy()

    def _buffers(self, tokens: int, end: int) -> tuple[ChunkBuffers, AttentionBuffers, WaveBuffers]:
        """Return buffers for so many tokens, the last of them before position `end`."""
        network, chunk, waves, attention = self._network, self._chunk, self._waves, self._attention
        if chunk is None or waves is None or chunk.tokens < tokens:
            network.disown(chunk, waves)
            chunk = self._chunk = ChunkBuffers(network.config, tokens)
            waves = self._waves = WaveBuffers(network.config, tokens)
            network.adopt(chunk, waves)
        together, seen = min(tokens, self._together), Seen.before(end, network.config)
        if attention is None or attention.tokens < together or not attention.seen.covers(seen):
            members = network.team.members
            seen = Seen.before(2 * end, network.config)
            network.disown(attention)
            attention = AttentionBuffers(network.config, together, seen, members)
            network.adopt(attention)
            self._attention = attention
        return chunk, attention, waves

    def _attend(
        self,
        layer: FastLayer,
        chunk: ChunkBuffers,
        buffers: AttentionBuffers,
        tokens: int,
        position: int,
    ) -> None:
        """Attention of a layer, some tokens after the others: they see what those have stored."""
        layer.moe.request_first(tokens)
        program = self._network.new_program()
        layer.add_mixing(program, chunk, tokens)
        self._network.run(program)
        for first in range(0, tokens, self._together):
            count = min(self._together, tokens - first)
            program = self._network.new_program()
            buffers.context[0] = position + first
            self._network.publish(buffers.context)
            buffers.add_angles(program, count)
            layer.add_attention(program, chunk.part(first), buffers, count)
            self._network.run(program)

    def _mix(
        self,
        layer: FastLayer,
        index: int,
        chunk: ChunkBuffers,
        buffers: WaveBuffers,
        tokens: int,
    ) -> None:
        """Experts of a layer, in waves."""
        network, moe = self._network, layer.moe
        program = network.new_program()
        layer.add_router(program, chunk, tokens)
        moe.add_clearing(program, chunk, tokens)
        network.run(program)
        for first in range(0, tokens, SHARED_TOKENS):
            count = min(SHARED_TOKENS, tokens - first)
            program = network.new_program()
            moe.add_shared(program, chunk.part(first), buffers.shared, count)
            network.publish(buffers.shared.span)
            network.run(program)
        network.fetch(chunk.chosen[:tokens], chunk.shares[:tokens])
        try:
            for wave in moe.waves(chunk, buffers, tokens):
                program = network.new_program()
                network.publish(*wave.arrays)
                moe.add_wave(program, chunk, buffers, wave)
                network.run(program)
        except UnpackableError:
            network.experts.drop_forms(index)
        if not moe.forms:
            network.mix_stored(index, chunk, tokens)
