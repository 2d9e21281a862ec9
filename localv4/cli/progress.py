"""Progress of long steps on stderr: a bar on a terminal, now and then a plain line elsewhere."""

import sys
import threading
import time
from types import TracebackType
from typing import TYPE_CHECKING, Self

from localv4.cli import terminal

if TYPE_CHECKING:
    from rich.progress import Progress as Bar
    from rich.progress import TaskID

# Seconds. What is quicker than this needs no bar, or no line; later lines come this far apart.
BAR_AFTER_S = 0.5
LINE_AFTER_S = 3.0
LINE_EVERY_S = 10.0


class Progress:
    """Reports (phase, done, total) on stderr; may be called from any thread."""

    def __init__(self, *, quiet: bool, no_color: bool = False) -> None:
        self._quiet = quiet
        self._no_color = no_color
        self._bar: Bar | None = None
        self._tasks: dict[str, TaskID] = {}
        self._lock = threading.Lock()
        self._shows_bar = terminal.can_move_cursor(sys.stderr)
        self._next_line_at = time.monotonic() + (BAR_AFTER_S if self._shows_bar else LINE_AFTER_S)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def __call__(self, phase: str, done: int, total: int) -> None:
        """Show that `done` of `total` steps of a phase are done."""
        with self._lock:
            if self._quiet or (self._bar is None and time.monotonic() < self._next_line_at):
                return
            if self._shows_bar:
                self._draw(phase, done, total)
            else:
                self._next_line_at = time.monotonic() + LINE_EVERY_S
                percent = 100 * done // max(1, total)
                sys.stderr.write(f"{phase}: {percent} %\n")
                sys.stderr.flush()

    def announce(self, phase: str) -> None:
        """Show at once that a phase begins that is known to be long."""
        with self._lock:
            self._next_line_at = 0.0
        self(phase, 0, 1)

    def close(self) -> None:
        """Remove the bar; nothing is shown from now on."""
        with self._lock:
            self._quiet = True
            if self._bar is not None:
                self._bar.stop()
                self._bar = None

    def _draw(self, text: str, done: int, total: int) -> None:
        if self._bar is None:
            self._bar = self._make_bar()
            self._bar.start()
        if text not in self._tasks:
            for task in self._tasks.values():
                self._bar.update(task, visible=False)
            self._tasks[text] = self._bar.add_task(text, total=total)
        self._bar.update(self._tasks[text], completed=done, total=total)

    def _make_bar(self) -> "Bar":
        from rich.progress import BarColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
        from rich.progress import Progress as Bar

        return Bar(
            TextColumn("{task.description}", markup=False),
            BarColumn(bar_width=None),
            TextColumn("{task.percentage:>3.0f}%", markup=False),
            TimeElapsedColumn(),  # moves during the longest step: nothing hangs
            TextColumn("left", markup=False),
            TimeRemainingColumn(compact=True),
            console=terminal.make_console(sys.stderr, no_color=self._no_color),
            transient=True,
            redirect_stdout=False,
            redirect_stderr=False,
        )
