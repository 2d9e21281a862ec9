"""The picture of a quality card: quality against bytes per token, perplexity against position."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from localv4.cli.picture import BLUE, GREY, ORANGE, TEXT, drawn, plain_text, set_style, set_title

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from localv4.engine.quality_card import BaseResult, Card, ContextResult

OWN, OTHER, FLOOR = BLUE, GREY, ORANGE
SHADES = (BLUE, ORANGE, "#3a8f5c", "#8a5aa8", GREY)
INCHES = (10.4, 4.4)
NAME_LENGTH = 24


def draw(card: "Card", others: Sequence["Card"]) -> bytes:
    """Return the picture as SVG; the same cards make the same bytes."""
    return drawn(make_figure(card, others), "svg")


def make_figure(card: "Card", others: Sequence["Card"]) -> "Figure":
    """Return the picture of a card beside comparable ones."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=INCHES, layout="constrained")
    left, right = figure.subplots(1, 2, width_ratios=(1, 1.15))
    _draw_quality(left, card, others)
    _draw_positions(right, card)
    for axes in (left, right):
        set_style(axes)
    name, text = (_cut(each) for each in (card.model, card.text.name))
    set_title(figure, f"{name}, {card.numerics}; text: {text}")
    return figure


@dataclass(frozen=True, slots=True)
class Point:
    """A model in the left panel."""

    label: str
    nbytes: int
    value: float
    error: float
    is_own: bool


def points(card: "Card", others: Sequence["Card"]) -> list[Point]:
    """Return the models with figures that can be compared: divergences, else perplexities."""
    found = []
    for one in [card, *others]:
        if card.base is None:
            figure = one.perplexity[_longest(card)].perplexity
        elif one is card or one.has_base_of(card):
            assert one.base is not None
            figure = one.base.divergence.mean
        else:
            continue
        if figure.value is not None:
            label = f"{_short(one.model)}\n{one.numerics}"
            error = figure.standard_error or 0.0
            found.append(Point(label, one.bytes_per_token, figure.value, error, one is card))
    return found


def _draw_quality(axes: "Axes", card: "Card", others: Sequence["Card"]) -> None:
    found = points(card, others)
    unit, name = _unit(found)
    for point in found:
        color = OWN if point.is_own else OTHER
        axes.errorbar(
            point.nbytes / unit,
            point.value,
            yerr=point.error,
            fmt="o",
            markersize=7 if point.is_own else 5.5,
            color=color,
            elinewidth=1.2,
            capsize=3,
            zorder=3,
        )
    if card.base is None:
        _draw_perplexity_axis(axes, card)
    else:
        _draw_divergence_axis(axes, card, [point.value for point in found])
        _draw_base(axes, card.base, unit)
    _label(axes, found, unit)
    axes.set_xlabel(f"{name} of weights read per token", color=TEXT, fontsize=9.5)
    axes.margins(x=0.3, y=0.2)


def _unit(found: Sequence[Point]) -> tuple[int, str]:
    """Return the unit of the bytes of a token, and its name."""
    largest = max((point.nbytes for point in found), default=0)
    return (1 << 30, "GiB") if largest >= 1 << 30 else (1 << 20, "MiB")


def _draw_base(axes: "Axes", base: "BaseResult", unit: int) -> None:
    """Mark how much the base reads."""
    place = base.bytes_per_token / unit
    axes.axvline(place, color=OTHER, linestyle=(0, (1, 2)), linewidth=1.2, zorder=1)
    axes.annotate(
        "base",
        (place, 0.97),
        xycoords=("data", "axes fraction"),
        xytext=(4, 0),
        textcoords="offset points",
        fontsize=8,
        color=OTHER,
        va="top",
    )


def _draw_perplexity_axis(axes: "Axes", card: "Card") -> None:
    size = card.perplexity[_longest(card)].context
    axes.set_title(f"Perplexity in windows of {size}", fontsize=10.5, loc="left", color=TEXT)
    axes.set_ylabel("perplexity (lower is better)", color=TEXT, fontsize=9.5)


