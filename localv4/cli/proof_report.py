"""What a proof of kept values found, for people and as JSON."""

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from localv4.cli import terminal
from localv4.errors import BadFileError

if TYPE_CHECKING:
    from quant.proof import Comparison, Proof

MAX_NAMES = 3


def proof_document(proof: "Proof") -> dict[str, Any]:
    """Return the proof as what `--json` prints: a line for each tensor."""
    return {
        "wrong_values": proof.wrong_values,
        "tensors": [
            {
                "name": item.name,
                "format": item.format,
                "state": item.state,
                "values": item.values,
                "different": item.different,
                "minus_zeros": item.minus_zeros,
            }
            for item in proof.tensors
        ],
    }


def print_proof(proof: "Proof", no_color: bool) -> None:
    """Print how many tensors and values of each format are equal, rounded or different."""
    from localv4.cli.tables import print_table

    groups: dict[tuple[str, str], list[Comparison]] = {}
    for item in proof.tensors:
        groups.setdefault((item.state, item.format), []).append(item)
    rows = [
        (state, name, str(len(items)), f"{sum(item.values for item in items):,}", _note(items))
        for (state, name), items in sorted(groups.items())
    ]
    console = terminal.make_console(sys.stdout, no_color=no_color)
    header = ("VALUES", "FORMAT", "TENSORS", "NUMBERS", "NOTE")
    print_table(console, rows, header=header, numbers=frozenset({2, 3}))


def _note(items: "list[Comparison]") -> str:
    minus_zeros = sum(item.minus_zeros for item in items)
    if minus_zeros:
        return f"{minus_zeros:,} times -0 became 0"
    return ", ".join(item.name for item in items if item.different)[:200]


def refuse_disproved(path: Path, proof: "Proof") -> None:
    """Raise BadFileError naming the tensors whose values are not those of the source."""
    wrong = [item.name for item in proof.of("different")]
    if wrong:
        names = ", ".join(wrong[:MAX_NAMES]) + (" and others" if len(wrong) > MAX_NAMES else "")
        raise BadFileError(
            path, f"{proof.wrong_values} values of {names} are not those of the source"
        )
