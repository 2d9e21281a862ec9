"""`localv4 tune`: what more memory, or another cache policy, would have done for a recorded run."""

import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from localv4.cli import options, terminal, worker
from localv4.cli.sizes import parse_bytes, parse_rate
from localv4.errors import UsageError

if TYPE_CHECKING:
    from localv4.paging.replay import Outcome, Replay
    from localv4.paging.trace import Trace

POLICIES = ("lru", "lfu", "decay", "optimal")
OURS = "decay"
RESIDENT = (0.05, 0.1, 0.15, 0.2, 0.27, 0.34, 0.45, 0.56, 0.67, 0.78, 0.9)
"""Shares of all experts at which the curves are computed."""

MORE_BYTES = 16 << 30
SYNTHETIC_TOKENS = 2600
MAX_SYNTHETIC_TOKENS = 20_000


class Synthetic(StrEnum):
    """Made-up routes for whoever has recorded none."""

    CALIBRATED = "calibrated"
    DIVERSE = "diverse"


@dataclass(frozen=True, slots=True)
class Report:
    """A replay, and the capacities that were asked for or stand for them."""

    trace: "Trace"
    replay: "Replay"
    asked: tuple[int, ...]
    disk: float | None  # bytes per second

    @property
    def total_bytes(self) -> int:
        """Bytes of all records."""
        return self.trace.head.experts * sum(self.trace.head.record_bytes)

    def at(self, capacity: int, policy: str = OURS) -> "Outcome":
        """Return what a policy does with a capacity that was replayed."""
        return next(o for o in self.replay.outcomes[policy] if o.capacity_bytes == capacity)

    def more(self, capacity: int) -> int:
        """Return the capacity with 16 GiB more, at most that of all records."""
        return min(capacity + MORE_BYTES, self.total_bytes)


def tune(
    trace: Annotated[
        Path | None,
        typer.Argument(
            metavar="TRACE",
            help="A file that localv4 run --trace-routes wrote.",
            show_default=False,
        ),
    ] = None,
    ram: Annotated[
        list[str] | None,
        typer.Option(
            "--ram",
            metavar="SIZE",
            help="Memory for experts to look at; several times if you like.",
        ),
    ] = None,
    expert_bytes: Annotated[
        str | None,
        typer.Option("--expert-bytes", metavar="SIZE", help="As if each expert had this size."),
    ] = None,
    assume_disk: options.AssumeDisk = None,
    synthetic: Annotated[
        Synthetic | None,
        typer.Option("--synthetic", metavar="STYLE", help="No trace: calibrated or diverse."),
    ] = None,
    tokens: Annotated[
        int,
        typer.Option(
            "--tokens", metavar="N", min=100, max=MAX_SYNTHETIC_TOKENS, help="Of --synthetic."
        ),
    ] = SYNTHETIC_TOKENS,
    seed: Annotated[
        int, typer.Option("--seed", metavar="N", min=0, max=2**63 - 1, help="Of --synthetic.")
    ] = 0,
    plot: Annotated[
        Path | None, typer.Option("--plot", metavar="FILE", help="Draw a .png or .svg picture.")
    ] = None,
    output_format: options.Format = options.OutputFormat.AUTO,
    as_json: options.Json = False,
    quiet: options.Quiet = False,
    no_color: options.NoColor = False,
) -> None:
    """Replay recorded routes: hit rate against memory for each cache policy and the optimum.

    Shows what more memory for experts would save. Nothing of the model is read.
    """
    from localv4.cli.progress import Progress

    if trace is not None and synthetic is not None:
        raise UsageError("give a trace or --synthetic, not both")
    if trace is None and synthetic is None:
        raise UsageError("give a trace or --synthetic", hint="localv4 tune --synthetic calibrated")
    asked = [parse_bytes(size, "--ram") for size in ram or []]
    size = parse_bytes(expert_bytes, "--expert-bytes") if expert_bytes else None
    disk = parse_rate(assume_disk, "--assume-disk") if assume_disk else None
    if plot is not None:
        from localv4.cli.picture import check_target

        check_target(plot)
    with Progress(quiet=quiet, no_color=no_color) as progress:
        report = worker.call(
            lambda: make_report(
                _routes(trace, synthetic, tokens, seed, size), asked, disk, progress
            )
        )
    if options.wants_json(output_format, as_json):
        terminal.print_json(document(report))
    else:
        print_report(report, no_color)
    if plot is not None:
        from localv4.cli.tune_plot import draw

        draw(report, plot)


def _routes(
    path: Path | None, synthetic: Synthetic | None, tokens: int, seed: int, size: int | None
) -> "Trace":
    """Return the trace, with another size of experts if one was given."""
    from localv4.paging.synthetic_routes import STYLES, synthetic_trace
    from localv4.paging.trace import read_trace

    if path is None:
        assert synthetic is not None
        trace = synthetic_trace(STYLES[synthetic.value], tokens, seed)
    else:
        trace = read_trace(path)
    if size is None:
        return trace
    sizes = tuple(size if nbytes else 0 for nbytes in trace.head.record_bytes)
    return replace(trace, head=replace(trace.head, record_bytes=sizes))