def _draw_divergence_axis(axes: "Axes", card: "Card", values: Sequence[float]) -> None:
    assert card.base is not None
    name = f"{_short(card.base.name)}, {card.base.numerics}"
    axes.set_title(f"Divergence from {name}", fontsize=10.5, loc="left", color=TEXT)
    axes.set_ylabel("mean KLD in nats (lower is better)", color=TEXT, fontsize=9.5)
    floor = None if card.base.rounding is None else card.base.rounding.mean.value
    if floor is not None and floor > 0:
        axes.axhline(floor, color=FLOOR, linestyle=(0, (5, 3)), linewidth=1.4, zorder=1)
        axes.annotate(
            f"rounding noise of {_short(card.model)}",
            (0.02, floor),
            xycoords=("axes fraction", "data"),
            xytext=(0, 4),
            textcoords="offset points",
            fontsize=8,
            color=FLOOR,
        )
    if all(value > 0 for value in values):
        axes.set_yscale("log")


def _label(axes: "Axes", found: Sequence[Point], unit: int) -> None:
    """Write names beside their points, on the side where the next one is farther."""
    ordered = sorted(found, key=lambda point: point.nbytes)
    for index, point in enumerate(ordered):
        crowded = index + 1 < len(ordered) and ordered[index + 1].nbytes < 1.25 * point.nbytes
        axes.annotate(
            point.label,
            (point.nbytes / unit, point.value),
            xytext=(-8 if crowded else 8, 0),
            textcoords="offset points",
            ha="right" if crowded else "left",
            va="center",
            fontsize=8,
            color=OWN if point.is_own else OTHER,
            fontweight="bold" if point.is_own else "normal",
            zorder=4,
        )


def _draw_positions(axes: "Axes", card: "Card") -> None:
    """Draw the curves of all window sizes, with a band of one standard error."""
    ordered = sorted(card.perplexity, key=lambda one: one.context)
    for color, one in zip(SHADES, ordered[-len(SHADES) :], strict=False):
        _draw_curve(axes, one, color)
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.set_title("Perplexity by the tokens before", fontsize=10.5, loc="left", color=TEXT)
    axes.set_xlabel("tokens of the window before the predicted one", color=TEXT, fontsize=9.5)
    axes.set_ylabel("perplexity", color=TEXT, fontsize=9.5)
    _plain_ticks(axes, ordered[-1])
    legend = axes.legend(frameon=False, fontsize=8.5, labelcolor=TEXT, title="± 1 standard error")
    legend.get_title().set(fontsize=8.5, color=TEXT)


def _draw_curve(axes: "Axes", one: "ContextResult", color: str) -> None:
    known = [point for point in one.curve if point.perplexity.value is not None]
    middle = [(point.tokens_before[0] * point.tokens_before[1]) ** 0.5 for point in known]
    values = [point.perplexity.value or 0.0 for point in known]
    errors = [point.perplexity.standard_error or 0.0 for point in known]
    pairs = list(zip(values, errors, strict=True))
    axes.plot(
        middle,
        values,
        color=color,
        marker="o",
        markersize=4,
        linewidth=1.8,
        label=f"windows of {one.context}: {_total(one)}",
        zorder=3,
    )
    axes.fill_between(
        middle,
        [max(value - error, value / 2) for value, error in pairs],
        [value + error for value, error in pairs],
        color=color,
        alpha=0.16,
        linewidth=0,
    )


def _total(one: "ContextResult") -> str:
    return "" if one.perplexity.value is None else f"{one.perplexity.value:.4g}"


def _plain_ticks(axes: "Axes", longest: "ContextResult") -> None:
    """Write positions and perplexities as people do, not as powers."""
    from matplotlib.ticker import FixedLocator, FuncFormatter, LogLocator, NullFormatter

    ends = [point.tokens_before[0] for point in longest.curve]
    axes.xaxis.set_major_locator(FixedLocator([end for end in ends if end > 1]))
    axes.xaxis.set_major_formatter(FuncFormatter(_whole))
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.yaxis.set_major_locator(LogLocator(base=10, subs=(1.0, 2.0, 3.0, 5.0, 7.0)))
    axes.yaxis.set_major_formatter(FuncFormatter(_whole))
    axes.yaxis.set_minor_formatter(NullFormatter())


def _whole(value: float, place: Any) -> str:
    del place
    return f"{value:,.0f}" if value >= 10 else f"{value:g}"


def _longest(card: "Card") -> int:
    return max(range(len(card.perplexity)), key=lambda index: card.perplexity[index].context)


def _short(name: str) -> str:
    return plain_text(_cut(name))


def _cut(name: str) -> str:
    """Return a name that has room in a picture."""
    return name if len(name) <= NAME_LENGTH else f"{name[: NAME_LENGTH - 3]}..."
