"""How this machine is to run a model: all that `Engine.load` takes beside the path."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from localv4.cuda.options import GpuOptions
from localv4.engine.memory import MemoryOptions

if TYPE_CHECKING:
    from localv4.engine.engine import Engine, NumericsName, OnLoad


@dataclass(frozen=True, slots=True)
class Setup:
    """Choices about context, processors, memory and devices; small, and the same for all nodes."""

    ctx_size: int | None = None
    threads: int | None = None
    pin: bool = False
    numerics: "NumericsName" = "fast"
    memory: MemoryOptions = field(default_factory=MemoryOptions)
    gpu: GpuOptions = field(default_factory=lambda: GpuOptions("cpu"))

    def load(self, path: Path, on_progress: "OnLoad | None" = None) -> "Engine":
        """Load the model at `path`; raises what `Engine.load` raises."""
        from localv4.engine.engine import Engine  # slow: whoever calls this expects to wait

        return Engine.load(
            path,
            ctx_size=self.ctx_size,
            threads=self.threads,
            pin=self.pin,
            numerics=self.numerics,
            memory=self.memory,
            gpu=self.gpu,
            on_progress=on_progress,
        )
