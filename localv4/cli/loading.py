"""From what the user named to a loaded engine, with progress and notes on stderr."""

import os
import shutil
import sys
import textwrap
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from localv4 import paths
from localv4.cli import terminal, worker
from localv4.cli.progress import Progress
from localv4.cli.settings import Settings, recommended

if TYPE_CHECKING:
    from pathlib import Path

    from localv4.engine.engine import Engine
    from localv4.engine.setup import Setup
    from localv4.library.installed import InstalledModel
    from localv4.paging.trace import TraceWriter

DEMO_NOTE = (
    "using tiny-v4, the small built-in demo model (a toy); for a real one: "
    "localv4 pull v4-flash, then -m v4-flash"
)


@dataclass(frozen=True, slots=True)
class Loaded:
    """An engine and the model that it was loaded from."""

    engine: "Engine"
    model: "InstalledModel"
    _told: set[str] = field(default_factory=set)

    @property
    def name(self) -> str:
        """The model's name, safe to print."""
        return terminal.sanitize_line(self.model.name)

    @property
    def knows_chat(self) -> bool:
        """Whether the model was trained to answer; a base model only continues text."""
        return self.model.spec is None or self.model.spec.chat

    def settings(self, changes: Mapping[str, float | None]) -> Settings:
        """Return the settings that come with the model, with those changed that are not None."""
        own = recommended(self.model.path, self.engine.checkpoint.metadata)
        return own.with_values(changes)

    def fresh_notes(self) -> list[str]:
        """Return what the user should know of the engine and has not been told yet."""
        fresh = [line for line in self.engine.notes if line not in self._told]
        self._told.update(fresh)
        return fresh

    def record_routes(self, path: "Path") -> "TraceWriter":
        """Write the experts that all further tokens choose to a file, for `localv4 tune`."""
        from localv4.engine.route_log import record_routes

        return record_routes(self.engine.network, self.engine.checkpoint, self.model.name, path)


def load_engine(reference: str | None, setup: "Setup", *, quiet: bool, no_color: bool) -> Loaded:
    """Find and load a model; tell on stderr when the built-in one stands in for a real one."""
    from localv4.library import installed

    model = installed.resolve(reference)
    was_chosen = reference or os.environ.get("LOCALV4_MODEL")
    if model.source == "embedded" and not was_chosen and not quiet:
        note(DEMO_NOTE)

    def load() -> "Engine":
        # the import is slow as well: it belongs to the part that Ctrl-C can end at once
        from localv4.engine.engine import COMPILING, COMPILING_FOR_GPU, Engine
        from localv4.kernels.bus_error import end_with_a_line
        from localv4.kernels.compiler import can_keep

        def report(phase: str, done: int, total: int) -> None:
            if phase in (COMPILING, COMPILING_FOR_GPU) and done == 0:
                if phase == COMPILING and not (can_keep() or quiet):
                    warn(
                        f"cannot write to {paths.cache_dir()}: every run compiles its kernels anew"
                    )
                progress.announce(phase)
            progress(phase, done, total)

        engine = Engine.load(model.path, setup, on_progress=report)
        end_with_a_line()
        return engine

    with Progress(quiet=quiet, no_color=no_color) as progress:
        loaded = Loaded(worker.call(load), model)
    for line in loaded.fresh_notes() if not quiet else ():
        note(line)
    return loaded


def note(text: str) -> None:
    """Tell the user something on stderr."""
    _say(f"note: {text}")


def warn(text: str) -> None:
    """Warn the user on stderr."""
    _say(f"warning: {text}")


def _say(text: str) -> None:
    """Write one line to stderr, broken between words where a terminal would break it anyhow."""
    line = terminal.sanitize_line(text)
    if terminal.is_terminal(sys.stderr):
        columns = shutil.get_terminal_size().columns
        line = "\n".join(textwrap.wrap(line, max(columns, 20), break_long_words=False))
    sys.stderr.write(f"{line}\n")
    sys.stderr.flush()
