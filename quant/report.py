"""What was done, as a file beside the weights: recipe, formats and errors of each class."""

import json
from collections.abc import Mapping, Sequence
from typing import Any

from quant.decision import Decision, Plan
from quant.errors_made import Share
from quant.recipe import Recipe
from quant.tensor_class import TensorClass

REPORT_NAME = "quantization.json"


def report_of(
    recipe: Recipe, source: str, plan: Plan, errors: Mapping[TensorClass, Share]
) -> bytes:
    """Return the report as JSON; the same conversion gives the same bytes."""
    document = {
        "recipe": recipe.model_dump(mode="json", exclude_none=True),
        "source": source,
        "bytes_per_token": plan.bytes_per_token,
        "classes": [row_of_class(kind, plan.decisions, errors) for kind in _classes(plan)],
    }
    return json.dumps(document, indent=1).encode()


def row_of_class(
    kind: TensorClass, decisions: Sequence[Decision], errors: Mapping[TensorClass, Share]
) -> dict[str, Any]:
    """Return sizes, formats and the relative error of the matrices of a class."""
    own = [decision for decision in decisions if decision.kind is kind]
    formats: dict[str, int] = {}
    for decision in own:
        formats[decision.format] = formats.get(decision.format, 0) + decision.count
    share = errors.get(kind, Share())
    return {
        "class": kind.value,
        "matrices": sum(decision.count for decision in own),
        "source": sorted({decision.source for decision in own}),
        "formats": formats,
        "exact": sum(decision.count for decision in own if decision.is_exact),
        "source_bytes": sum(decision.source_bytes for decision in own),
        "bytes": sum(decision.nbytes for decision in own),
        "relative_error": float(f"{share.relative:.6g}"),
    }


def _classes(plan: Plan) -> list[TensorClass]:
    there = {decision.kind for decision in plan.decisions}
    return [kind for kind in TensorClass if kind in there]
