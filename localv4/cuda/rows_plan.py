"""Decoding of several sequences together on a GPU."""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from localv4.cuda.gpu import Recording
from localv4.cuda.network import GpuNetwork
from localv4.cuda.program import GpuProgram
from localv4.model.fast_moe import WaveBuffers
from localv4.model.fast_rows import RowsPlan, RowsProgram, Segment
from localv4.model.matrix import Floats
from localv4.model.state import State


class GpuRowsPlan(RowsPlan):
    """The recordings for one token of each of several sequences, by the number of these."""

    def __init__(self, network: GpuNetwork) -> None:
        super().__init__(network)
        self._on_gpu = network

    def _new_program(self, rows: int, positions: int) -> RowsProgram:
        return GpuRowsProgram(self._on_gpu, rows, positions)


class GpuRowsProgram(RowsProgram):
    """The recordings for some number of rows.

    While all experts are on the GPU it is one. Otherwise each layer has one up to its experts,
    which are brought there in waves. Layers of the host are built as programs for each token.
    """

    def __init__(self, network: GpuNetwork, rows: int, positions: int) -> None:
        self._on_gpu, self._store = network, network.store
        self._recordings: list[Recording] = []
        self._has_all = network.has_all_experts
        self._wave_buffers = WaveBuffers(network.config, rows)
        super().__init__(network, rows, positions)

    def vectors(self) -> Floats:
        """Return the final vectors (rows, hidden) of the last run."""
        self._on_gpu.fetch(self._chunk.x.values[: self._rows])
        return super().vectors()

    def run(self, ids: NDArray[np.int64], states: Sequence[State]) -> bool:
        """Process the tokens; return False, with nothing lost, if the program is out of date."""
        network, store, chunk = self._on_gpu, self._store, self._chunk
        if network.has_all_experts != self._has_all:
            return False
        network.begin_rows(chunk, ids, states, self._cells)
        self._attention.context[:] = [state.position for state in states]
        network.publish(self._attention.context)
        for layer, recording in enumerate(self._recordings):
            network.check_cancelled()
            recording.replay()
            if not self._has_all and layer < network.on_gpu:
                self._mix(layer)
        if not network.is_whole:
            network.enter_layer(network.on_gpu, chunk, self._rows)
            self._run_host()
        store.end_token()
        self._note()
        return True

    def _note(self) -> None:
        network = self._on_gpu
        if network.on_routes is not None:
            network.pull(self._chosen[: network.on_gpu])
        super()._note()

    def _run_host(self) -> None:
        """Compute the layers behind those of the GPU."""
        network = self._on_gpu
        program = network.new_program()
        self._add_angles(program)
        for index in range(network.on_gpu, network.config.n_layers):
            self._add_layer(program, index)
            chunk = self._chunk_of(index)
            network.layers[index].moe.add_clearing(program, chunk, self._rows)
            network.run(program)
            self._mix(index)
            program = network.new_program()
        self._add_head(program)
        network.run(program)

    def _mix(self, layer: int) -> None:
        """Compute with the experts of a layer."""
        network, chunk = self._on_gpu, self._chunk_of(layer)
        network.fetch(chunk.chosen, chunk.shares)
        moe = network.layers[layer].moe
        network.mix_packed(moe, chunk, self._wave_buffers, self._rows)
        if not moe.forms:
            network.mix_stored(layer, chunk, self._rows)
            self._store.count_misses(layer, np.unique(chunk.chosen).tolist())

    def _build(self) -> list[Segment]:
        network, rows = self._on_gpu, self._rows
        network.adopt(self._chunk, self._chosen, self._groups, self._attention, self._cells)
        network.adopt(self._wave_buffers)
        self._groups.shared.span[1] = rows
        network.mirrors.push(self._groups.shared.span, self._store.addresses)
        program = GpuProgram(network.scratch)
        self._add_angles(program)
        for index, layer in enumerate(network.layers[: network.on_gpu]):
            self._add_layer(program, index)
            if self._has_all:
                layer.moe.add_groups(program, self._chunk_of(index), self._groups, 0)
                continue
            layer.moe.add_clearing(program, self._chunk, rows)
            self._recordings.append(network.record(program))
            program = GpuProgram(network.scratch)
        if network.is_whole:
            self._add_head(program)
        self._recordings.append(network.record(program))
        return []
