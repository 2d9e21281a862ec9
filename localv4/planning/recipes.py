"""The recipes of packed folders: which format each kind of weight gets."""

import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache

from localv4.kernels.packed import F8, F8_SPAN, FORMATS, PackedFormat, can_pack, packed_bytes
from localv4.kernels.packed_kquants import KQUANTS
from localv4.kernels.packing_floats import B16, F32R, float_bytes
from localv4.planning.network import Role, Weight
from localv4.storage.recipe_files import names_layer, read_recipe

F32_BYTES = 4
TABLE_BYTES = 8
"""Of a number in a table of experts."""
EMBEDDING_BYTES = 2
"""Of a weight of the embedding, which stays in BF16 rows."""

FLOATS = (B16, F32R)
FORMATS_BY_NAME: Mapping[str, PackedFormat] = {
    fmt.name: fmt for fmt in (*FORMATS, *KQUANTS, *FLOATS)
}


PUBLISHED: Mapping[Role, str] = {
    "experts_gate_up": "MX4",
    "experts_down": "MX4",
    "shared_gate_up": "F8",
    "shared_down": "F8",
    "attention_q": "F8",
    "attention_o": "F8",
    "attention_kv": "F8",
    "indexer": "F8",
    "index_weights": "B16",
    "compressor": "B16",
    "router": "B16",
    "head": "B16",
}
"""The packed formats of the published weights; other roles are float32."""

FORETOLD, DEFAULT = ("lossless", "q8", "q4", "q3", "q2"), "q4"
"""Recipes whose sizes do not depend on what tokens choose; the one to take without a reason."""

_CLASSES: Mapping[Role, str] = {
    "experts_gate_up": "gate_up",
    "experts_down": "down",
    "index_weights": "indexer",
}
"""What recipes call a role, where they do not use its name."""


@dataclass(frozen=True, slots=True)
class Rule:
    """A format for some classes of matrices in some layers (`storage.recipe_files`)."""

    classes: frozenset[str]
    layers: str
    format: str


@dataclass(frozen=True, slots=True)
class Recipe:
    """A named choice of formats; the last rule that names a matrix decides.

    What no rule names has the format of the published weights.
    """

    name: str
    rules: tuple[Rule, ...]

    def format_of(self, role: Role, layer: int | None = None, layers: int = 0) -> str:
        """Return the name of the format of a role's matrices in a layer, of `layers`."""
        kind = _CLASSES.get(role, role)
        for rule in reversed(self.rules):
            if kind in rule.classes and names_layer(rule.layers, layer, layers):
                return rule.format
        return PUBLISHED.get(role, "F32")

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
    found = {name: _recipe(name) for name in FORETOLD}
    return Recipes(found, found[DEFAULT])


def _recipe(name: str) -> Recipe:
    """Return what a recipe makes of shapes that its first formats allow, as the released ones."""
    rules = tomllib.loads(read_recipe(name).decode()).get("rules", [])
    return Recipe(
        name,
        tuple(
            Rule(frozenset(rule["tensors"]), rule.get("layers", "all"), rule["formats"][0])
            for rule in rules
        ),
    )


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
