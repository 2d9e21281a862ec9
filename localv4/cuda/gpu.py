"""What the rest needs to know of a GPU: memory, copies, launches in order, recorded launches."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from localv4.cuda.twin import Kernel
from localv4.errors import LocalV4Error


class GpuError(LocalV4Error):
    """The GPU cannot be used, or not any more."""


class GpuMemoryError(GpuError):
    """The GPU has not enough memory left."""


def no_library(error: ImportError) -> GpuError:
    """Return what to raise when CUDA for Python cannot be imported."""
    return GpuError(
        f"CUDA for Python is not installed ({error})", hint="pip install 'localv4[cuda]'"
    )


@dataclass(frozen=True, slots=True)
class Launch:
    """One kernel with the words of its operation, in device addresses; or those of several."""

    kernel: Kernel
    blocks: int
    shared: int
    words: tuple[int, ...]


Step = Sequence[Sequence[Launch]]
"""Launches that may run at the same time: sequences, each in its own order."""


OnCompile = Callable[[int, int], None]
"""Told how many files of kernels are compiled, and of how many."""


def sources_of(steps: Sequence[Step]) -> list[str]:
    """Return the files and texts of the kernels of some steps, once each."""
    launches = (launch for step in steps for branch in step for launch in branch)
    return list(dict.fromkeys(launch.kernel.source for launch in launches))


Mark = Any
"""A point in the order of what a GPU was asked for."""


class Lane(Protocol):
    """A buffer of host memory that the GPU copies from beside everything else; for one thread."""

    buffer: int

    def follow(self, mark: Mark) -> None:
        """Let what is sent from now on wait for what the GPU was asked for before a mark."""

    def send(self, address: int, nbytes: int) -> None:
        """Start to copy what is in the buffer."""

    def wait(self) -> None:
        """Wait until the buffer has been sent."""


class Recording(Protocol):
    """Steps that can be run again and again."""

    def replay(self) -> None:
        """Enqueue all of them."""


class Gpu(Protocol):
    """One GPU. Everything is done in the order in which it is asked for, but for `Step`s.

    Addresses are integers. All methods raise GpuError when the GPU fails.
    """

    name: str
    total_bytes: int

    def free_bytes(self) -> int:
        """Return how much memory nobody has taken."""

    def allocate(self, nbytes: int) -> int:
        """Return the address of memory on a line of 256 bytes; raises GpuMemoryError."""

    def free(self, address: int) -> None:
        """Give memory back that `allocate` returned."""

    def upload(self, address: int, host: int, nbytes: int) -> None:
        """Copy from host memory, which may be changed as soon as this returns."""

    def download(self, host: int, address: int, nbytes: int) -> None:
        """Copy to host memory; return when it is there."""

    def ask(self, requests: Sequence[tuple[int, int, int]]) -> Callable[[], None]:
        """Enqueue copies (host, address, bytes) to host memory; return what waits for them."""

    def copy(self, target: int, source: int, nbytes: int) -> None:
        """Copy inside the GPU."""

    def mark(self) -> Mark:
        """Return the end of all that was asked for so far, but for what lanes send."""

    def new_lane(self, nbytes: int) -> Lane:
        """Return a buffer for the thread that calls."""

    def make_ready(self, sources: Sequence[str], on_compile: OnCompile | None = None) -> None:
        """Compile files or texts of kernels that were never compiled for this kind of GPU.

        `on_compile` is only called when there are any.
        """

    def run(self, steps: Sequence[Step]) -> None:
        """Enqueue launches, one step after the other."""

    def record(self, steps: Sequence[Step]) -> Recording:
        """Keep launches for many runs."""

    def synchronize(self) -> None:
        """Wait until all that was enqueued is done."""

    def close(self) -> None:
        """Give back everything."""
