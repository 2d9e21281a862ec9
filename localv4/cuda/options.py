"""What a user may say about GPUs."""

import importlib.util
from dataclasses import dataclass

from localv4.errors import UsageError


@dataclass(frozen=True, slots=True)
class GpuOptions:
    """Which device computes: `cpu`, `cuda` (its `number`), or `auto`: a GPU if one can be used.

    `memory` bounds what is taken of the GPU's, in bytes; `state_bytes` are those of all decoder
    states together, None: of one sequence.
    """

    name: str = "auto"
    number: int = 0
    memory: int | None = None
    state_bytes: int | None = None

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


def has_library() -> bool:
    """Say whether CUDA for Python is installed; nothing of it is loaded."""
    return all(importlib.util.find_spec(name) is not None for name in ("cuda", "cuda.bindings"))
