"""From what the user wants of a GPU to a network that computes there."""

from collections.abc import Callable
from typing import TYPE_CHECKING

from localv4.cuda.gpu import Gpu, GpuError, OnCompile
from localv4.cuda.options import GpuOptions, has_library
from localv4.cuda.transformer import GpuTransformer
from localv4.cuda.vram_store import COPY_THREADS, VramStore
from localv4.kernels.row_operations import RowFormat
from localv4.kernels.team import Team
from localv4.model.config import ModelConfig
from localv4.model.expert_source import arena_bytes, footprints
from localv4.model.experts import Experts
from localv4.model.weights import Weights
from localv4.paging.options import PolicyName
from localv4.paging.store import ExpertStore

if TYPE_CHECKING:
    from localv4.cuda.driver import CudaGpu

HostStore = Callable[[Experts], ExpertStore]
"""Makes the store of the host, which records come from."""


def has_gpu() -> bool:
    """Say whether there is a GPU that `auto` would look at."""
    if not has_library():
        return False
    from localv4.cuda.driver import device_count

    return device_count() > 0


def find_gpu(options: GpuOptions) -> "CudaGpu | None":
    """Return the GPU that is to be used; None if there is none and nobody insists on one.

    Raises GpuError when a GPU that was asked for, or was found, cannot be used.
    """
    if options.name == "cpu":
        return None
    if not has_library():
        if options.name == "auto":
            return None
        raise GpuError("CUDA for Python is not installed", hint="pip install 'localv4[cuda]'")
    from localv4.cuda.driver import CudaGpu, device_count

    count = device_count()
    if count == 0 and options.name == "auto":
        return None
    if count == 0:
        raise GpuError(
            "there is no CUDA device here, or no driver for it", hint="leave --device out"
        )
    return CudaGpu(options.number)


def offload(
    gpu: Gpu,
    config: ModelConfig,
    weights: Weights,
    team: Team,
    host_store: HostStore,
    rows: RowFormat,
    *,
    layers: int,
    capacity: int,
    policy: PolicyName = "decay",
    copiers: int = COPY_THREADS,
    falls_back: bool = False,
    on_compile: OnCompile | None = None,
) -> GpuTransformer:
    """Bring the first `layers` of a network to a GPU, with `capacity` bytes of their experts.

    `copiers` threads bring experts there, beside the team. `falls_back`: the host goes on alone
    when the GPU's memory is full one day. Raises GpuError or GpuMemoryError when that cannot be.
    """

    def make_store(experts: Experts, own: range) -> VramStore:
        nbytes = experts.nbytes.copy()
        nbytes[len(own) :] = 0
        room = arena_bytes(nbytes, footprints(nbytes), capacity)
        return VramStore(host_store(experts), nbytes, room, gpu, policy, copiers)

    network = GpuTransformer(
        config, weights, team, make_store, gpu, rows, layers=layers, falls_back=falls_back
    )
    try:
        network.vram.fill()
        network.prepare(on_compile)
    except GpuError:
        network.close()
        raise
    return network
