"""Recipes: which class of tensors gets which format. A recipe is a TOML file, also of a user.

    summary = "what it is for"

    [[rules]]
    tensors = ["gate_up"]        # classes, see quant.tensor_class
    layers = "first 2, last 2"   # or "all" (the default), or numbers such as "0-3, 7"
    formats = ["Q3", "Q4"]       # the first one that the shape allows; then wider ones
    gguf = ["IQ4_XS"]            # the same for GGUF files; without it, the kin of `formats`
    method = "search"            # or "round", or "feedback" where second moments are known
    hottest = 0.25               # only the quarter of the experts that most tokens choose

The last rule that names a tensor decides. What no rule names keeps its values.
"""

import re
from pathlib import Path
from typing import Annotated, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from localv4.errors import BadFileError, UsageError
from localv4.small_file import read_small_file
from localv4.storage.recipe_files import NAMES, check_layers, names_layer, read_recipe
from localv4.toml_file import did_you_mean, first_problem, parse_toml
from quant.formats import GGML_TARGETS, KEEP, PACKED_TARGETS
from quant.tensor_class import TensorClass

MAX_RECIPE_BYTES = 1 << 20

Method = Literal["round", "search", "feedback"]

_ROUTED = {TensorClass.GATE_UP, TensorClass.DOWN}
_NAME = re.compile(r"[a-z0-9][a-z0-9._-]{0,31}")


class Rule(BaseModel):
    """What becomes of some classes of tensors in some layers."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    tensors: Annotated[list[TensorClass], Field(min_length=1)]
    layers: str = "all"
    formats: Annotated[list[str], Field(min_length=1)]
    gguf: list[str] = []
    method: Method = "search"
    hottest: Annotated[float, Field(gt=0, lt=1, strict=True)] | None = None

    @field_validator("layers")
    @classmethod
    def _check_layers(cls, text: str) -> str:
        check_layers(text)
        return text

    @field_validator("formats")
    @classmethod
    def _check_formats(cls, names: list[str]) -> list[str]:
        return _known(names, PACKED_TARGETS)

    @field_validator("gguf")
    @classmethod
    def _check_gguf(cls, names: list[str]) -> list[str]:
        return _known(names, GGML_TARGETS)

    @model_validator(mode="after")
    def _check_hottest(self) -> Self:
        if self.hottest is not None and not set(self.tensors) <= _ROUTED:
            raise ValueError("hottest is about routed experts: gate_up and down")
        return self

    def covers(self, kind: TensorClass, layer: int | None, layers: int) -> bool:
        """Tell whether the rule is about a class in a layer (None: in none) of `layers`."""
        return kind in self.tensors and names_layer(self.layers, layer, layers)


class Recipe(BaseModel):
    """Formats for all tensors of a model."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: str = ""
    summary: str
    rules: list[Rule] = []

    @property
    def needs_routing(self) -> bool:
        """Whether the experts that most tokens choose are treated apart."""
        return any(rule.hottest is not None for rule in self.rules)

    def rule_for(
        self, kind: TensorClass, layer: int | None, layers: int, heat: float | None = None
    ) -> Rule | None:
        """Return the rule that decides, None where none does.

        `heat` is the share of experts of the layer that at least as many tokens choose.
        """
        for rule in reversed(self.rules):
            if rule.covers(kind, layer, layers) and (
                rule.hottest is None or (heat is not None and heat <= rule.hottest)
            ):
                return rule
        return None


def load_recipe(reference: str) -> Recipe:
    """Return a built-in recipe by name, or that of a TOML file by its path.

    Raises UsageError for an unknown name, NotFoundError or BadFileError for a file.
    """
    if reference in NAMES:
        return _parse(read_recipe(reference), Path(f"{reference}.toml"), reference)
    path = Path(reference)
    if path.suffix != ".toml":
        raise UsageError(
            f'there is no recipe "{reference}"{did_you_mean(reference, NAMES)}',
            hint=f"choose {', '.join(NAMES)}, or a file that ends in .toml",
        )
    return _parse(read_small_file(path, MAX_RECIPE_BYTES), path, path.stem.lower())


def _parse(data: bytes, path: Path, name: str) -> Recipe:
    if not _NAME.fullmatch(name):
        raise BadFileError(path, "the name of a recipe is made of a-z, 0-9, dots, _ and -")
    values = parse_toml(data, path)
    if "name" in values:
        raise BadFileError(path, "name: a recipe has the name of its file")
    try:
        return Recipe.model_validate({**values, "name": name})
    except ValidationError as error:
        known = {*Recipe.model_fields, *Rule.model_fields}
        raise BadFileError(path, first_problem(error, known)) from error


def _known(names: list[str], targets: object) -> list[str]:
    allowed = [KEEP, *targets]  # type: ignore[misc]
    for name in names:
        if name not in allowed:
            near = did_you_mean(name, allowed)
            raise ValueError(f'"{name}" is not one of {", ".join(allowed)}{near}')
    return names
