"""Options of how this machine runs a model: processors, arithmetic, memory."""

from dataclasses import dataclass, replace
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from localv4.cli.option_groups import flag, option

if TYPE_CHECKING:
    from localv4.cuda.options import GpuOptions
    from localv4.engine.memory import MemoryOptions
    from localv4.engine.setup import Setup


class Arithmetic(StrEnum):
    """How weights are multiplied."""

    EXACT = "exact"
    FAST = "fast"


class IoWay(StrEnum):
    """How experts come from the disk."""

    AUTO = "auto"
    MAP = "map"
    DIRECT = "direct"
    BUFFERED = "buffered"


class Kv(StrEnum):
    """How compressed rows of the context are stored."""

    F32 = "f32"
    BF16 = "bf16"
    COMPACT = "compact"


class Caching(StrEnum):
    """Which experts stay in memory."""

    DECAY = "decay"
    LRU = "lru"
    LFU = "lfu"


Threads = Annotated[
    int | None,
    option(
        "-t",
        "--threads",
        panel="Model",
        metavar="N",
        help="CPU threads. Default: one for each physical performance core.",
    ),
]
Pin = Annotated[
    bool,
    flag(
        "--pin",
        panel="Model",
        help="Bind each thread to a core of its own. For machines with nothing else to do.",
    ),
]

Numerics = Annotated[
    Arithmetic,
    option(
        "--numerics",
        panel="Model",
        help="fast: packed weights, activations rounded to 8 bits; exact: float32 throughout.",
    ),
]

Ram = Annotated[
    str | None,
    option(
        "--ram",
        panel="Memory",
        metavar="SIZE",
        help="The most memory to take, as 48GiB. Default: what is available, less the reserve.",
    ),
]
Reserve = Annotated[
    str | None,
    option(
        "--reserve",
        panel="Memory",
        metavar="SIZE",
        help="Memory to leave to other programs. Default: 8 %, at least 4GiB.",
    ),
]
Io = Annotated[
    IoWay,
    option(
        "--io",
        panel="Memory",
        help="How experts are read. auto: mapped if all fit, else directly from the disk.",
    ),
]
CachePolicy = Annotated[
    Caching,
    option(
        "--cache-policy",
        panel="Memory",
        help="Which experts stay: those used most of late (decay), last (lru) or ever (lfu).",
    ),
]
ExpertReaders = Annotated[
    int | None,
    option(
        "--readers",
        panel="Memory",
        metavar="N",
        min=1,
        max=64,
        help="Threads that read experts. Default: as many as the disk takes.",
    ),
]
Prefetch = Annotated[
    bool,
    flag(
        "--prefetch/--no-prefetch",
        panel="Memory",
        help="Read what the next layer may need while that makes tokens faster.",
    ),
]
KvRows = Annotated[
    Kv | None,
    option(
        "--kv",
        panel="Memory",
        help="How the compressed context is stored. Default: compact (FP8, FP4); f32 with exact.",
    ),
]
KvDir = Annotated[
    Path | None,
    option(
        "--kv-dir",
        panel="Memory",
        metavar="DIR",
        help="Keep rows of the context that tokens choose from in a file there, gone at exit.",
    ),
]
KvRam = Annotated[
    str | None,
    option(
        "--kv-ram",
        panel="Memory",
        metavar="SIZE",
        help="The most memory for rows of the context, as 1GiB; needs --kv-dir.",
    ),
]
Device = Annotated[
    str,
    option(
        "--device",
        panel="Model",
        metavar="DEVICE",
        help="auto: a GPU if there is one and the extra `cuda` is installed; cpu; cuda; cuda:1.",
    ),
]
GpuMem = Annotated[
    str | None,
    option(
        "--gpu-mem",
        panel="Memory",
        metavar="SIZE",
        help="The most memory to take of the GPU, as 8GiB. Default: what is free, less a reserve.",
    ),
]
TraceRoutes = Annotated[
    Path | None,
    option(
        "--trace-routes",
        panel="Memory",
        env=False,
        metavar="FILE",
        help="Record which experts tokens choose, for localv4 tune; no text is kept.",
    ),
]


def gpu_options(device: str, gpu_mem: str | None) -> "GpuOptions":
    """Return what was said about GPUs. Raises UsageError for what is no device or no size."""
    from localv4.cli.sizes import parse_bytes
    from localv4.cuda.options import GpuOptions

    memory = parse_bytes(gpu_mem, "--gpu-mem") if gpu_mem is not None else None
    return GpuOptions.parse(device, memory)


@dataclass(frozen=True, slots=True)
class ComputingOptions:
    """The options of all commands that compute with a model: what computes it, and how.

    Those of memory are declared by the groups that have this base, in the order of --help.
    """

    threads: Threads = None
    pin: Pin = False
    numerics: Numerics = Arithmetic.FAST
    device: Device = "auto"

    def _setup(
        self, memory: "MemoryOptions", gpu_mem: str | None, ctx_size: int | None = None
    ) -> "Setup":
        from localv4.engine.setup import Setup

        return Setup(
            ctx_size=ctx_size,
            threads=self.threads,
            pin=self.pin,
            numerics=self.numerics.value,
            memory=memory,
            gpu=gpu_options(self.device, gpu_mem),
        )


@dataclass(frozen=True, slots=True)
class MeasuringOptions(ComputingOptions):
    """The options of all commands that load a model to measure its quality."""

    kv: KvRows = None
    gpu_mem: GpuMem = None

    def setup(self) -> "Setup":
        """Return all of it. Raises UsageError for what is no device or no size."""
        from localv4.engine.memory import MemoryOptions

        memory = MemoryOptions(kv=self.kv.value if self.kv is not None else None)
        return self._setup(memory, self.gpu_mem)

    def of_base(self, numerics: Arithmetic | None, kv: Kv | None) -> "MeasuringOptions":
        """Return the options of the model that is compared with; None stands for the same.

        In `exact` arithmetic the processor computes it, with rows of float32 unless others are
        asked for.
        """
        numerics = numerics or self.numerics
        if numerics is Arithmetic.EXACT:
            return replace(self, numerics=numerics, kv=kv, device="cpu", gpu_mem=None)
        return replace(self, numerics=numerics, kv=kv or self.kv)


@dataclass(frozen=True, slots=True)
class EngineOptions(ComputingOptions):
    """The options of all commands that load a model to answer."""

    ram: Ram = None
    reserve: Reserve = None
    io: Io = IoWay.AUTO
    cache_policy: CachePolicy = Caching.DECAY
    readers: ExpertReaders = None
    prefetch: Prefetch = True
    kv: KvRows = None
    kv_dir: KvDir = None
    kv_ram: KvRam = None
    gpu_mem: GpuMem = None

    def setup(self, ctx_size: int | None = None) -> "Setup":
        """Return all of it. Raises UsageError for what is no device or no size."""
        return self._setup(self._memory(), self.gpu_mem, ctx_size)

    def _memory(self) -> "MemoryOptions":
        from localv4.cli.sizes import parse_bytes
        from localv4.engine.memory import MemoryOptions

        return MemoryOptions(
            ram=parse_bytes(self.ram, "--ram") if self.ram is not None else None,
            reserve=parse_bytes(self.reserve, "--reserve") if self.reserve is not None else None,
            io=self.io.value,
            policy=self.cache_policy.value,
            readers=self.readers,
            prefetch=self.prefetch,
            kv=self.kv.value if self.kv is not None else None,
            kv_dir=self.kv_dir,
            kv_ram=parse_bytes(self.kv_ram, "--kv-ram") if self.kv_ram is not None else None,
        )
