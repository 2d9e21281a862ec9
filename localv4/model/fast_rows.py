"""Decoding of several sequences together: one token of each through all layers in one program.

Dense weights are read once for all of them, and each expert once for all that have chosen it. The
states stay apart. A token has the same bits as alone.
"""

from collections.abc import Sequence
from copy import copy

import numpy as np
from numpy.typing import NDArray

from localv4.model.experts import UnpackableError
from localv4.model.fast_attention import Cells, Part
from localv4.model.fast_moe import ExpertGroups, WaveBuffers
from localv4.model.fast_network import FastNetwork
from localv4.model.fast_token import FIRST_POSITIONS
from localv4.model.fast_token import Segment as Segment
from localv4.model.matrix import Floats
from localv4.model.program import Program
from localv4.model.state import CELLS, State
from localv4.model.workspace import AttentionBuffers, ChunkBuffers, Seen, buffer_bytes

MOST_ROWS = 64
"""Sequences that are decoded together."""

KEPT_PROGRAMS = 4
"""Numbers of rows whose programs are kept: rows come and go one by one."""


class RowsPlan:
    """The programs for one token of each of several sequences, by the number of these."""

    def __init__(self, network: FastNetwork) -> None:
        self._network = network
        self._positions = 0
        self._programs: dict[int, RowsProgram] = {}

    @property
    def nbytes(self) -> int:
        """Bytes of the buffers."""
        return sum(program.nbytes for program in self._programs.values())

    def run(self, ids: NDArray[np.int64], states: Sequence[State]) -> Floats:
        """Process one token (rows,) of each sequence; return their final vectors (rows, hidden)."""
        furthest = max(state.position for state in states)
        if furthest >= self._positions:
            self._positions = max(FIRST_POSITIONS, 2 * (furthest + 1))
            self._programs.clear()
        rows = len(ids)
        while True:
            program = self._programs.pop(rows, None)
            if program is None:
                program = self._new_program(rows, self._positions)
            self._programs[rows] = program  # the latest comes last
            while len(self._programs) > KEPT_PROGRAMS:
                del self._programs[next(iter(self._programs))]
            if program.run(ids, states):
                return program.vectors()
            self._programs.clear()  # a layer has lost its packed form

    def _new_program(self, rows: int, positions: int) -> "RowsProgram":
        return RowsProgram(self._network, rows, positions)


class RowsProgram:
    """The program for some number of rows, whose positions are below a bound."""

    def __init__(self, network: FastNetwork, rows: int, positions: int) -> None:
        config = network.config
        self._network, self._rows = network, rows
        self._chunk = ChunkBuffers(config, rows)
        self._chosen = np.zeros((config.n_layers, *self._chunk.chosen.shape), np.int64)
        self._groups = ExpertGroups(config, rows, network.most_forms)
        self._attention = AttentionBuffers(config, rows, Seen.before(positions, config), rows)
        self._parts = [self._attention.row(index) for index in range(rows)]
        self._waves: WaveBuffers | None = None
        self._cells = np.zeros((rows, config.n_layers, CELLS), np.int64)
        self._segments = self._build()

    @property
    def nbytes(self) -> int:
        """Bytes of the buffers."""
        return sum(map(buffer_bytes, (self._chunk, self._groups, self._attention)))

    def vectors(self) -> Floats:
        """Return the final vectors (rows, hidden) of the last run."""
        return self._chunk.x.values[: self._rows].copy()

    def run(self, ids: NDArray[np.int64], states: Sequence[State]) -> bool:
        """Process the tokens; return False, with nothing lost, if the program is out of date."""
        network = self._network
        network.begin_rows(self._chunk, ids, states, self._cells)
        states[0].memory.make_way(sum(state.reads(1) for state in states))
        self._attention.context[:] = [state.position for state in states]
        for segment in self._segments:
            network.check_cancelled()
            if not self._run_segment(segment):
                return False
            if segment.stored is not None:
                network.mix_stored(segment.stored, self._chunk_of(segment.stored), self._rows)
        network.store.end_token()
        self._note()
        return True

    def _note(self) -> None:
        """Tell whoever listens what the rows have chosen."""
        if self._network.on_routes is not None:
            self._network.on_routes(self._chosen.swapaxes(0, 1), False)

    def _chunk_of(self, layer: int) -> ChunkBuffers:
        """Return the buffers with a place of its own for what a layer chooses."""
        chunk = copy(self._chunk)
        chunk.chosen = self._chosen[layer]
        return chunk

    def _run_segment(self, segment: Segment) -> bool:
        """Run a segment, fetching experts where it halts; False if a layer cannot be packed."""
        network, done = self._network, 0
        while True:
            done += network.run_some(segment.program[done:])
            if done == len(segment.program):
                return True
            layer = segment.lookups[done - 1]
            numbers = np.unique(self._chosen[layer]).tolist()
            try:
                if network.store.can_hold(layer, numbers):
                    self._fetch(layer, numbers)
                    done -= 1
                else:
                    self._mix_in_waves(layer)
                    done = segment.resumes[layer]
            except UnpackableError:
                network.experts.drop_forms(layer)
                return False

    def _fetch(self, layer: int, numbers: list[int]) -> None:
        """Bring the experts that the rows have chosen into memory."""
        store = self._network.store
        store.count_misses(layer, self._chosen[layer].ravel().tolist())
        store.request(layer, numbers)
        while (store.addresses[layer, numbers] <= 0).any():
            self._network.check_cancelled()
            store.wait(layer, numbers)

    def _mix_in_waves(self, layer: int) -> None:
        """Compute `update` with as many experts at a time as there is room for."""
        network, chunk = self._network, self._chunk_of(layer)
        if self._waves is None:
            self._waves = WaveBuffers(network.config, self._rows)
        chunk.update.values[: self._rows] = 0
        network.mix_packed(network.layers[layer].moe, chunk, self._waves, self._rows)

    def _build(self) -> list[Segment]:
        network = self._network
        segments: list[Segment] = []
        program, lookups, resumes = network.new_program(), dict[int, int](), dict[int, int]()
        self._add_angles(program)
        for index, layer in enumerate(network.layers):
            self._add_layer(program, index)
            if not layer.moe.forms:
                segments.append(Segment(program.finish(), lookups, {}, resumes, index))
                program, lookups, resumes = network.new_program(), {}, {}
                continue
            lookups[len(program)] = index
            chunk = self._chunk_of(index)
            layer.moe.add_groups(program, chunk, self._groups, network.team.halt_address)
            resumes[index] = len(program)
        self._add_head(program)
        segments.append(Segment(program.finish(), lookups, {}, resumes, None))
        return segments

    def _add_angles(self, program: Program) -> None:
        with program.alongside():
            for part in self._parts:
                part.add_angles(program, 1)

    def _add_layer(self, program: Program, index: int) -> None:
        """Add a layer up to its routed experts."""
        layer, chunk, rows = self._network.layers[index], self._chunk_of(index), self._rows
        sequences = [
            Part(part, Cells.of(cells[index]), 1, by_token=False)
            for part, cells in zip(self._parts, self._cells, strict=True)
        ]
        layer.add_mixing(program, chunk, rows)
        layer.add_attention(program, chunk, self._attention, rows, sequences)
        layer.add_router(program, chunk, rows)
        layer.moe.add_shared(program, chunk, self._groups.shared, rows)

    def _add_head(self, program: Program) -> None:
        site = self._network.head_site
        site.add_mixing(program, self._chunk, self._rows, updates=2, leaves=True)
        site.add_head_entry(program, self._chunk, self._rows)
