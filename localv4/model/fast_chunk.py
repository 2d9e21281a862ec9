"""Prefill: many tokens, layer by layer, so that each expert is read once for all of them.

They may be those of several sequences, one after the other: only attention keeps these apart.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from localv4.model.experts import UnpackableError
from localv4.model.fast_attention import Cells, Part
from localv4.model.fast_layer import FastLayer
from localv4.model.fast_moe import SHARED_TOKENS, WaveBuffers
from localv4.model.fast_network import FastNetwork
from localv4.model.matrix import Floats
from localv4.model.state import CELLS, State
from localv4.model.workspace import AttentionBuffers, ChunkBuffers, Seen, buffer_bytes


@dataclass(frozen=True, slots=True)
class Piece:
    """Some tokens of a sequence that attention takes together with those of others.

    They begin at `position` of the sequence, and at token `first` of those taken together.
    """

    sequence: int
    position: int
    first: int
    tokens: int


class ChunkPlan:
    """The programs for a chunk of tokens, of which attention takes `together` at a time."""

    def __init__(self, network: FastNetwork, together: int) -> None:
        self._network, self._together = network, together
        self._chunk: ChunkBuffers | None = None
        self._attention: AttentionBuffers | None = None
        self._waves: WaveBuffers | None = None
        self._cells = np.zeros((0, network.config.n_layers, CELLS), np.int64)

    @property
    def nbytes(self) -> int:
        """Bytes of the buffers."""
        owners = (self._chunk, self._attention, self._waves)
        return sum(buffer_bytes(owner) for owner in owners if owner is not None)

    def run(
        self,
        ids: NDArray[np.int64],
        states: Sequence[State],
        counts: Sequence[int],
        wanted: int | None = None,
    ) -> Floats:
        """Process `counts` tokens of each sequence; return their final vectors (tokens, hidden).

        Only those of the last `wanted` tokens, if given. When anything is raised, the states have
        what they had before.
        """
        sizes = zip(states, counts, strict=True)
        held = [state.hold() for state, count in sizes if count > self._together]
        try:
            return self._run(ids, states, counts, len(ids) if wanted is None else wanted)
        except BaseException:
            for put_back in held:
                put_back()
            raise

    def _run(
        self,
        ids: NDArray[np.int64],
        states: Sequence[State],
        counts: Sequence[int],
        wanted: int,
    ) -> Floats:
        network, tokens = self._network, len(ids)
        starts = [state.position for state in states]
        end = max(start + count for start, count in zip(starts, counts, strict=True))
        chunk, attention, waves = self._buffers(tokens, end)
        sequences = [[layer.cells for layer in network.layers]]
        if len(states) == 1:
            network.begin(chunk, ids, states[0])
        else:
            cells = self._cells_for(len(states))
            network.begin_many(chunk, ids, states, counts, cells)
            sequences = [[Cells.of(layer) for layer in own] for own in cells]
        passes = list(_passes(starts, counts, self._most_together(states)))
        routes = []
        for index, layer in enumerate(network.layers):
            network.enter_layer(index, chunk, tokens)
            self._enter(layer, chunk, tokens)
            for first, pieces in passes:
                reads = (states[piece.sequence].reads(piece.tokens, index) for piece in pieces)
                states[0].memory.make_way(sum(reads))
                cells_of = [sequences[piece.sequence][index] for piece in pieces]
                self._attend(layer, chunk.part(first), attention, pieces, cells_of)
                for piece in pieces:
                    _tell(states[piece.sequence], index, piece)
            self._mix(layer, index, chunk, waves, tokens)
            if network.on_routes is not None:
                routes.append(chunk.chosen[:tokens].astype(np.int16))
        if network.on_routes is not None:
            network.on_routes(np.stack(routes, 1), True)
        return self._finish(chunk, tokens, min(wanted, tokens))

    def _finish(self, chunk: ChunkBuffers, tokens: int, wanted: int) -> Floats:
        """Return the final vectors of the last `wanted` tokens."""
        network, last = self._network, chunk.part(tokens - wanted)
        program = network.new_program()
        network.head_site.add_mixing(program, last, wanted, updates=2, leaves=True)
        network.head_site.add_head_entry(program, last, wanted)
        network.run(program)
        network.fetch(last.x.values[:wanted])
        return last.x.values[:wanted].copy()

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
            members = network.workers
            seen = Seen.before(2 * end, network.config)
            network.disown(attention)
            attention = AttentionBuffers(network.config, together, seen, members)
            network.adopt(attention)
            self._attention = attention
        return chunk, attention, waves

    def _cells_for(self, sequences: int) -> NDArray[np.int64]:
        """Return cells (sequences, layers, CELLS)."""
        if len(self._cells) < sequences:
            self._network.disown(self._cells)
            self._cells = np.zeros((sequences, *self._cells.shape[1:]), np.int64)
            self._network.adopt(self._cells)
        return self._cells[:sequences]

    def _most_together(self, states: Sequence[State]) -> int:
        """Return how many tokens attention takes at a time, so that what they read has room."""
        tokens, room = self._together, states[0].memory.room
        layers = range(self._network.config.n_layers)
        while room is not None and tokens > 1:
            if max(sum(state.reads(tokens, layer) for state in states) for layer in layers) <= room:
                break
            tokens //= 2
        return tokens

    def _enter(self, layer: FastLayer, chunk: ChunkBuffers, tokens: int) -> None:
        """Begin a layer with all tokens."""
        layer.moe.request_first(tokens)
        program = self._network.new_program()
        layer.add_mixing(program, chunk, tokens)
        self._network.run(program)

    def _attend(
        self,
        layer: FastLayer,
        chunk: ChunkBuffers,
        buffers: AttentionBuffers,
        pieces: Sequence[Piece],
        cells: Sequence[Cells],
    ) -> None:
        """Attention of some tokens in a layer: they see what those before have stored."""
        program, count = self._network.new_program(), sum(piece.tokens for piece in pieces)
        buffers.context[: len(pieces)] = [piece.position for piece in pieces]
        self._network.publish(buffers.context)
        parts = [
            Part(buffers.part(place, piece.first), own, piece.tokens, by_token=count > 1)
            for place, (piece, own) in enumerate(zip(pieces, cells, strict=True))
        ]
        with program.alongside():
            for part in parts:
                part.buffers.add_angles(program, part.tokens)
        layer.add_attention(program, chunk, buffers, count, parts)
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
        wait = network.ask(chunk.chosen[:tokens], chunk.shares[:tokens])
        for first in range(0, tokens, SHARED_TOKENS):
            count = min(SHARED_TOKENS, tokens - first)
            program = network.new_program()
            moe.add_shared(program, chunk.part(first), buffers.shared, count)
            network.publish(buffers.shared.span)
            network.run(program)
        wait()  # a GPU computes the shared expert meanwhile
        try:
            network.mix_packed(moe, chunk, buffers, tokens)
        except UnpackableError:
            network.experts.drop_forms(index)
        if not moe.forms:
            network.mix_stored(index, chunk, tokens)


def _tell(state: State, layer: int, piece: Piece) -> None:
    """Tell whoever listens that some tokens have passed a layer; a GPU keeps its rings."""
    if state.passer is not None and state.device is None:
        state.passer.note(state.layers[layer], piece.position, piece.position + piece.tokens)


def _passes(
    starts: Sequence[int], counts: Sequence[int], together: int
) -> Iterator[tuple[int, list[Piece]]]:
    """Cut `counts` tokens of each sequence, from positions `starts` on, into passes.

    Each is `together` tokens, but for the last one. Yields them with the numbers of their first
    tokens.
    """
    pieces: list[Piece] = []
    first = taken = 0
    for sequence, (start, count) in enumerate(zip(starts, counts, strict=True)):
        done = 0
        while done < count:
            tokens = min(count - done, together - taken)
            pieces.append(Piece(sequence, start + done, taken, tokens))
            done, taken = done + tokens, taken + tokens
            if taken == together:
                yield first, pieces
                first, pieces, taken = first + together, [], 0
    if pieces:
        yield first, pieces
