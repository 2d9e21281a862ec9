"""What a conversion does with each matrix: the lines of a plan."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from quant.tensor_class import TensorClass


@dataclass(frozen=True, slots=True)
class Decision:
    """One matrix, or one of the three of several experts of a layer.

    `source` and `format` are names of formats; `is_exact`: no value changes. `note` tells why it is
    not the first wish of the recipe.
    """

    name: str
    kind: TensorClass
    layer: int | None
    rows: int
    cols: int
    count: int
    source: str
    format: str
    is_exact: bool
    source_bytes: int
    nbytes: int
    note: str = ""


@dataclass(frozen=True, slots=True)
class Plan:
    """All of a conversion: `files` with their sizes, and what happens to each matrix.

    `tensors` tells how many of them each file has.

    `bytes_per_token` is what a token reads on average: all but the embedding and the experts that
    it does not choose.
    """

    decisions: Sequence[Decision]
    files: Sequence[tuple[str, int]]
    tensors: Mapping[str, int]
    source_bytes: int
    bytes_per_token: int

    @property
    def nbytes(self) -> int:
        """Size of all files together."""
        return sum(nbytes for _, nbytes in self.files)


def bytes_per_token(decisions: Iterable[Decision], experts: int, per_token: int) -> int:
    """Return the bytes of matrices that a token reads, experts being chosen with equal chances."""
    total = 0.0
    for decision in decisions:
        if decision.kind is TensorClass.EMBEDDING:
            total += decision.nbytes / decision.rows
        elif decision.kind in (TensorClass.GATE_UP, TensorClass.DOWN):
            total += decision.nbytes * per_token / experts
        else:
            total += decision.nbytes
    return int(total)
