"""Decoding of several sequences together on a GPU."""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from localv4.cuda.gpu import Recording
from localv4.cuda.network import GpuNetwork
from localv4.cuda.vram_store import VramStore
from localv4.model.fast_attention import Cells, Part
from localv4.model.fast_moe import WaveBuffers
from localv4.model.fast_rows import RowsPlan, RowsProgram, Segment
from localv4.model.matrix import Floats
from localv4.model.state import State


class GpuRowsPlan(RowsPlan):
    """The recordings for one token of each of several sequences, by the number of these."""

    def __init__(self, network: GpuNetwork, store: VramStore) -> None:
        super().__init__(network)
        self._gpu_network, self._store = network, store

    def _new_program(self, rows: int, positions: int) -> RowsProgram:
        return GpuRowsProgram(self._gpu_network, self._store, rows, positions)


class GpuRowsProgram(RowsProgram):
    """The recordings for some number of rows.

    While all experts are on the GPU it is one. Otherwise each layer has one up to its experts,
    which are brought there in waves.
    """

    def __init__(self, network: GpuNetwork, store: VramStore, rows: int, positions: int) -> None:
        self._gpu_network, self._store = network, store
        self._recordings: list[Recording] = []
        self._wave_buffers = WaveBuffers(network.config, rows)
        super().__init__(network, rows, positions)

    def vectors(self) -> Floats:
        """Return the final vectors (rows, hidden) of the last run."""
        self._gpu_network.fetch(self._chunk.x.values[: self._rows])
        return super().vectors()

    def run(self, ids: NDArray[np.int64], states: Sequence[State]) -> bool:
        """Process the tokens."""
        network, store = self._gpu_network, self._store
        if store.is_whole != self._whole:
            return False
        network.begin_rows(self._chunk, ids, states, self._cells)
        self._attention.context[:] = [state.position for state in states]
        network.publish(self._attention.context)
        for layer, recording in enumerate(self._recordings):
            network.check_cancelled()
            recording.replay()
            if not self._whole and layer < network.config.n_layers:
                self._mix(layer)
        store.end_token()
        return True

    def _mix(self, layer: int) -> None:
        """Bring the experts of a layer to the GPU in waves, and compute with them."""
        network, chunk = self._gpu_network, self._chunk
        network.fetch(chunk.chosen, chunk.shares)
        moe = network.layers[layer].moe
        for wave in moe.waves(chunk, self._wave_buffers, self._rows):
            program = network.new_program()
            network.publish(*wave.arrays)
            moe.add_wave(program, chunk, self._wave_buffers, wave)
            network.run(program)

    def _build(self) -> list[Segment]:
        network, chunk, rows = self._gpu_network, self._chunk, self._rows
        self._whole = self._store.is_whole
        network.adopt(chunk, self._groups, self._attention, self._cells, self._wave_buffers)
        self._groups.shared.span[1] = rows
        network.publish(self._groups.shared.span)
        parts = [self._attention.row(index) for index in range(rows)]
        program = network.new_program()
        with program.alongside():
            for part in parts:
                part.add_angles(program, 1)
        for index, layer in enumerate(network.layers):
            sequences = [
                Part(part, Cells.of(cells[index]), 1)
                for part, cells in zip(parts, self._cells, strict=True)
            ]
            layer.add_mixing(program, chunk, rows)
            layer.add_attention(program, chunk, self._attention, rows, sequences)
            layer.add_router(program, chunk, rows)
            layer.moe.add_shared(program, chunk, self._groups.shared, rows)
            if self._whole:
                layer.moe.add_groups(program, chunk, self._groups, 0)
                continue
            layer.moe.add_clearing(program, chunk, rows)
            self._recordings.append(network.record(program))
            program = network.new_program()
        site = network.head_site
        site.add_mixing(program, chunk, rows, updates=2, leaves=True)
        site.add_head_entry(program, chunk, rows)
        self._recordings.append(network.record(program))
        return []
