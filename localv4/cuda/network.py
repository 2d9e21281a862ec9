"""The layers of a network whose programs run on a GPU."""

from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray

from localv4.cuda.gpu import Gpu, OnCompile, Recording, Step, sources_of
from localv4.cuda.mirrors import Mirrors, arrays_of
from localv4.cuda.program import GpuProgram, Translator
from localv4.cuda.prompt_experts import PromptExperts
from localv4.cuda.state_copy import StateCopy
from localv4.cuda.twins.rows import SPREAD
from localv4.cuda.vram_store import VramStore
from localv4.kernels.row_operations import RowFormat
from localv4.kernels.team import Team
from localv4.model.config import ModelConfig
from localv4.model.experts import Experts
from localv4.model.fast_layer import FastLayer
from localv4.model.fast_moe import FastMoe, WaveBuffers
from localv4.model.fast_network import FastNetwork
from localv4.model.program import Program
from localv4.model.state import State
from localv4.model.weights import Weights
from localv4.model.workspace import ChunkBuffers
from localv4.paging.paged_store import PagedStore
from localv4.paging.store import ExpertStore, MappedStore

STORES = (MappedStore, PagedStore)

MakeStore = Callable[[Experts, range], VramStore]
"""Makes the store of the records of some layers on the GPU, whose addresses are the GPU's."""


