"""The layers behind those of the GPU, for one token: the host computes them."""

import time

import numpy as np
from numpy.typing import NDArray

from localv4.cuda.network import GpuNetwork
from localv4.model.fast_moe import HiddenLayers
from localv4.model.program import Program
from localv4.model.workspace import AttentionBuffers, ChunkBuffers


class HostLayers:
    """Programs of the host's team on the buffers of a token, which the GPU's layers have left."""

    def __init__(
        self, network: GpuNetwork, chunk: ChunkBuffers, attention: AttentionBuffers
    ) -> None:
        self._network, self._chunk = network, chunk
        self._hidden = HiddenLayers(network.config, network.most_forms)
        self._programs: list[tuple[NDArray[np.int64], NDArray[np.int64]]] = []
        program = Program(network.scratch)
        attention.add_angles(program, 1)
        for layer in network.layers[network.on_gpu :]:
            layer.add_mixing(program, chunk, 1)
            layer.add_attention(program, chunk, attention, 1)
            layer.add_router(program, chunk, 1)
            experts = Program(network.scratch)
            if layer.moe.forms:
                layer.moe.add_resolve(experts, chunk, self._hidden, network.team.halt_address)
                layer.moe.add_gate_up(experts, chunk, self._hidden)
                layer.moe.add_down(experts, chunk, self._hidden)
            else:
                layer.moe.add_shared(experts, chunk, self._hidden.shared, 1)
            self._programs.append((program.finish(), experts.finish()))
            program = Program(network.scratch)
        network.head_site.add_mixing(program, chunk, 1, updates=2, leaves=True)
        network.head_site.add_head_entry(program, chunk, 1)
        self._head = program.finish()

    def run(self) -> None:
        """Run all layers and the collapse of the streams."""
        network = self._network
        start = time.perf_counter()
        for layer, (before, experts) in enumerate(self._programs, start=network.on_gpu):
            network.check_cancelled()
            network.team.run(before)
            if network.layers[layer].moe.forms:
                self._bring(layer)
            network.team.run(experts)
            if not network.layers[layer].moe.forms:
                network.mix_stored(layer, self._chunk, 1)
        network.team.run(self._head)
        network.store.counts.host_s += time.perf_counter() - start

    def _bring(self, layer: int) -> None:
        """Bring the token's experts of a layer into memory."""
        network, store = self._network, self._network.store.host
        wanted = self._chunk.chosen[0].tolist()
        store.count_misses(layer, wanted)
        store.request(layer, wanted)
        while (store.addresses[layer, wanted] <= 0).any():
            network.check_cancelled()
            store.wait(layer, wanted)
