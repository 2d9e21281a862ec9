"""A recipe applied to one model: what becomes of each matrix, by its name, shape and use."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from localv4.errors import BadFileError, UsageError
from localv4.kernels import blocks
from localv4.model.matrix import Matrix
from quant.choice import Choice, choose_ggml, choose_packed
from quant.importance import Statistics, heat_of
from quant.moments import SecondMoments
from quant.packed_shard import kept_bits
from quant.recipe import Recipe, Rule
from quant.tensor_class import TensorClass, class_of, layer_of

_ROUTED = (TensorClass.GATE_UP, TensorClass.DOWN)


@dataclass(slots=True)
class Chooser:
    """Chooses formats by a recipe for a model of `layers` layers.

    Raises UsageError for a recipe that needs statistics of the router where there are none.
    """

    recipe: Recipe
    layers: int
    statistics: Statistics | None = None
    moments: SecondMoments | None = None
    _heat: dict[int, Mapping[int, float]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.recipe.needs_routing and self.statistics is None:
            raise UsageError(
                f"the recipe {self.recipe.name} needs to know which experts are chosen often",
                hint="make an importance matrix with: localv4 eval imatrix, then give --imatrix",
            )

    def packed(self, name: str, matrix: Matrix) -> Choice:
        """Return what a matrix becomes in a packed folder."""
        kind = class_of(name)
        bits = kept_bits(matrix)
        choice = choose_packed(self._rule(name, kind), kind, matrix.rows, matrix.cols, bits)
        return self._possible(choice, name, matrix)

    def ggml(self, name: str, matrix: Matrix) -> Choice:
        """Return what a matrix becomes in a GGUF file."""
        kind = class_of(name)
        bits = ggml_bits(matrix)
        choice = choose_ggml(self._rule(name, kind), kind, matrix.rows, matrix.cols, bits)
        return self._possible(choice, name, matrix)

    def _possible(self, choice: Choice, name: str, matrix: Matrix) -> Choice:
        """Return the choice with the search where feedback would have nothing to go by."""
        if choice.target is None or choice.method != "feedback":
            return choice
        if self.moments is None:
            return replace(choice, method="search")
        if self.moments.knows(name, matrix.rows, matrix.cols):
            return choice
        notes = filter(None, (choice.note, "search, since no second moments are known"))
        return replace(choice, method="search", note="; ".join(notes))

    def _rule(self, name: str, kind: TensorClass) -> Rule | None:
        layer = layer_of(name)
        heat = None
        if self.recipe.needs_routing and kind in _ROUTED and layer is not None:
            heat = self._heat_of(layer)[int(name.split(".")[4])]
        return self.recipe.rule_for(kind, layer, self.layers, heat)

    def _heat_of(self, layer: int) -> Mapping[int, float]:
        if layer not in self._heat:
            assert self.statistics is not None
            counts = self.statistics.expert_counts(layer)
            if counts is None:
                raise BadFileError(
                    "importance matrix", f"does not know which experts layer {layer} chooses"
                )
            self._heat[layer] = heat_of(counts)
        return self._heat[layer]


def ggml_bits(matrix: Matrix) -> float:
    """Return the bits of a weight in the ggml type that keeps its values."""
    if matrix.format == blocks.FP4:
        return 4.25
    if matrix.format == blocks.F8:
        return 16
    columns, nbytes = blocks.UNITS[matrix.format]
    return 8 * nbytes / columns
