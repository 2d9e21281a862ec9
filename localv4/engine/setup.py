"""How this machine is to run a model: all that `Engine.load` takes beside the path."""

from dataclasses import dataclass, field
from typing import Literal

from localv4.cuda.options import GpuOptions
from localv4.engine.memory import MemoryOptions

NumericsName = Literal["exact", "fast"]


@dataclass(frozen=True, slots=True)
class Setup:
    """Choices about context, processors, memory and devices; small, and the same for all nodes.

    `ctx_size` in tokens defaults to what the model allows, `threads` to the physical performance
    cores; `pin` binds each thread to a core. `numerics` "fast" multiplies packed weights with
    rounded activations; packing needs memory for the dense weights and for the experts in use.
    `gpu` says if a GPU helps.
    """

    ctx_size: int | None = None
    threads: int | None = None
    pin: bool = False
    numerics: NumericsName = "fast"
    memory: MemoryOptions = field(default_factory=MemoryOptions)
    gpu: GpuOptions = field(default_factory=lambda: GpuOptions("cpu"))
