"""The plan of a conversion, for people and as JSON."""

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from localv4.cli import terminal

if TYPE_CHECKING:
    from quant.decision import Plan
    from quant.recipe import Recipe


def plan_document(plan: "Plan", recipe: "Recipe", source: str, target: Path) -> dict[str, Any]:
    """Return the plan as what `--json` prints."""
    from quant.report import row_of_class
    from quant.tensor_class import TensorClass

    there = {decision.kind for decision in plan.decisions}
    return {
        "source": source,
        "recipe": recipe.name,
        "output": str(target),
        "files": [{"name": name, "bytes": nbytes} for name, nbytes in plan.files],
        "source_bytes": plan.source_bytes,
        "bytes": plan.nbytes,
        "bytes_per_token": plan.bytes_per_token,
        "classes": [
            row_of_class(kind, plan.decisions, {}) for kind in TensorClass if kind in there
        ],
        "fallbacks": _fallbacks(plan),
    }


def print_plan(plan: "Plan", document: dict[str, Any], *, is_result: bool, no_color: bool) -> None:
    """Print the plan: on stdout where it is what was asked for, else as a note on stderr."""
    from localv4.cli.generation import format_bytes
    from localv4.cli.tables import print_table

    stream = sys.stdout if is_result else sys.stderr
    console = terminal.make_console(stream, no_color=no_color)
    rows = [_row(entry) for entry in document["classes"]]
    print_table(
        console,
        rows,
        header=("TENSORS", "MATRICES", "FROM", "TO", "SIZE", "WAS"),
        numbers=frozenset({1, 4, 5}),
    )
    for fallback in document["fallbacks"]:
        stream.write(terminal.sanitize_line(f"note: {fallback}") + "\n")
    total, was = format_bytes(plan.nbytes), format_bytes(plan.source_bytes)
    stream.write(
        f"{len(plan.files)} file{'s' if len(plan.files) > 1 else ''}, {total} (from {was}), "
        f"{format_bytes(plan.bytes_per_token)} read per token\n"
    )
    if "forecast" in document:
        stream.write(terminal.sanitize_line(document["forecast"]) + "\n")
    stream.write(terminal.sanitize_line(f"to {document['output']}") + "\n")
    stream.flush()


def _row(entry: dict[str, Any]) -> tuple[str, ...]:
    from localv4.cli.generation import format_bytes

    formats = entry["formats"]
    total = sum(formats.values())
    names = [
        name if count == total else f"{name} {100 * count / total:.0f} %"
        for name, count in sorted(formats.items(), key=lambda item: -item[1])
    ]
    exact = " (every value kept)" if entry["exact"] == entry["matrices"] else ""
    return (
        entry["class"],
        str(entry["matrices"]),
        ", ".join(entry["source"]),
        ", ".join(names) + exact,
        format_bytes(entry["bytes"]),
        format_bytes(entry["source_bytes"]),
    )


def _fallbacks(plan: "Plan") -> list[str]:
    """Return why matrices have not the first format that the recipe wishes, in a line for each."""
    found: dict[tuple[str, str, str], int] = {}
    for decision in plan.decisions:
        if decision.note:
            key = (decision.kind.value, decision.format, decision.note)
            found[key] = found.get(key, 0) + decision.count
    return [
        f"{count} of {kind} become {name}: {note}" for (kind, name, note), count in found.items()
    ]