class GpuNetwork(FastNetwork):
    """A network whose first `on_gpu` layers are in the memory of a GPU with their dense weights.

    `team` are the threads of the host, which compute the layers behind those, and experts without a
    packed form. Raises GpuError when the GPU fails, GpuMemoryError when it has too little memory.
    """

    store: VramStore

    def __init__(
        self,
        config: ModelConfig,
        weights: Weights,
        team: Team,
        slack: int,
        make_store: MakeStore,
        rows: RowFormat,
        gpu: Gpu,
        on_gpu: int,
    ) -> None:
        self.gpu, self.on_gpu = gpu, on_gpu
        self.mirrors = Mirrors(gpu)
        self.translator = Translator(gpu, self.mirrors)
        self._on_host = False

        super().__init__(
            config, weights, team, slack, lambda experts: make_store(experts, range(on_gpu)), rows
        )
        self.adopt(*self.layers[:on_gpu], self._cells, self.store.addresses)
        self.adopt(self.experts.form_numbers)
        if self.is_whole:
            self.adopt(self.head_site, weights.head)
        self.prompt_experts = PromptExperts(self)

    @property
    def is_whole(self) -> bool:
        """Whether all layers are on the GPU."""
        return self.on_gpu == self.config.n_layers

    @property
    def has_all_experts(self) -> bool:
        """Whether the GPU has all experts of its layers, and can compute with them."""
        return self.store.is_whole and all(self.experts.forms[: self.on_gpu])

    @property
    def workers(self) -> int:
        """For how many workers attention of many tokens needs scratch memory: those of the host."""
        return 1 if self.is_whole else self.team.members

    def store_of(self, layer: int) -> ExpertStore:
        """Return where the records of a layer are."""
        return self.store if layer < self.on_gpu else self.store.host

    def enter_layer(self, layer: int, chunk: ChunkBuffers, tokens: int) -> None:
        """Go on with the host behind the last layer of the GPU."""
        if layer == self.on_gpu:
            self.fetch(chunk.streams[:tokens], chunk.mix[:tokens])
            self.fetch(chunk.update.values[:tokens], chunk.shared_update.values[:tokens])
            self._on_host = True

    def _take_in(
        self,
        chunk: ChunkBuffers,
        ids: NDArray[np.int64],
        states: Sequence[State],
        counts: Sequence[int],
        cells: NDArray[np.int64],
    ) -> None:
        """Take in tokens of sequences; the first layers are the GPU's."""
        self._on_host = False
        super()._take_in(chunk, ids, states, counts, cells)

    def _embed(self, chunk: ChunkBuffers, ids: NDArray[np.int64]) -> None:
        """Send each embedding once: the GPU copies it to the streams."""
        tokens, x = len(ids), chunk.x
        if tokens == 1:
            super()._embed(chunk, ids)
            return
        chunk.ids[:tokens] = ids
        for part, vectors in self._embeddings(ids):
            x.values[part] = vectors
        self.publish(chunk.ids[:tokens], x.values[:tokens])
        program, (_, streams, hidden) = GpuProgram(self.scratch), chunk.streams.shape
        place = chunk.streams.ctypes.data
        program.add_twin(SPREAD, x.at(), x.stride, tokens, hidden, place, streams)
        self.run(program)

    def new_program(self) -> Program:
        """Return an empty program for the device that is to go on."""
        return Program(self.scratch) if self._on_host else GpuProgram(self.scratch)

    def run(self, program: Program) -> None:
        """Run or enqueue a program; raise Cancelled instead when asked to stop."""
        if isinstance(program, GpuProgram):
            self.check_cancelled()
            self.gpu.run(self.translator.steps(program))
        else:
            super().run(program)

    def record(self, program: Program) -> Recording:
        """Keep a program for many runs."""
        return self.record_all([program])[0]

    def record_all(
        self,
        programs: Sequence[Program],
        others: Sequence[str] = (),
        on_compile: OnCompile | None = None,
    ) -> list[Recording]:
        """Keep some programs; what they need is compiled together, with `others` of the files."""
        steps = [self._steps(program) for program in programs]
        needed = [source for each in steps for source in sources_of(each)]
        self.gpu.make_ready([*others, *dict.fromkeys(needed)], on_compile)
        return [self.gpu.record(each) for each in steps]

    def _steps(self, program: Program) -> list[Step]:
        assert isinstance(program, GpuProgram)
        return self.translator.steps(program, merges=True)

    def mix_packed(
        self, moe: FastMoe, chunk: ChunkBuffers, buffers: WaveBuffers, tokens: int
    ) -> None:
        """Add the weighted outputs of experts; the host computes some that the GPU lacks."""
        if self._on_host or self.store.is_whole or not moe.forms:
            super().mix_packed(moe, chunk, buffers, tokens)
        else:
            self.prompt_experts.mix(moe, chunk, buffers, tokens)

    def mix_stored(self, index: int, chunk: ChunkBuffers, tokens: int) -> None:
        """Have the host compute `update` of a layer whose experts have no packed form."""
        self.fetch(chunk.x.values[:tokens], chunk.chosen[:tokens], chunk.shares[:tokens])
        super().mix_stored(index, chunk, tokens)
        self.publish(chunk.update.values[:tokens])

    def adopt(self, *owners: object) -> None:
        """Let programs use the arrays of some objects, from now on."""
        self.mirrors.add_all(arrays_of(owners, (Experts, ModelConfig, *STORES)))
        for owner in owners:
            if isinstance(owner, FastLayer) and owner.moe.shared.is_packed:
                self.mirrors.push_table(owner.moe.shared.records)

    def disown(self, *owners: object) -> None:
        """Let go of arrays that no program uses any more."""
        for owner in owners:
            for array in arrays_of(owner, (Experts, ModelConfig, *STORES)):
                self.mirrors.drop(array)

    def publish(self, *arrays: NDArray[np.generic]) -> None:
        """Copy what was written into some arrays to the GPU."""
        if not self._on_host:
            self.mirrors.push(*arrays)

    def send(self, source: NDArray[np.generic], target: NDArray[np.generic]) -> None:
        """Copy an array of the host to where the GPU has another one."""
        self.mirrors.send(source, target)

    def publish_addresses(self, *tables: NDArray[np.int64]) -> None:
        """The same for arrays of addresses."""
        for table in tables:
            self.mirrors.push_table(table)

    def fetch(self, *arrays: NDArray[np.generic]) -> None:
        """Copy what programs have written into some arrays from the GPU."""
        if not self._on_host:
            self.pull(*arrays)

    def ask(self, *arrays: NDArray[np.generic]) -> Callable[[], None]:
        """The same without waiting; return what waits."""
        if self._on_host:
            return super().ask(*arrays)
        return self.mirrors.ask([(array, array) for array in arrays])

    def pull(self, *arrays: NDArray[np.generic]) -> None:
        """Copy arrays from the GPU, even where the host has gone on."""
        self.mirrors.pull(*arrays)

    def _begin_state(self, state: State, tokens: int) -> None:
        if state.device is None:
            state.device = StateCopy(self.mirrors, state, self.on_gpu)
        super()._begin_state(state, tokens)
        assert isinstance(state.device, StateCopy)
        state.device.follow()
