"""What a forecast has to know of a machine: measured, or assumed by whoever asks."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from localv4.cuda.speed import GpuSpeed
from localv4.planning.memory import Memory

CORE_READ_BYTES_S = 15e9
"""What the kernels of one core read at most while they decode: 14.9 GB/s on a 2.x GHz server core
with AVX-512 (docs/performance.md, threads). Cores that together read less than memory gives are
what limits decoding."""

CORE_INT8_OPS_S = 0.4e12
"""int8 operations of an assumed core: two dot products of 32 bytes a cycle at 3 GHz (AVX-VNNI).
The measured server core with AVX-512 does 0.8e12."""


IN_USE_SHARE = 0.05
"""Of the memory of an assumed machine: what the system and a desktop have."""

ASSUMED_CORES = 8
"""Of an assumed machine whose bandwidth alone is given."""


@dataclass(frozen=True, slots=True)
class DiskFacts:
    """Reading whole records of experts in random order by several threads.

    `bytes_s` is that of all, `latency_s` what each read takes beyond its bytes, `cpu_s_per_gb` the
    processor seconds for 10^9 bytes.
    """

    bytes_s: float
    latency_s: float = 150e-6
    cpu_s_per_gb: float = 0.1
    readers: int = 8


@dataclass(frozen=True, slots=True)
class KernelShares:
    """What the kernels make of the machine, measured on layers of true dimensions.

    `decode` of the read roof (of bytes that a token reads per second), `prefill` of the int8 peak,
    `layer_s` what each layer of a token takes whatever its size: threads that wait for each other.
    """

    decode: float
    prefill: float
    layer_s: float


UPLOAD_BYTES_S = 22e9
"""To an assumed GPU: PCIe 4.0 with 16 lanes gives 20 to 25 GB/s."""

GPU_BYTES_S = 450e9
"""Of the memory of an assumed GPU whose size alone is given: with 12 to 16 GiB it is 290 to 900."""

PRODUCT_OPS_PER_BYTE = 100.0
"""Operations of products of prompts that an assumed GPU does while it reads a byte: tensor cores
promise two to eight times as many."""


@dataclass(frozen=True, slots=True)
class GpuFacts:
    """A GPU that can help: its memory in bytes, all and what is free now, and its speed."""

    name: str
    total: int
    free: int
    speed: GpuSpeed

    @classmethod
    def assumed(cls, total: int, bandwidth: float | None) -> "GpuFacts":
        """Return a GPU that somebody describes: bytes of memory, and what it reads per second."""
        read = bandwidth or GPU_BYTES_S
        speed = GpuSpeed(read, UPLOAD_BYTES_S, PRODUCT_OPS_PER_BYTE * read)
        return cls("a GPU", total, total, speed)


@dataclass(frozen=True, slots=True)
class Machine:
    """Memory now, speeds per second, and where the figures are from.

    `read_bytes_s` is the read roof with all cores, `read_by_threads` the same by threads,
    `int8_ops_s` the int8 peak of all cores. None is what has not been measured.
    """

    memory: Memory
    cores: int
    read_bytes_s: float | None = None
    int8_ops_s: float | None = None
    disk: DiskFacts | None = None
    disk_free: int | None = None
    kernels: KernelShares | None = None
    read_by_threads: Mapping[int, float] = field(default_factory=dict)
    cpu: str = ""
    isa: str = ""
    gpus: tuple[str, ...] = ()
    gpu: GpuFacts | None = None
    swap_is_compressed: bool = False
    measured_on: str | None = None
    assumed: frozenset[str] = frozenset()

    @property
    def core_read_bytes_s(self) -> float:
        """What one core can read while it computes, or the constant of an assumed one."""
        alone = self.read_by_threads.get(1, 0.0)
        return max(alone, CORE_READ_BYTES_S) if alone else CORE_READ_BYTES_S

    @property
    def peak_int8_ops_s(self) -> float:
        """The int8 peak, measured or assumed."""
        return self.int8_ops_s or self.cores * CORE_INT8_OPS_S

    def with_assumptions(
        self,
        *,
        ram: int | None = None,
        bandwidth: float | None = None,
        disk: float | None = None,
        cores: int | None = None,
        gpu: int | None = None,
        gpu_bandwidth: float | None = None,
    ) -> "Machine":
        """Return another machine: what is named replaces what was measured.

        `ram` bytes are those of the whole machine, of which a twentieth is in use. With a bandwidth
        or a number of cores that is assumed, nothing measured about cores is kept. `gpu` bytes are
        those of a GPU, `gpu_bandwidth` what its memory gives.
        """
        named: dict[str, Any] = {"ram": ram, "bandwidth": bandwidth, "disk": disk, "cores": cores}
        named["gpu"] = gpu
        if bandwidth is not None and cores is None:
            named["cores"] = ASSUMED_CORES
        found = replace(self, assumed=frozenset(k for k, v in named.items() if v is not None))
        if ram is not None:
            found = replace(found, memory=Memory(ram, int(ram * (1 - IN_USE_SHARE))))
        if count := named["cores"]:
            found = replace(found, cores=count, cpu="", isa="", read_by_threads={})
            found = replace(found, int8_ops_s=None, kernels=None)
        if bandwidth is not None:
            found = replace(found, read_bytes_s=bandwidth)
        if disk is not None:
            found = replace(found, disk=DiskFacts(disk))
        if gpu is not None:
            found = replace(found, gpu=GpuFacts.assumed(gpu, gpu_bandwidth), gpus=())
        return found
