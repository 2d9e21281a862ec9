"""The picture of a benchmark: tokens per second against depth, beside the roof of memory."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import cycle
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from localv4.cli.picture import BLUE, GREY, ORANGE, TEXT, save_figure, set_style, set_title

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from localv4.cli.bench_report import Report
    from localv4.engine.measurement import CaseKind, Measurement, Series

OWN, PEER, ROOF = BLUE, ORANGE, GREY
MARKERS = "osD^vP*X"  # one for each size of a test
PANEL_INCHES, HEIGHT_INCHES = 5.2, 4.2
HEADROOM = 1.18
LABEL_SHARE = 0.075  # of the height of a panel: what a label and its distance need
Side = Literal["above", "below", "right"]
# Shift in points, horizontal and vertical alignment of a label beside its point.
LABELS: dict[Side, tuple[tuple[int, int], str, str]] = {
    "above": ((0, 6), "center", "bottom"),
    "below": ((0, -7), "center", "top"),
    "right": ((7, 0), "left", "center"),
}
TITLES = {"pp": "Reading a prompt", "tg": "Generating"}


def draw(report: "Report", path: Path) -> None:
    """Write the picture of the finished tests, if there are any; raises LocalV4Error."""
    if report.measurements:
        save_figure(make_figure(report), path)


def make_figure(report: "Report") -> "Figure":
    """Return the picture: a panel for reading and one for generating, whichever was measured."""
    from matplotlib.figure import Figure

    kinds = list(dict.fromkeys(m.case.kind for m in report.measurements))
    figure = Figure(figsize=(PANEL_INCHES * len(kinds), HEIGHT_INCHES), layout="constrained")
    panels = figure.subplots(1, len(kinds), squeeze=False)[0]
    for kind, axes in zip(kinds, panels, strict=True):
        measurements = [m for m in report.measurements if m.case.kind == kind]
        _draw_panel(axes, kind, measurements)
    set_title(figure, _title(report))
    return figure


def _title(report: "Report") -> str:
    from localv4.engine.machine import machine_facts

    benchmark = report.benchmark
    threads = f"{benchmark.threads} thread" + ("s" if benchmark.threads > 1 else "")
    return f"{report.model}, {benchmark.numerics}, {threads}, {machine_facts()['cpu']}"


@dataclass(frozen=True, slots=True)
class Curve:
    """One test on one engine at several depths."""

    label: str
    color: str
    marker: str
    points: "tuple[tuple[Measurement, Series], ...]"


def _curves(kind: "CaseKind", measurements: "Sequence[Measurement]") -> list[Curve]:
    """Return ours and the other engine's curves, those of larger tests last."""
    found = []
    engines: list[tuple[str, str, Callable[[Measurement], Series | None]]] = [
        ("localv4", OWN, lambda m: m.own),
        ("llama.cpp", PEER, lambda m: m.peer.series if m.peer is not None else None),
    ]
    for size, marker in zip(dict.fromkeys(m.case.tokens for m in measurements), cycle(MARKERS)):
        chosen = sorted((m for m in measurements if m.case.tokens == size), key=_depth)
        for engine, color, series_of in engines:
            pairs = [(m, series) for m in chosen if (series := series_of(m)) is not None]
            if pairs:
                found.append(Curve(f"{engine} {kind}{size}", color, marker, tuple(pairs)))
    return found


def _draw_panel(axes: "Axes", kind: "CaseKind", measurements: "Sequence[Measurement]") -> None:
    curves = _curves(kind, measurements)
    depths = sorted({m.case.depth for m in measurements})
    if len(depths) > 1:
        _draw_lines(axes, curves, depths)
    else:
        _draw_bars(axes, curves, depths[0])
    if kind == "tg":
        _draw_roof(axes, measurements)
    axes.set_title(TITLES[kind], fontsize=10.5, loc="left", color=TEXT)
    axes.set_ylabel("tokens per second", color=TEXT, fontsize=9.5)
    axes.set_ylim(0, axes.dataLim.y1 * HEADROOM)
    if len(depths) > 1:
        _label_points(axes, curves, depths)
    set_style(axes, grid="y")
    if axes.get_legend_handles_labels()[0]:
        axes.legend(
            loc="upper center",
            bbox_to_anchor=(0.5, -0.15),
            ncols=3 if kind == "tg" else 2,
            frameon=False,
            fontsize=8.5,
            labelcolor=TEXT,
        )


