"""The network in the arithmetic `fast`, computed by a GPU with the help of the host."""

import numpy as np
from numpy.typing import NDArray

from localv4.cuda.gpu import Gpu
from localv4.cuda.network import GpuNetwork, MakeStore
from localv4.cuda.rows_plan import GpuRowsPlan
from localv4.cuda.token_plan import GpuTokenPlan
from localv4.cuda.vram_store import VramStore
from localv4.kernels.row_operations import RowFormat
from localv4.kernels.team import Team
from localv4.model.config import ModelConfig
from localv4.model.fast import CHUNK_TOKENS, SLACK_TOKENS, FastTransformer
from localv4.model.matrix import Floats
from localv4.model.packing import packed_bytes_of
from localv4.model.state import State
from localv4.model.weights import Weights


class GpuTransformer(FastTransformer):
    """Packed weights in the memory of a GPU, and the forward pass over them.

    Sequences live in `State` objects of the host, whose arrays have copies on the GPU. Raises
    GpuError or GpuMemoryError when the GPU cannot be used for this network.
    """

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
        chunk_tokens: int = CHUNK_TOKENS,
    ) -> None:
        self.gpu, self.chunk_tokens = gpu, chunk_tokens
        self._on_gpu = GpuNetwork(
            config, weights, team, SLACK_TOKENS, make_store, rows, gpu, layers
        )
        self._one = GpuTokenPlan(self._on_gpu)
        self._take(self._on_gpu, GpuRowsPlan(self._on_gpu))

    @property
    def vram(self) -> VramStore:
        """The experts on the GPU."""
        return self._on_gpu.store

    def memory(self) -> dict[str, int]:
        """Return the bytes held by component, but for decoder state and mapped files.

        What begins with `GPU` is in its memory.
        """
        network = self._on_gpu
        return {
            "packed weights": packed_bytes_of(self.weights),
            "packed experts": network.store.host.held_bytes,
            "workspace": self._many.nbytes + self._rows.nbytes + network.nbytes,
            "GPU weights and workspace": network.mirrors.nbytes + network.translator.nbytes,
            "GPU experts": network.store.held_bytes,
        }

    def close(self) -> None:
        """Stop copying and reading experts."""
        self.vram.close()
        self.vram.host.close()

    def _read(self, token_ids: NDArray[np.int64], state: State) -> Floats:
        return self._many.run(token_ids, state)

    def _decode(self, token_ids: NDArray[np.int64], state: State) -> Floats:
        return self._one.run(token_ids, state)
