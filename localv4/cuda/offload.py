"""From what the user wants of a GPU to a network that computes there."""

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass

from localv4.cuda.gpu import Gpu, GpuError
from localv4.cuda.transformer import GpuTransformer
from localv4.cuda.vram_store import VramStore
from localv4.errors import UsageError
from localv4.kernels.row_operations import RowFormat
from localv4.kernels.team import Team
from localv4.model.config import ModelConfig
from localv4.model.experts import Experts
from localv4.model.weights import Weights
from localv4.paging.options import PolicyName
from localv4.paging.store import ExpertStore

HostStore = Callable[[Experts], ExpertStore]
"""Makes the store of the host, which records come from."""


@dataclass(frozen=True, slots=True)
class GpuOptions:
    """Which device computes: `cpu`, `cuda` (its `number`), or `auto`: a GPU if one can be used.

    `memory` bounds what is taken of the GPU's, in bytes.
    """

    name: str = "auto"
    number: int = 0
    memory: int | None = None

    @classmethod
    def parse(cls, device: str, memory: int | None = None) -> "GpuOptions":
        """Read `auto`, `cpu`, `cuda` or `cuda:N`; raises UsageError for anything else."""
        name, colon, number = device.partition(":")
        if device in ("auto", "cpu", "cuda"):
            return cls(device, 0, memory)
        if name == "cuda" and colon and number.isdecimal():
            return cls("cuda", int(number), memory)
        raise UsageError(
            f"--device is {device}, expected auto, cpu, cuda or a device such as cuda:1"
        )


def find_gpu(options: GpuOptions) -> Gpu | None:
    """Return the GPU that is to be used; None if there is none and nobody insists on one.

    Raises GpuError when a GPU that was asked for, or was found, cannot be used.
    """
    if options.name == "cpu":
        return None
    if (
        importlib.util.find_spec("cuda") is None
        or importlib.util.find_spec("cuda.bindings") is None
    ):
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
) -> GpuTransformer:
    """Bring the first `layers` of a network to a GPU, with `capacity` bytes of their experts.

    Raises GpuError or GpuMemoryError when that cannot be.
    """

    def make_store(experts: Experts, own: range) -> VramStore:
        nbytes = experts.nbytes.copy()
        nbytes[len(own) :] = 0
        return VramStore(host_store(experts), nbytes, capacity, gpu, policy)

    network = GpuTransformer(config, weights, team, make_store, gpu, rows, layers=layers)
    try:
        network.vram.fill()
    except GpuError:
        network.close()
        raise
    return network
