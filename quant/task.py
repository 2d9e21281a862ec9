"""What is to be converted and how, whatever the format of the result."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from quant.errors_made import ErrorTotals
from quant.importance import Statistics
from quant.moments import SecondMoments
from quant.recipe import Recipe
from quant.source import Source


@dataclass(frozen=True, slots=True)
class Task:
    """A source, a recipe and what is known about the use of weights.

    The marks tell one file of statistics or second moments from another; they are "" without any.
    """

    source: Source
    recipe: Recipe
    threads: int
    statistics: Statistics | None = None
    statistics_mark: str = ""
    moments: SecondMoments | None = None
    moments_mark: str = ""

    @property
    def ahead(self) -> int:
        """Parts that are computed before it is their turn: enough for all threads to have work."""
        return self.threads + 1

    def identity(self, form: str) -> dict[str, Any]:
        """Return all that the bytes of the result depend on."""
        return {
            "form": form,
            "source": self.source.identity(),
            "recipe": self.recipe.model_dump(mode="json"),
            "statistics": self.statistics_mark,
            "moments": self.moments_mark,
        }


@dataclass(slots=True)
class Progress:
    """How far a conversion is; the same object is given to the callback again and again."""

    bytes_done: int
    bytes_total: int
    tensors_done: int
    tensors_total: int
    errors: ErrorTotals
    on_change: "OnProgress | None" = None

    def add_bytes(self, nbytes: int) -> None:
        """Count bytes that are written, and tell it."""
        self.bytes_done += nbytes
        if self.on_change is not None:
            self.on_change(self)

    def add_tensor(self) -> None:
        """Count a tensor that is written."""
        self.tensors_done += 1


OnProgress = Callable[[Progress], None]
