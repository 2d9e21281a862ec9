"""The other engine of `localv4 bench --compare`: started and checked before our model is loaded."""

import threading
from dataclasses import dataclass, replace
from pathlib import Path

from localv4.cli import loading, terminal
from localv4.cuda import offload
from localv4.cuda.options import GpuOptions
from localv4.engine.benchmark import fit_together
from localv4.engine.peer import Peer, PeerFacts, PeerSettings, worker_command
from localv4.engine.setup import Setup
from localv4.errors import UsageError
from localv4.library import installed
from localv4.paging.pressure import available_bytes


@dataclass(frozen=True, slots=True)
class Rival:
    """A running llama.cpp, what it is, and whether memory holds both engines."""

    peer: Peer
    facts: PeerFacts
    fits_together: bool

    @property
    def settings(self) -> PeerSettings:
        """What it was told."""
        return self.peer.settings

    @property
    def name(self) -> str:
        """Package and library with their versions."""
        ggml = f" (ggml {self.facts.ggml})" if self.facts.ggml else ""
        return terminal.sanitize_line(f"llama-cpp-python {self.facts.package}{ggml}")

    def close(self) -> None:
        """End it."""
        self.peer.close()


def start_rival(
    reference: str | None,
    python: Path | None,
    settings: PeerSettings,
    cancelled: threading.Event,
    quiet: bool,
) -> Rival:
    """Start llama.cpp for a model.

    Raises UsageError for a model that is no GGUF file, DoesNotFitError when memory does not hold
    it, NotFoundError when there is no llama-cpp-python.
    """
    model = installed.resolve(reference)
    if model.format != "gguf":
        raise UsageError(
            f"{model.name} is no GGUF model, and llama.cpp reads nothing else",
            hint="name a .gguf file",
        )
    together = fit_together(model.nbytes, available_bytes())
    peer = Peer(worker_command(python), settings, cancelled)
    try:
        rival = Rival(peer, peer.hello(), together)
    except BaseException:
        peer.close()
        raise
    if not together and not quiet:
        loading.note("memory does not hold both engines at once: each test runs them in sequence")
    return rival


def on_equal_terms(setup: Setup, quiet: bool) -> Setup:
    """Return what a comparison is made with: llama.cpp gets no GPU, so ours is only used if named.

    Tells on stderr that a GPU is left out where there is one.
    """
    if setup.gpu.name != "auto":
        return setup
    if not quiet and offload.has_gpu():
        loading.note("processors are compared, as llama.cpp gets no GPU; --device cuda for ours")
    return replace(setup, gpu=GpuOptions("cpu"))
