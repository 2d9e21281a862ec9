"""The layers of a network whose programs run on a GPU."""

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from localv4.cuda.gpu import Gpu, GpuError, Recording
from localv4.cuda.mirrors import Mirrors, arrays_of
from localv4.cuda.program import GpuProgram, Translator
from localv4.cuda.state_copy import StateCopy
from localv4.kernels.row_operations import RowFormat
from localv4.kernels.team import Team
from localv4.model.config import ModelConfig
from localv4.model.experts import Experts
from localv4.model.fast_network import FastNetwork
from localv4.model.fast_shared import FastShared
from localv4.model.program import Program
from localv4.model.state import State
from localv4.model.weights import Weights
from localv4.paging.paged_store import PagedStore
from localv4.paging.store import ExpertStore, MappedStore

STORES = (MappedStore, PagedStore)

MakeStore = Callable[[Experts, Mirrors], ExpertStore]
"""Makes the store of the records on the GPU, whose addresses are the GPU's."""


class GpuNetwork(FastNetwork):
    """A network with all its dense weights in the memory of a GPU.

    `team` are the threads of the host. Raises GpuError when the experts of a layer have no packed
    form, or the GPU fails, GpuMemoryError when it has too little memory.
    """

    def __init__(
        self,
        config: ModelConfig,
        weights: Weights,
        team: Team,
        slack: int,
        make_store: MakeStore,
        rows: RowFormat,
        gpu: Gpu,
    ) -> None:
        self.gpu = gpu
        self.mirrors = Mirrors(gpu)
        self.translator = Translator(gpu, self.mirrors)

        def store_of(experts: Experts) -> ExpertStore:
            if not all(experts.forms):
                raise GpuError("experts that the CPU cannot pack cannot be computed on a GPU")
            return make_store(experts, self.mirrors)

        super().__init__(config, weights, team, slack, store_of, rows)
        self.adopt(*self.layers, self.head_site, weights.head, self._cells, self.store.addresses)
        self.adopt(self.experts.form_numbers)

    def new_program(self) -> Program:
        """Return an empty program."""
        return GpuProgram(self.scratch)

    def run(self, program: Program) -> None:
        """Enqueue a program; raise Cancelled instead when asked to stop."""
        self.check_cancelled()
        assert isinstance(program, GpuProgram)
        self.gpu.run(self.translator.steps(program))

    def record(self, program: Program) -> Recording:
        """Keep a program for many runs."""
        assert isinstance(program, GpuProgram)
        return self.gpu.record(self.translator.steps(program))

    def adopt(self, *owners: object) -> None:
        """Let programs use the arrays of some objects, from now on."""
        for owner in owners:
            for array in arrays_of(owner, (Experts, ModelConfig, *STORES)):
                self.mirrors.add(array)
            for part in _shared_experts(owner):
                self.mirrors.push_table(part.records)

    def disown(self, *owners: object) -> None:
        """Let go of arrays that no program uses any more."""
        for owner in owners:
            for array in arrays_of(owner, (Experts, ModelConfig, *STORES)):
                self.mirrors.drop(array)

    def publish(self, *arrays: NDArray[np.generic]) -> None:
        """Copy what was written into some arrays to the GPU."""
        self.mirrors.push(*arrays)

    def publish_addresses(self, *tables: NDArray[np.int64]) -> None:
        """The same for arrays of addresses."""
        for table in tables:
            self.mirrors.push_table(table)

    def fetch(self, *arrays: NDArray[np.generic]) -> None:
        """Copy what programs have written into some arrays from the GPU."""
        self.mirrors.pull(*arrays)

    def _begin_state(self, state: State, tokens: int) -> None:
        if state.device is None:
            state.device = StateCopy(self.mirrors, state)
        super()._begin_state(state, tokens)
        assert isinstance(state.device, StateCopy)
        state.device.follow()


def _shared_experts(owner: object) -> list[FastShared]:
    """Return the shared expert of a layer: its table of records has an address of the host."""
    moe = getattr(owner, "moe", None)
    return [moe.shared] if moe is not None and moe.shared.is_packed else []