def _draw_lines(axes: "Axes", curves: Sequence[Curve], depths: Sequence[int]) -> None:
    """Draw medians as lines, and every sample as a faint point."""
    for curve in curves:
        for measurement, series in curve.points:
            _draw_samples(axes, measurement.case.depth, series, curve.color)
        axes.plot(
            [measurement.case.depth for measurement, _ in curve.points],
            [series.median for _, series in curve.points],
            color=curve.color,
            marker=curve.marker,
            markersize=5.5,
            linewidth=1.8,
            label=curve.label,
            zorder=3,
        )
    axes.set_xlabel("tokens in the context before", color=TEXT, fontsize=9.5)
    positive = [depth for depth in depths if depth > 0]
    if len(positive) > 1:  # by their logarithm, with a place for 0
        axes.set_xscale("symlog", base=2, linthresh=positive[0], linscale=1)
    axes.set_xticks(depths, [f"{depth:,}" for depth in depths])
    axes.minorticks_off()
    axes.margins(x=0.12)  # values have their place there


def _draw_bars(axes: "Axes", curves: Sequence[Curve], depth: int) -> None:
    """Draw medians of one depth as bars, and every sample as a point."""
    for place, curve in enumerate(curves):
        measurement, series = curve.points[0]
        axes.bar(place, series.median, width=0.62, color=curve.color, alpha=0.85, zorder=1)
        _draw_samples(axes, place, series, TEXT)
        axes.annotate(
            _text(measurement, series),
            (place, max(series.rates)),
            xytext=(0, 6),
            textcoords="offset points",
            ha="center",
            fontsize=8,
            color=curve.color,
        )
    names = [curve.label.replace(" ", "\n") for curve in curves]
    axes.set_xticks(range(len(curves)), names)
    axes.set_xlim(-0.7, len(curves) - 0.3)
    if depth:
        axes.set_xlabel(f"with {depth:,} tokens in the context before", color=TEXT, fontsize=9.5)


def _draw_samples(axes: "Axes", place: float, series: "Series", color: str) -> None:
    places = [place] * len(series.rates)
    axes.scatter(places, series.rates, s=9, color=color, alpha=0.35, linewidths=0, zorder=2)


def _label_points(axes: "Axes", curves: Sequence[Curve], depths: Sequence[int]) -> None:
    """Write medians beside their points."""
    from matplotlib.patheffects import withStroke

    room = LABEL_SHARE * axes.get_ylim()[1]
    for depth in depths:
        points = [
            (m, series, curve.color)
            for curve in curves
            for m, series in curve.points
            if m.case.depth == depth
        ]
        sides = label_sides([series.median for _, series, _ in points], room)
        for side, (measurement, series, color) in zip(sides, points, strict=True):
            shift, horizontal, vertical = LABELS[side]
            axes.annotate(
                _text(measurement, series),
                (depth, max(series.rates) if side == "above" else series.median),
                xytext=shift,
                textcoords="offset points",
                ha=horizontal,
                va=vertical,
                fontsize=8,
                color=color,
                path_effects=[withStroke(linewidth=2.5, foreground="white")],
                zorder=4,
            )


def label_sides(heights: Sequence[float], room: float) -> list[Side]:
    """Return where the label of each point of one depth has a place, `room` high.

    Above if nothing is close there, else below, else to the right, where the line may cross it.
    """
    sides: list[Side] = ["above"] * len(heights)
    ascending = sorted(range(len(heights)), key=heights.__getitem__)
    for place, index in enumerate(ascending[:-1]):
        if heights[ascending[place + 1]] - heights[index] < room:
            # twice the room: the next lower label may be above its point
            lower = heights[ascending[place - 1]] + 2 * room if place else room
            sides[index] = "below" if heights[index] > lower else "right"
    return sides


def _text(measurement: "Measurement", series: "Series") -> str:
    """Return a median, for ours with the share of the roof."""
    text = f"{series.median:.0f}" if series.median >= 100 else f"{series.median:.3g}"
    if series is measurement.own and measurement.read_share is not None:
        text += f" ({100 * measurement.read_share:.0f} %)"
    return text


def _draw_roof(axes: "Axes", measurements: "Sequence[Measurement]") -> None:
    """Draw what the read roof allows: it falls with depth, since the state is read as well."""
    best = {m.case.depth: m.roof_rate or 0.0 for m in sorted(measurements, key=_depth)}
    roof = max(m.read_roof for m in measurements) / 1e9
    look: dict[str, Any] = {
        "color": ROOF,
        "linestyle": (0, (5, 3)),
        "linewidth": 1.4,
        "label": f"read roof ({roof:.1f} GB/s)",
        "zorder": 1,
    }
    if len(best) > 1:
        axes.plot(list(best), list(best.values()), **look)
    else:
        axes.axhline(next(iter(best.values())), **look)


def _depth(measurement: "Measurement") -> int:
    return measurement.case.depth