def make_report(
    trace: "Trace", asked: Sequence[int], disk: float | None, progress: Any = None
) -> Report:
    """Replay a trace. Raises UsageError for a capacity below what a token needs."""
    from localv4.cli.generation import format_bytes
    from localv4.paging.replay import least_bytes, replay

    total, least = trace.head.experts * sum(trace.head.record_bytes), least_bytes(trace)
    for capacity in asked:
        if capacity < least:
            raise UsageError(
                f"--ram {format_bytes(capacity)} is less than one token and a half needs",
                hint=f"--ram {least // 2**20 + 1}MiB or more",
            )
    chosen = [min(capacity, total) for capacity in asked] or [max(least, total // 3)]
    curve = [int(total * share) for share in RESIDENT if total * share >= least]
    more = [min(capacity + MORE_BYTES, total) for capacity in chosen]

    def report_progress(done: int, of: int) -> None:
        if progress is not None:
            progress("replaying", done, of)

    found = replay(trace, POLICIES, sorted({*chosen, *curve, *more, total}), report_progress)
    if found.scored == 0:
        raise UsageError("the trace holds too few generated tokens", hint="record a longer answer")
    return Report(trace, found, tuple(sorted(set(chosen))), disk)


def document(report: Report) -> dict[str, Any]:
    """Return the report as JSON values."""
    head = report.trace.head
    return {
        "model": head.model,
        "fingerprint": head.fingerprint,
        "tokens": len(report.trace.chosen),
        "scored_tokens": report.replay.scored,
        "uses_per_token": head.k * sum(size > 0 for size in head.record_bytes),
        "all_experts_bytes": report.total_bytes,
        "outcomes": [asdict(o) for row in report.replay.outcomes.values() for o in row],
        "more_memory": [_difference(report, capacity) for capacity in report.asked],
    }


def _difference(report: Report, capacity: int) -> dict[str, Any]:
    now, then = report.at(capacity), report.at(report.more(capacity))
    return {
        "capacity_bytes": capacity,
        "more_bytes": then.capacity_bytes - capacity,
        "bytes_read": now.bytes_read,
        "bytes_read_with_more": then.bytes_read,
    }


def print_report(report: Report, no_color: bool) -> None:
    """Print a table of memory and policies, and what more memory would save."""
    from rich.text import Text

    from localv4.cli.tables import print_table

    console = terminal.make_console(sys.stdout, no_color=no_color)
    head = report.trace.head
    title = f"{head.model}: {report.replay.scored:,} generated tokens counted"
    console.print(Text(terminal.sanitize_line(title), style="bold"))
    console.print()
    header = ["MEMORY", "OF ALL", *(name.upper() for name in POLICIES), "READS", "PER TOKEN"]
    if report.disk is not None:
        header.append("DISK ALLOWS")
    rows = [_row(report, outcome) for outcome in report.replay.outcomes[OURS]]
    print_table(console, rows, header=header, numbers=frozenset(range(len(header))))
    console.print()
    for capacity in report.asked:
        console.print(Text(terminal.sanitize_line(sentence(report, capacity))))


def _row(report: Report, ours: "Outcome") -> list[str]:
    from localv4.cli.generation import format_bytes

    hits = [f"{100 * report.at(ours.capacity_bytes, name).hits:.1f} %" for name in POLICIES]
    mark = "*" if ours.capacity_bytes in report.asked else ""
    cells = [mark + format_bytes(ours.capacity_bytes), f"{100 * ours.resident:.0f} %", *hits]
    cells += [f"{ours.misses:.1f}", _read(ours.bytes_read)]
    if report.disk is not None:
        cells.append(_tokens_per_s(ours.bytes_read, report.disk))
    return cells


def _read(count: float) -> str:
    from localv4.cli.generation import format_bytes

    return format_bytes(round(count))


def _tokens_per_s(nbytes: float, disk: float) -> str:
    """Return how many tokens a second a disk can feed, if it does nothing else."""
    return f"{disk / nbytes:.1f} tok/s" if nbytes > 0 else "any"


def sentence(report: Report, capacity: int) -> str:
    """Say what 16 GiB more than `capacity` would save."""
    from localv4.cli.generation import format_bytes

    now, then = report.at(capacity), report.at(report.more(capacity))
    size = format_bytes(capacity)
    start = f"With {size} for experts a token reads {_read(now.bytes_read)} from the disk"
    if then.capacity_bytes == capacity:
        return f"{size} hold all experts: nothing is read."
    more = format_bytes(then.capacity_bytes - capacity)
    if then.capacity_bytes == report.total_bytes:
        return f"{start}; {more} more would hold all experts."
    saved = 1 - then.bytes_read / now.bytes_read if now.bytes_read > 0 else 0.0
    text = f"{start}; {more} more would make it {_read(then.bytes_read)}, {100 * saved:.0f} % less"
    if report.disk is None:
        return f"{text}."
    rates = [_tokens_per_s(o.bytes_read, report.disk) for o in (now, then)]
    return f"{text}, and the disk would allow {rates[1]} instead of {rates[0]}."
