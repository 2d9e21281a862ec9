"""A quality card as a Markdown page, and as rows of `localv4 show`."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from localv4.cli.generation import format_bytes
from localv4.errors import BadFileError, NotFoundError

if TYPE_CHECKING:
    from localv4.engine.quality_card import BaseResult, Card, Figure

PLOT = "quality.svg"


def markdown(card: "Card", others: Sequence["Card"]) -> str:
    """Return the page: figures, the picture, what was compared, how to read and repeat it."""
    lines = [
        f"# Quality of {plain(card.model)}",
        "",
        f"{format_bytes(card.bytes)} of weights, {format_bytes(card.bytes_per_token)} read per "
        f"token; arithmetic `{card.numerics}`, measured with {card.tool}.",
        f"Text: {plain(card.text.name)}, {card.text.tokens} tokens, "
        f"{'BOS first' if card.bos else 'no BOS'}, SHA-256 `{card.text.sha256[:16]}...`",
        "",
        f"![Quality against bytes per token, perplexity against position]({PLOT})",
        "",
        "## Perplexity",
        "",
        *_perplexity(card),
    ]
    if card.base is not None:
        lines += ["", f"## Divergence from {plain(card.base.name)}", "", *_divergence(card.base)]
    if others:
        lines += ["", "## Beside others", "", *_beside([card, *others])]
    return "\n".join([*lines, "", *_reading(card), ""])


def section(model: Path) -> list[tuple[str, str]]:
    """Return rows about the quality card of a model, none where it has no card."""
    from localv4.engine.quality_card import card_folder, manifest_digest, read_card

    folder = card_folder(model)
    try:
        card = read_card(folder)
    except NotFoundError:
        return []
    except BadFileError as error:
        return [("card", error.message)]
    rows = [
        (f"perplexity @ {one.context}", f"{number(one.perplexity)}, {plain(card.text.name)}")
        for one in card.perplexity
    ]
    if card.base is not None:
        found, name = card.base.divergence, f"from {plain(card.base.name)}"
        rows.append(("divergence", f"{number(found.mean, 1, 6)} nats {name}"))
        rows.append(("same likeliest token", f"{number(found.same_top, 100, 2)} %"))
    rows.append(("read per token", format_bytes(card.bytes_per_token)))
    if card.manifest != manifest_digest(model):
        rows.append(("attention", "measured before the model was changed"))
    return [*rows, ("card", str(folder / "README.md"))]


def document(model: Path) -> dict[str, Any] | None:
    """Return the quality card of a model for JSON, None where it has none that can be read."""
    from localv4.engine.quality_card import card_folder, read_card

    try:
        return read_card(card_folder(model)).model_dump(mode="json", by_alias=True)
    except (NotFoundError, BadFileError):
        return None


def plain(text: str) -> str:
    """Return a name from a file without anything that Markdown or HTML would take for a mark."""
    return "".join(char if char.isalnum() or char in " .-_:,/" else "?" for char in text)


def number(figure: "Figure | None", scale: float = 1.0, digits: int = 3) -> str:
    """Write a figure with its error."""
    if figure is None or figure.value is None:
        return ""
    value, error = scale * figure.value, figure.standard_error
    if error is None:
        return f"{value:.{digits}f}"
    return f"{value:.{digits}f} ± {scale * error:.{digits}f}"


def _perplexity(card: "Card") -> Iterator[str]:
    yield "| context | windows | tokens | perplexity | rounding noise alone |"
    yield "|---:|---:|---:|---:|---:|"
    for one in card.perplexity:
        noise = number(one.rounding_floor.relative_change, 100)
        cells = (one.context, one.windows, one.tokens, number(one.perplexity))
        yield f"| {' | '.join(map(str, cells))} | {noise and noise + ' %'} |"


def _divergence(base: "BaseResult") -> Iterator[str]:
    found, floor = base.divergence, base.rounding
    columns = [found] if floor is None else [found, floor]
    yield f"| windows of {base.context} | measured |{' rounding noise alone |' if floor else ''}"
    yield "|---|" + "---:|" * len(columns)
    rows = [("mean, nats", [number(one.mean, 1, 6) for one in columns])]
    for key in found.percentiles:
        name = "median" if key == "50" else f"{plain(key)} %"
        rows.append((name, [f"{one.percentiles.get(key, 0.0):.6f}" for one in columns]))
    rows += [
        ("maximum", [f"{one.maximum:.6f}" for one in columns]),
        ("same likeliest token, %", [number(one.same_top, 100, 2) for one in columns]),
        ("RMS of Δp, %", [number(one.rms_delta_p, 100) for one in columns]),
        ("mean Δp, %", [number(one.mean_delta_p, 100) for one in columns]),
        ("perplexity ratio", [number(one.perplexity_ratio, 1, 5) for one in columns]),
    ]
    for name, cells in rows:
        yield f"| {name} | {' | '.join(cells)} |"


def _beside(cards: Sequence["Card"]) -> Iterator[str]:
    """Yield a table of all cards, by the bytes of a token."""
    last = max(range(len(cards[0].perplexity)), key=lambda i: cards[0].perplexity[i].context)
    size = cards[0].perplexity[last].context
    yield (
        f"| model | numerics | size | bytes per token | perplexity @ {size} | divergence | "
        "same token, % |"
    )
    yield "|---|---|---:|---:|---:|---:|---:|"
    for card in sorted(cards, key=lambda card: card.bytes_per_token):
        known = card.base if card is cards[0] or card.has_base_of(cards[0]) else None
        found = None if known is None else known.divergence
        name = plain(card.model)
        cells = (
            f"**{name}**" if card is cards[0] else name,
            card.numerics,
            format_bytes(card.bytes),
            format_bytes(card.bytes_per_token),
            number(card.perplexity[last].perplexity),
            "" if found is None else number(found.mean, 1, 6),
            "" if found is None else number(found.same_top, 100, 2),
        )
        yield f"| {' | '.join(cells)} |"


def _reading(card: "Card") -> Iterator[str]:
    yield "## How to read this"
    yield ""
    yield (
        "Perplexity is exp of the mean loss over the second half of windows side by side, as "
        "llama-perplexity has it; divergences are Kullback-Leibler, from the base, in nats. "
        "± is one standard error. *Rounding noise alone* is the same model with the gains of all "
        "norms moved by one unit in their last place: differences of that size mean nothing. "
        "Formulas: docs/evaluation.md of localv4."
    )
    yield ""
    sizes = ",".join(str(one.context) for one in card.perplexity)
    base = f" --base-model {plain(card.base.name)}" if card.base is not None else ""
    yield f"    localv4 eval card -m {plain(card.model)}{base} -c {sizes}"
