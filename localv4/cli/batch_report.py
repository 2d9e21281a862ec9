"""What the user sees of a batch: how far it is, and what it came to in the end."""

import json
import sys
import time
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

from localv4.cli import terminal
from localv4.cli.progress import LINE_EVERY_S

if TYPE_CHECKING:
    from rich.progress import Progress as Bar

    from localv4.engine.batching import BatchStats
    from localv4.engine.paging_stats import PagingMeter, PagingStats
    from localv4.engine.session import Network
    from localv4.library.registry import ApiPrice, ModelSpec

DRAWN_EVERY_S = 0.25
SHOWN_EXPERT_BYTES = 5_000_000  # for each token; less is no load for any disk
_MILLION = 1e6


class Report:
    """Counts the rows of one run; shows a line about them on stderr and a summary in the end.

    Of `rows` rows, `before` had their results already. As a context manager it keeps the line.
    """

    def __init__(
        self,
        output: Path,
        spec: "ModelSpec | None",
        rows: int,
        before: int,
        failed_before: int,
        quiet: bool,
        no_color: bool,
    ) -> None:
        self._output, self._spec = output, spec
        self._rows, self._before, self._failed_before = rows, before, failed_before
        self._quiet, self._no_color = quiet, no_color
        self._answered = self._failed = 0
        self._prompt_tokens = self._completion_tokens = 0
        self._stats: BatchStats | None = None
        self._meter: PagingMeter | None = None
        self._start = time.monotonic()
        self._seconds = 0.0
        self._next_at = 0.0
        self._bar: Bar | None = None

    def watch(self, network: "Network", stats: "BatchStats") -> None:
        """Take speeds from an engine of this process."""
        from localv4.engine.paging_stats import PagingMeter

        self._stats, self._meter = stats, PagingMeter(network)

    def __enter__(self) -> Self:
        self._start = time.monotonic()
        self._next_at = self._start + LINE_EVERY_S
        if not self._quiet and terminal.can_move_cursor(sys.stderr):
            self._next_at = 0.0
            self._bar = _make_bar(self._no_color)
            self._bar.add_task("", total=self._rows, completed=self._before)
            self._bar.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._seconds = time.monotonic() - self._start
        if self._meter is not None:
            self._meter.stop()
        if self._bar is not None:
            self._bar.stop()
            self._bar = None

    def note(self, document: dict[str, Any]) -> None:
        """Count a row that has its result."""
        if document["response"] is None:
            self._failed += 1
            return
        self._answered += 1
        usage = document["response"]["body"]["usage"]
        self._prompt_tokens += usage["prompt_tokens"]
        self._completion_tokens += usage["completion_tokens"]

    def tick(self) -> None:
        """Show how far the batch is, now and then."""
        now = time.monotonic()
        if self._quiet or now < self._next_at:
            return
        if self._bar is not None:
            self._next_at = now + DRAWN_EVERY_S
            done = self._before + self._answered + self._failed
            self._bar.update(self._bar.task_ids[0], completed=done, description=self._line())
        else:
            self._next_at = now + LINE_EVERY_S
            sys.stderr.write(f"{self._progress()}, {self._line()}\n")
            sys.stderr.flush()

    def tell(self, text: str) -> None:
        """Say something on a line of its own; may be called from any thread."""
        if self._quiet:
            return
        line = f"note: {terminal.sanitize_line(text)}"
        if self._bar is not None:
            self._bar.console.print(line)  # above the line that is redrawn
        else:
            sys.stderr.write(f"{line}\n")
            sys.stderr.flush()

    def interrupted(self, command: str) -> None:
        """Say what is kept and how to go on."""
        if not self._quiet:
            sys.stderr.write(f"stopped: {self._progress()} are in {self._output}\n")
            sys.stderr.write(f"to go on: {terminal.sanitize_line(command)}\n")
            sys.stderr.flush()

    def finish(self, *, as_json: bool, stats: bool) -> None:
        """Write the summary: for people to stderr, as one JSON object to stdout."""
        if not self._quiet:
            lines = self._summary() + (self._details() if stats else [])
            sys.stderr.write("".join(f"{terminal.sanitize_line(line)}\n" for line in lines))
            sys.stderr.flush()
        if as_json:
            sys.stdout.write(json.dumps(self._document()) + "\n")

    # --- while it runs ---

    def _progress(self) -> str:
        return f"{self._before + self._answered + self._failed} of {self._rows} rows"

    def _line(self) -> str:
        """Return speed, remaining time, rows at work and what tokens cost the disk."""
        parts = [f"{self._speed():.1f} tok/s"]
        ended = self._answered + self._failed
        passed = time.monotonic() - self._start
        if ended:
            left = (self._rows - self._before - ended) * passed / ended
            parts.append(f"{_clock(left)} left")
        if self._stats is not None:
            parts.append(f"{self._stats.rows} at a time")
        if self._failed:
            parts.append(f"{self._failed} failed")
        read = self._expert_bytes_per_token()
        if read is not None and read >= SHOWN_EXPERT_BYTES:
            parts.append(f"experts {read / 1e9:.2f} GB/tok")
        return ", ".join(parts)

    def _speed(self) -> float:
        """Return the answer tokens per second of all rows together, over all of the time."""
        seconds = self._seconds or time.monotonic() - self._start
        made = self._stats.decoded_tokens if self._stats is not None else self._completion_tokens
        return made / seconds if seconds else 0.0

    def _paging(self) -> "PagingStats | None":
        return self._meter.stats() if self._meter is not None else None

    def _expert_bytes_per_token(self) -> float | None:
        """Return the bytes of experts read for each answer token; None where none are paged."""
        paging, stats = self._paging(), self._stats
        if paging is None or stats is None or not stats.decoded_tokens:
            return None
        counts = paging.counts.bytes
        return (counts["demand"] + counts["guess"]) / stats.decoded_tokens

    # --- in the end ---

    def _summary(self) -> list[str]:
        if self._before == self._rows:
            done = f"nothing to do: all of {self._rows} rows are in {self._output}"
            return [done, *self._again()]
        ended = f"{self._answered} of {self._rows - self._before} rows answered"
        notes = [f"{self._failed} failed"] if self._failed else []
        notes += [f"{self._before} were done before"] if self._before else []
        first = f"{ended} ({', '.join(notes)})" if notes else ended
        lines = [f"{first} in {_clock(self._seconds)}: {self._output}"]
        if self._answered:
            lines.append(
                f"{self._prompt_tokens} prompt tokens, {self._completion_tokens} answer tokens, "
                f"{self._speed():.1f} tok/s"
            )
        gpu = self._meter.gpu_stats() if self._meter is not None else None
        if gpu is not None and gpu.warning is not None:
            lines.append(gpu.warning)
        cost, price = self._cost(), _price(self._spec)
        if cost is not None and price is not None and self._answered:
            lines.append(
                f"at the price of the maker's API ({price.as_of}, "
                f"{price.input_cache_miss:g} $ and {price.output:g} $ per million): {cost:.4f} $"
            )
        return lines + self._again()

    def _again(self) -> list[str]:
        """Return how rows that failed in an earlier run get another try, if there are any."""
        if not self._failed_before:
            return []
        rows = "1 row" if self._failed_before == 1 else f"{self._failed_before} rows"
        return [f"{rows} failed before; without their lines in the output they are tried again"]

    def _details(self) -> list[str]:
        """Return what held for all rows together."""
        from localv4.cli.generation import format_bytes
        from localv4.engine.machine import peak_resident_bytes

        stats = self._stats
        if stats is None:
            return []
        read = stats.read_tokens / stats.read_s if stats.read_s else 0.0
        parts = [
            f"prompts {stats.read_tokens} tok, {read:.1f} tok/s (+{stats.reused_tokens} reused)",
            f"gen {stats.decoded_tokens} tok, {stats.decode_tok_s:.1f} tok/s",
            f"{stats.rows_per_step:.1f} rows at a time",
            f"peak RSS {format_bytes(peak_resident_bytes())}",
        ]
        lines = [" | ".join(parts)]
        if stats.paused:
            lines.append(f"{stats.paused} times a row waited for memory")
        paging, bytes_per_token = self._paging(), self._expert_bytes_per_token()
        if paging is not None and bytes_per_token is not None:
            room = f"{format_bytes(paging.resident_bytes)} of {format_bytes(paging.capacity_bytes)}"
            lines.append(f"experts {room} | read {bytes_per_token / 1e9:.3f} GB per token")
        return lines + self._gpu_details(stats.decoded_tokens)

    def _gpu_details(self, tokens: int) -> list[str]:
        """Return what a GPU did; nothing where none helps."""
        from localv4.cli.generation import format_bytes

        gpu = self._meter.gpu_stats() if self._meter is not None else None
        if gpu is None:
            return []
        taken = f"{format_bytes(gpu.used_bytes)} of {format_bytes(gpu.total_bytes)}"
        uploaded = gpu.uploaded_bytes / max(1, tokens) / 1e9
        return [f"{gpu.name}: {taken} | {uploaded:.3f} GB of experts uploaded per token"]

    def _cost(self) -> float | None:
        """Return what the maker's API would have asked in US dollars, None if unknown."""
        price = _price(self._spec)
        if price is None:
            return None
        reused = self._stats.reused_tokens if self._stats is not None else 0
        hits = min(reused, self._prompt_tokens)
        parts = (
            hits * price.input_cache_hit,
            (self._prompt_tokens - hits) * price.input_cache_miss,
            self._completion_tokens * price.output,
        )
        return sum(parts) / _MILLION

    def _document(self) -> dict[str, Any]:
        stats = self._stats
        return {
            "output": str(self._output),
            "rows": self._rows,
            "done_before": self._before,
            "answered": self._answered,
            "failed": self._failed,
            "failed_before": self._failed_before,
            "prompt_tokens": self._prompt_tokens,
            "completion_tokens": self._completion_tokens,
            "seconds": self._seconds,
            "tok_s": self._speed(),
            "reused_tokens": stats.reused_tokens if stats is not None else None,
            "decode_tok_s": stats.decode_tok_s if stats is not None else None,
            "rows_at_a_time": stats.rows_per_step if stats is not None else None,
            "expert_bytes_per_token": self._expert_bytes_per_token(),
            "api_cost_usd": self._cost(),
        }


def _price(spec: "ModelSpec | None") -> "ApiPrice | None":
    """Return the price of the model, or of the one that it was converted from."""
    from localv4.library.registry import load_registry

    if spec is None or spec.api_price is not None or spec.base is None:
        return spec.api_price if spec is not None else None
    base = load_registry().models.get(spec.base)
    return base.api_price if base is not None else None


def _clock(seconds: float) -> str:
    """Write a time as 0:05, 12:34 or 1:23:45."""
    whole = round(seconds)
    hours, minutes = whole // 3600, whole // 60 % 60
    start = f"{hours}:{minutes:02}" if hours else f"{minutes}"
    return f"{start}:{whole % 60:02}"


def _make_bar(no_color: bool) -> "Bar":
    from rich.progress import BarColumn, MofNCompleteColumn, TextColumn
    from rich.progress import Progress as Bar

    return Bar(
        BarColumn(bar_width=20),
        MofNCompleteColumn(),
        TextColumn("rows, {task.description}", markup=False),
        console=terminal.make_console(sys.stderr, no_color=no_color),
        transient=True,
        redirect_stdout=False,
        redirect_stderr=False,
    )
