"""The picture of a replay: hit rate and bytes read per token against memory for experts."""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from localv4.cli.picture import BLUE, GREY, ORANGE, TEXT, save_figure, set_style, set_title

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from localv4.cli.tune import Report

SIZE_INCHES = (10.4, 4.4)
VIOLET = "#8a6bb8"
# colour, dashes, width, label of each curve; also apart in grey
CURVES = {
    "optimal": (GREY, (4, 2), 1.3, "optimum: knows the future"),
    "decay": (BLUE, (), 2.2, "decay (default)"),
    "lru": (ORANGE, (), 1.5, "lru"),
    "lfu": (VIOLET, (1, 1), 1.5, "lfu"),
}


@dataclass(frozen=True, slots=True)
class Units:
    """What memory and reads are told in: bytes of each, and their names."""

    memory: float
    reads: float
    memory_name: str
    reads_name: str


LARGE, SMALL = Units(2**30, 1e9, "GiB", "GB"), Units(2**20, 1e6, "MiB", "MB")


def units_of(report: "Report") -> Units:
    """Return the units that suit a model: those of toys are smaller."""
    return LARGE if report.total_bytes >= LARGE.memory else SMALL


def draw(report: "Report", path: Path) -> None:
    """Write the picture; raises LocalV4Error if that fails."""
    save_figure(make_figure(report), path)


def make_figure(report: "Report") -> "Figure":
    """Return the picture: hits on the left, reading on the right."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=SIZE_INCHES, layout="constrained")
    hits, reads = figure.subplots(1, 2)
    units = units_of(report)
    for policy, (color, dashes, width, label) in CURVES.items():
        outcomes = report.replay.outcomes[policy]
        memory = [outcome.capacity_bytes / units.memory for outcome in outcomes]
        style = {"color": color, "dashes": dashes, "linewidth": width, "label": label}
        hits.plot(memory, [100 * o.hits for o in outcomes], **style)
        reads.plot(memory, [o.bytes_read / units.reads for o in outcomes], **style)
    _finish(hits, report, "Experts found in memory", "% of all uses")
    hits.set_ylim(top=101)
    _finish(reads, report, "Read from the disk", f"{units.reads_name} per token")
    reads.set_ylim(bottom=0)
    _mark(reads, report)
    hits.legend(loc="lower right", frameon=False, fontsize=8.5, labelcolor=TEXT)
    set_title(figure, f"{report.trace.head.model}: {report.replay.scored:,} generated tokens")
    return figure


def _finish(axes: "Axes", report: "Report", title: str, unit: str) -> None:
    axes.set_title(title, fontsize=10.5, loc="left", color=TEXT)
    units = units_of(report)
    axes.set_xlabel(f"{units.memory_name} of memory for experts", color=TEXT, fontsize=9.5)
    axes.set_ylabel(unit, color=TEXT, fontsize=9.5)
    axes.set_xlim(0, report.total_bytes / units.memory)
    set_style(axes)


def _mark(axes: "Axes", report: "Report") -> None:
    """Mark the amounts of memory that were asked for, and what 16 GiB more make of them."""
    units = units_of(report)
    for capacity in report.asked:
        now, then = report.at(capacity), report.at(report.more(capacity))
        start = (now.capacity_bytes / units.memory, now.bytes_read / units.reads)
        end = (then.capacity_bytes / units.memory, then.bytes_read / units.reads)
        axes.plot([start[0], end[0]], [start[1], end[1]], "o", color=BLUE, markersize=5.5)
        if end == start:
            continue
        more = (then.capacity_bytes - capacity) / units.memory
        axes.annotate(
            f"{more:.3g} {units.memory_name} more:\n"
            f"{start[1]:.2f} to {end[1]:.2f} {units.reads_name}",
            ((start[0] + end[0]) / 2, max(start[1], end[1])),
            xytext=(10, 18),
            textcoords="offset points",
            fontsize=8.5,
            color=BLUE,
        )
