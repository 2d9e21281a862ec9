"""The network in the arithmetic `fast`, computed by a GPU with the help of the host."""

from collections.abc import Callable, Sequence
from functools import partial

import numpy as np
from numpy.typing import NDArray

from localv4.cuda.compiler import sources
from localv4.cuda.gpu import Gpu, GpuMemoryError, OnCompile
from localv4.cuda.head_plan import GpuHeadPlan
from localv4.cuda.network import GpuNetwork, MakeStore
from localv4.cuda.rows_plan import GpuRowsPlan
from localv4.cuda.token_plan import GpuTokenPlan
from localv4.cuda.twins.products import FORMATS, KQUANT_MODULE
from localv4.cuda.vram_store import VramStore
from localv4.errors import DoesNotFitError
from localv4.kernels.row_operations import RowFormat
from localv4.kernels.team import Team
from localv4.model.config import ModelConfig
from localv4.model.fast import CHUNK_TOKENS, FastTransformer
from localv4.model.matrix import Floats
from localv4.model.packing import families, packed_bytes_of
from localv4.model.state import State
from localv4.model.weights import Weights
from localv4.paging.store import ExpertStore

GPU_TOGETHER = 480
"""Tokens of a prompt that attention takes at a time: more of them fill a GPU better."""

GPU_SLACK_TOKENS = 512


class GpuTransformer(FastTransformer):
    """Packed weights in the memory of a GPU, and the forward pass over them.

    Sequences live in `State` objects of the host, whose arrays have copies on the GPU. Raises
    GpuError or GpuMemoryError when the GPU cannot be used for this network.
    """

    slack = GPU_SLACK_TOKENS
    together = GPU_TOGETHER

    def __init__(
        self,
        config: ModelConfig,
        weights: Weights,
        team: Team,
        make_store: MakeStore,
        gpu: Gpu,
        rows: RowFormat,
        *,
        layers: int,
        falls_back: bool = False,
        chunk_tokens: int = CHUNK_TOKENS,
    ) -> None:
        self.gpu, self.chunk_tokens = gpu, chunk_tokens
        self._falls_back = falls_back
        self._alone: FastTransformer | None = None
        self.warning: str | None = None
        self._on_gpu = GpuNetwork(config, weights, team, self.slack, make_store, rows, gpu, layers)
        self._team = team
        self._one = GpuTokenPlan(self._on_gpu)
        self._take(self._on_gpu, GpuRowsPlan(self._on_gpu), GpuHeadPlan(self._on_gpu))

    def prepare(self, on_compile: OnCompile | None = None) -> None:
        """Compile all that this network can need, and record the program of one token."""
        self._one.prepare(wanted_sources(self.weights), on_compile)

    @property
    def vram(self) -> VramStore:
        """The experts on the GPU."""
        return self._on_gpu.store

    @property
    def host_store(self) -> ExpertStore:
        """The experts in the memory of the host."""
        return self.vram.host

    @property
    def gpu_layers(self) -> int:
        """How many layers the GPU computes, from the first on."""
        return self._on_gpu.on_gpu

    @property
    def gpu_bytes(self) -> int:
        """What is taken of the GPU's memory: weights, states, buffers, and the room for experts."""
        network = self._on_gpu
        return network.mirrors.nbytes + network.translator.nbytes + self.vram.arena.capacity

    def memory(self) -> dict[str, int]:
        """Return the bytes held by component, but for decoder state and mapped files.

        What begins with `GPU` is in its memory.
        """
        network = self._on_gpu
        return {
            "packed weights": packed_bytes_of(self.weights),
            "packed experts": network.store.host.held_bytes,
            "workspace": self._many.nbytes
            + self._rows.nbytes
            + network.nbytes
            + network.prompt_experts.nbytes,
            "GPU weights and workspace": network.mirrors.nbytes + network.translator.nbytes,
            "GPU experts": network.store.held_bytes,
        }

    def close(self) -> None:
        """Stop copying and reading experts."""
        self.vram.close()
        self.vram.host.close()

    def forward(
        self, token_ids: NDArray[np.int64], state: State, wanted: int | None = None
    ) -> Floats:
        """Process tokens as the host does; it goes on alone when the GPU has no memory left."""
        here = partial(super().forward, token_ids, state, wanted)
        return self._here_or_alone(
            [state], here, lambda alone: alone.forward(token_ids, state, wanted)
        )

    def forward_many(
        self,
        token_ids: NDArray[np.int64],
        states: Sequence[State],
        counts: Sequence[int],
        wanted: int | None = None,
    ) -> Floats:
        """Process the next tokens of several sequences as the host does."""
        here = partial(super().forward_many, token_ids, states, counts, wanted)
        return self._here_or_alone(
            states, here, lambda alone: alone.forward_many(token_ids, states, counts, wanted)
        )

    def decode_rows(self, token_ids: NDArray[np.int64], states: Sequence[State]) -> Floats:
        """Process one token of each of several sequences as the host does."""
        here = partial(super().decode_rows, token_ids, states)
        return self._here_or_alone(states, here, lambda alone: alone.decode_rows(token_ids, states))

    def _here_or_alone(
        self,
        states: Sequence[State],
        here: Callable[[], Floats],
        elsewhere: Callable[[FastTransformer], Floats],
    ) -> Floats:
        """Compute with the GPU while it has memory, else with the host."""
        if self._alone is None:
            try:
                return here()
            except GpuMemoryError as error:
                self._leave_gpu(error)
        assert self._alone is not None
        for state in states:
            _take_home(state)
        return elsewhere(self._alone)

    def logits(self, vectors: Floats) -> Floats:
        """Return logits (tokens, vocab) for final vectors (tokens, hidden)."""
        return super().logits(vectors) if self._alone is None else self._alone.logits(vectors)

    def _leave_gpu(self, error: GpuMemoryError) -> None:
        """Have the host compute everything from now on, or raise `error`."""
        if not self._falls_back:
            raise DoesNotFitError(error.message, hint=error.hint) from error
        self.warning = f"{error.message}: the CPU goes on alone"
        host, rows = self.vram.host, self.rows
        self._alone = FastTransformer(
            self.config, self.weights, self._team, lambda _: host, rows=rows
        )
        self._alone.cancelled = self.cancelled

    def _read(
        self,
        token_ids: NDArray[np.int64],
        states: Sequence[State],
        counts: Sequence[int],
        wanted: int | None,
    ) -> Floats:
        return self._many.run(token_ids, states, counts, wanted)

    def _decode(self, token_ids: NDArray[np.int64], state: State) -> Floats:
        return self._one.run(token_ids, state)


def _take_home(state: State) -> None:
    """Bring what a GPU has written into a state's arrays, which the host goes on with."""
    state.read_back()
    state.device = None


def wanted_sources(weights: Weights) -> list[str]:
    """Return the files of kernels that a network of such weights can need."""
    kquants = {form.fmt.name for form in FORMATS if form.module == KQUANT_MODULE}
    has_kquants = not kquants.isdisjoint(families(weights))
    return [name for name in sources() if has_kquants or "kquant" not in name]
