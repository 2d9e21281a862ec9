"""The recipes of packed folders: which format each kind of weight gets (`recipes.toml`)."""

import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

from localv4.kernels.packed import F8, F8_SPAN, FORMATS, PackedFormat, can_pack, packed_bytes
from localv4.kernels.packed_kquants import KQUANTS
from localv4.kernels.packing_floats import B16, F32R, float_bytes
from localv4.planning.network import Role, Weight

F32_BYTES = 4
TABLE_BYTES = 8
"""Of a number in a table of experts."""
EMBEDDING_BYTES = 2
"""Of a weight of the embedding, which stays in BF16 rows."""

FLOATS = (B16, F32R)
FORMATS_BY_NAME: Mapping[str, PackedFormat] = {
    fmt.name: fmt for fmt in (*FORMATS, *KQUANTS, *FLOATS)
}


@dataclass(frozen=True, slots=True)
class Recipe:
    """A named choice of formats; `formats` has every role of a matrix that is multiplied.

    The first and the last `ends` layers have the formats `at_ends` instead where it names a role.
    """

    name: str
    about: str
    formats: Mapping[str, str]
    ends: int = 0
    at_ends: Mapping[str, str] = field(default_factory=dict)

    def format_of(self, role: Role, layer: int | None = None, layers: int = 0) -> str:
        """Return the name of the format of a role's matrices in a layer, of `layers`."""
        if layer is not None and (layer < self.ends or layer >= layers - self.ends):
            return self.at_ends.get(role, self.formats.get(role, "F32"))
        return self.formats.get(role, "F32")

    def bytes_of(self, weight: Weight, layers: int) -> int:
        """Return the bytes that all matrices of a weight take in a network of `layers` layers."""
        if weight.role == "embedding":
            return EMBEDDING_BYTES * weight.size
        if weight.role == "table":
            return TABLE_BYTES * weight.size
        kind = self.format_of(weight.role, weight.layer, layers)
        one = matrix_bytes(kind, weight.rows, weight.cols)
        return weight.count * one


@dataclass(frozen=True, slots=True)
class Recipes:
    """All recipes, the most precise first, and the one to take without a reason for another."""

    by_name: Mapping[str, Recipe]
    default: Recipe


@cache
def load_recipes() -> Recipes:
    """Read the recipes that come with the package."""
    text = (Path(__file__).parent / "recipes.toml").read_text("utf-8")
    table: dict[str, Any] = tomllib.loads(text)
    base = {role: name for role, name in table["lossless"].items() if role != "about"}
    found = {}
    for name in table["order"]:
        own = dict(table[name])
        about, ends, at_ends = own.pop("about"), own.pop("ends", 0), own.pop("at_ends", {})
        found[name] = Recipe(name, about, base | own, ends, at_ends)
    return Recipes(found, found[table["default"]])


def matrix_bytes(format_name: str, rows: int, cols: int) -> int:
    """Return the bytes of a matrix in memory, in a packed format or as float32.

    A shape that has no packed form is multiplied as it is stored: counted at the format's bits.
    """
    fmt = FORMATS_BY_NAME.get(format_name)
    if fmt is None:
        return F32_BYTES * rows * cols
    if fmt in FLOATS:
        return float_bytes(fmt, rows, cols) if cols % fmt.columns_unit == 0 else 2 * rows * cols
    scales = F32_BYTES * -(-rows // F8_SPAN) * -(-cols // F8_SPAN) if fmt is F8 else 0
    if can_pack(fmt, rows, cols):
        return packed_bytes(fmt, rows, cols) + scales
    return rows * cols * fmt.superblock_bytes // (16 * fmt.columns) + scales
