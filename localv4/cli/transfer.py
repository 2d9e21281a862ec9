"""Bytes that go by, on stderr: a bar with speed and time left, or a plain line now and then."""

import sys
import threading
import time
from types import TracebackType
from typing import TYPE_CHECKING, Self

from localv4.cli import terminal
from localv4.cli.generation import format_bytes

if TYPE_CHECKING:
    from rich.progress import Progress as Bar

LINE_EVERY_S = 10.0
SPEED_OVER_S = 30.0
"""The speed of plain lines is that of so many seconds, or a little more."""


class Transfer:
    """Shows how many of `total` bytes are done; may be called from any thread.

    Nothing is shown when `quiet`; outside a terminal the first line comes after ten seconds.
    """

    def __init__(
        self, label: str, total: int, done: int = 0, *, quiet: bool, no_color: bool = False
    ) -> None:
        """Begin with `done` bytes that are here already and do not count for the speed."""
        self._label = terminal.sanitize_line(label)
        self._total = total
        self._done = done
        self._quiet = quiet
        self._no_color = no_color
        self._lock = threading.Lock()
        self._bar: Bar | None = None
        self._next_line_at = time.monotonic() + LINE_EVERY_S
        self._marks = [(time.monotonic(), done)]

    def __enter__(self) -> Self:
        if not self._quiet and terminal.can_move_cursor(sys.stderr):
            self._bar = self._make_bar()
            self._bar.add_task(self._label, total=self._total, completed=self._done)
            self._bar.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        with self._lock:
            self._quiet = True
            if self._bar is not None:
                self._bar.stop()

    def advance(self, nbytes: int) -> None:
        """Count bytes; a negative number takes back what has to be done again."""
        with self._lock:
            self._done += nbytes
            if self._quiet:
                return
            if self._bar is not None:
                self._bar.advance(self._bar.task_ids[0], nbytes)
            elif time.monotonic() >= self._next_line_at:
                self._next_line_at = time.monotonic() + LINE_EVERY_S
                self._write(self._plain_line(time.monotonic()))

    def note(self, text: str) -> None:
        """Write a line above the bar."""
        line = f"note: {terminal.sanitize_line(text)}"
        with self._lock:
            if self._quiet:
                return
            if self._bar is not None:
                self._bar.console.print(line, soft_wrap=True)
            else:
                self._write(line)

    def _write(self, line: str) -> None:
        sys.stderr.write(f"{line}\n")
        sys.stderr.flush()

    def _plain_line(self, now: float) -> str:
        self._marks.append((now, self._done))
        while len(self._marks) > 2 and now - self._marks[1][0] >= SPEED_OVER_S:
            del self._marks[0]
        then, before = self._marks[0]
        speed = max(0.0, (self._done - before) / max(now - then, 1e-3))
        percent = 100 * self._done // max(1, self._total)
        line = (
            f"{self._label}: {percent} %, {format_bytes(self._done)} of "
            f"{format_bytes(self._total)}, {format_bytes(int(speed))}/s"
        )
        left = (self._total - self._done) / speed if speed > 0 else 0.0
        return f"{line}, {format_seconds(left)} left" if left else line

    def _make_bar(self) -> "Bar":
        from rich.progress import BarColumn, ProgressColumn, Task, TextColumn, TimeRemainingColumn
        from rich.progress import Progress as Bar
        from rich.text import Text

        class Speed(ProgressColumn):
            def render(self, task: Task) -> Text:
                return Text(f"{format_bytes(int(task.speed or 0))}/s")

        class Done(ProgressColumn):
            def render(self, task: Task) -> Text:
                done, total = int(task.completed), int(task.total or 0)
                return Text(f"{format_bytes(done)} of {format_bytes(total)}")

        return Bar(
            TextColumn("{task.description}", markup=False),
            BarColumn(bar_width=None),
            Done(),
            Speed(),
            TextColumn("left", markup=False),
            TimeRemainingColumn(compact=True),
            console=terminal.make_console(sys.stderr, no_color=self._no_color),
            speed_estimate_period=SPEED_OVER_S,
            transient=True,
            redirect_stdout=False,
            redirect_stderr=False,
        )


def format_seconds(seconds: float) -> str:
    """Write a length of time with its two largest units."""
    whole = int(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    return f"{whole // 3600} h {whole % 3600 // 60} min"
