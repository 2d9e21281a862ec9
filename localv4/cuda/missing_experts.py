"""Experts of a token that are not on the GPU: the host computes them where they lie.

Both devices get the same bits for an expert (`cuda.twin`), so nobody can tell who it was.
"""

import time
from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from localv4.cuda.network import GpuNetwork
from localv4.kernels.formats import OPERATIONS
from localv4.kernels.packed import GROUP_ROWS
from localv4.model.fast_moe import HiddenLayers
from localv4.model.matrix import F32
from localv4.model.program import Program, Rows
from localv4.model.workspace import ChunkBuffers


class MissingExperts:
    """What the host computes for one token, layer by layer.

    `parts` (k, hidden) f32 are the outputs of the experts, not weighted yet: those of the host are
    copied into the twin on the GPU, where the other rows are the GPU's. `turns` (k,) i64 is 1 + the
    form of each expert: they are added form by form.
    """

    def __init__(self, network: GpuNetwork) -> None:
        config = network.config
        k, hidden = config.experts_per_token, config.hidden_size
        self._network, self._store = network, network.store
        self._chunk = ChunkBuffers(config, 1)
        self._hidden = HiddenLayers(config, network.most_forms)
        self._one = np.ones(1, F32)
        self._result = Rows(k, hidden)
        self.parts = np.zeros((k, hidden), F32)
        self.turns = np.ones(k, np.int64)
        self._answer: Callable[[], None] | None = None
        network.adopt(self.parts, self.turns)

    def ask(self, chosen: NDArray[np.int64], x: Rows) -> None:
        """Ask the GPU which experts (1, k) it has chosen, for which input (1, hidden)."""
        mirrors = self._network.mirrors
        own = self._chunk
        self._answer = mirrors.ask([(own.chosen[:1], chosen), (own.x.values[:1], x.values[:1])])

    def compute(self, layer: int) -> None:
        """Wait for the answer; compute with the experts that the GPU lacks."""
        assert self._answer is not None
        self._answer()
        numbers = self._chunk.chosen[0]
        if self._network.most_forms > 1:
            self.turns[:] = 1 + self._network.experts.form_numbers[layer, numbers]
            self._network.publish(self.turns)
        missing = np.flatnonzero(self._store.addresses[layer, numbers] <= 0).tolist()
        if not missing:
            return
        start = time.perf_counter()
        self._store.count_misses(layer, numbers.tolist())
        self._compute_all(layer, missing)
        self._store.counts.host_s += time.perf_counter() - start

    def _compute_all(self, layer: int, missing: list[int]) -> None:
        """Compute with experts at some places, first those that are in the host's memory."""
        network, host, numbers = self._network, self._store.host, self._chunk.chosen[0]
        program = Program(network.scratch)
        binary = network.layers[layer].moe.has_binary_inputs
        program.round(self._chunk.x_rounded, self._chunk.x, 1, binary=binary)
        network.team.run(program.finish())
        wanted = numbers[missing].tolist()
        host.count_misses(layer, wanted)
        host.request(layer, wanted)
        while missing:
            there = [place for place in missing if host.addresses[layer, numbers[place]] > 0]
            if there:
                self._compute(layer, there)
                missing = [place for place in missing if place not in there]
            else:
                network.check_cancelled()
                host.wait(layer, wanted)

    def _compute(self, layer: int, places: list[int]) -> None:
        """Compute the outputs of experts that are in the host's memory, and send them."""
        network, numbers, hidden = self._network, self._chunk.chosen[0], self._hidden
        moe = network.layers[layer].moe
        hidden.early[:] = self._store.host.addresses[layer, numbers]
        program = Program(network.scratch)
        moe.add_early_gate_up(program, self._chunk, hidden, places)
        with program.alongside():
            for place in places:
                form = network.experts.form(layer, int(numbers[place]))
                program.add(
                    OPERATIONS[form.down.name].down,
                    *(hidden.early[place:].ctypes.data, 1, form.hidden // GROUP_ROWS, form.inner),
                    *hidden.rounded.part(place).addresses,
                    *(self._result.part(place).at(), self._one.ctypes.data, form.offset, 0),
                )
        network.team.run(program.finish())
        for place in places:
            self.parts[place] = self._result.values[place]
            network.publish(self.parts[place])
