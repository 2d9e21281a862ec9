"""Progress of a conversion on stderr: a bar on a terminal, elsewhere a line now and then."""

import sys
import time
from collections import deque
from types import TracebackType
from typing import TYPE_CHECKING, Self

from localv4.cli import terminal

if TYPE_CHECKING:
    from rich.progress import Progress as Bar
    from rich.progress import TaskID

    from quant.task import Progress

LINE_EVERY_S = 10.0
DRAW_EVERY_S = 0.1
WINDOW_S = 60.0
"""The speed is that of the last minute: the first part waits for the compiler."""


class QuantizeProgress:
    """Reports bytes, tensors, speed, the time that is left, and the error so far."""

    def __init__(self, *, quiet: bool, no_color: bool = False) -> None:
        self._quiet = quiet
        self._no_color = no_color
        self._shows_bar = terminal.can_move_cursor(sys.stderr)
        self._bar: Bar | None = None
        self._task: TaskID | None = None
        self._seen: deque[tuple[float, int]] = deque()
        self._next_at = time.monotonic() + self._pause

    @property
    def _pause(self) -> float:
        return DRAW_EVERY_S if self._shows_bar else LINE_EVERY_S

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._bar is not None:
            self._bar.stop()

    def __call__(self, progress: "Progress") -> None:
        """Show how far the conversion is, if it is time to."""
        now = time.monotonic()
        if not self._seen:
            self._seen.append((now, progress.bytes_done))
        if self._quiet or now < self._next_at:
            return
        self._next_at = now + self._pause
        self._seen.append((now, progress.bytes_done))
        while len(self._seen) > 2 and now - self._seen[0][0] > WINDOW_S:
            self._seen.popleft()
        text = self._text(progress)
        if self._shows_bar:
            self._draw(text, progress)
        else:
            sys.stderr.write(text + "\n")
            sys.stderr.flush()

    def _text(self, progress: "Progress") -> str:
        from localv4.cli.generation import format_bytes

        parts = [
            f"{format_bytes(progress.bytes_done)} of {format_bytes(progress.bytes_total)}",
            f"{progress.tensors_done} of {progress.tensors_total} tensors",
        ]
        (first_at, first), (last_at, last) = self._seen[0], self._seen[-1]
        done, seconds = last - first, last_at - first_at
        if done > 0 and seconds > 1:
            left = (progress.bytes_total - progress.bytes_done) * seconds / done
            parts.append(f"{format_bytes(int(done / seconds))}/s")
            parts.append(f"{format_duration(left)} left")
        error = progress.errors.relative()
        if error > 0:
            parts.append(f"error {100 * error:.2f} %")
        return ", ".join(parts)

    def _draw(self, text: str, progress: "Progress") -> None:
        if self._bar is None or self._task is None:
            self._bar = self._make_bar()
            self._task = self._bar.add_task(text, total=progress.bytes_total)
            self._bar.start()
        self._bar.update(self._task, description=text, completed=progress.bytes_done)

    def _make_bar(self) -> "Bar":
        from rich.progress import BarColumn, TextColumn
        from rich.progress import Progress as Bar

        return Bar(
            TextColumn("{task.description}", markup=False),
            BarColumn(bar_width=None),
            TextColumn("{task.percentage:>3.0f}%", markup=False),
            console=terminal.make_console(sys.stderr, no_color=self._no_color),
            transient=True,
            redirect_stdout=False,
            redirect_stderr=False,
        )


def format_duration(seconds: float) -> str:
    """Write a time roughly: 40 s, 12 min, 3 h 20 min."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 90 else f"{minutes // 60} h {minutes % 60} min"
