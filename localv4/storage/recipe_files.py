"""The recipes that come with the package, and which layers a rule of a recipe is about.

`quant.recipe` describes the files, and converts by them; `planning.recipes` foretells what comes
out.
"""

import re
from pathlib import Path

NAMES = ("lossless", "q8", "q4", "q3", "q2", "mixed")
"""The most precise ones first; `mixed` needs to know which experts tokens choose."""

_FOLDER = Path(__file__).parents[1] / "embedded" / "recipes"
_SPAN = re.compile(r"all|(?:first|last) (\d+)|(\d+)(?:-(\d+))?")


def read_recipe(name: str) -> bytes:
    """Return the TOML file of one of NAMES."""
    return (_FOLDER / f"{name}.toml").read_bytes()


def check_layers(text: str) -> None:
    """Raise ValueError unless a text names layers: "all", or such as "first 2, last 1, 4-7"."""
    for span in text.split(","):
        if not _SPAN.fullmatch(span.strip()):
            raise ValueError(f'"{span.strip()}" is not all, first N, last N, N or N-M')


def names_layer(text: str, layer: int | None, layers: int) -> bool:
    """Tell whether a text names a layer of `layers`; only "all" names what is in none (None)."""
    spans = (_SPAN.fullmatch(span.strip()) for span in text.split(","))
    return any(match is not None and _is_inside(match, layer, layers) for match in spans)


def _is_inside(match: re.Match[str], layer: int | None, layers: int) -> bool:
    if match[0] == "all":
        return True
    if layer is None:
        return False
    if match[1] is not None:
        count = int(match[1])
        return layer < count if match[0].startswith("first") else layer >= layers - count
    return int(match[2]) <= layer <= int(match[3] or match[2])
