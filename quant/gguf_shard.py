"""The tensors of one layer, or of what belongs to none, as tensors of a GGUF file."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial

import numpy as np

from localv4.errors import BadFileError
from localv4.kernels import blocks
from localv4.model.matrix import Matrix, Packed
from localv4.model.weights import Expert
from quant.choice import Choice
from quant.converter import Converter
from quant.decision import Decision
from quant.ggml_rows import kept_rows, kept_type
from quant.gguf_names import gguf_name
from quant.gguf_writer import GgufTensor
from quant.output_file import Job
from quant.packed_shard import Choose, Leaf, ShardSource, expert_prefixes, matrix_rows
from quant.strips import give_back
from quant.tensor_class import class_of, layer_of


@dataclass(slots=True)
class GgufShard:
    """Tensors in their order, and what was decided about them."""

    tensors: list[GgufTensor] = field(default_factory=list)
    decisions: list[Decision] = field(default_factory=list)


def build_gguf_shard(source: ShardSource, converter: Converter, choose: Choose) -> GgufShard:
    """Lay out tensors; `choose` says what becomes of a matrix. Nothing is converted yet.

    Writing raises BadFileError, naming the tensor, when a weight is not finite.
    """
    shard = GgufShard()
    for name, leaf in source.leaves.items():
        if isinstance(leaf, Matrix):
            _add(shard, converter, choose, name, [(name, leaf)])
        else:
            shard.tensors.append(_small(name, leaf))
    for name, experts in source.experts.items():
        is_routed = not name.endswith("shared_experts")
        for part in ("w1", "w3", "w2"):
            matrices = list(_parts(name, part, experts))
            _add(shard, converter, choose, f"{name}.{part}.weight", matrices, is_routed)
    return shard


def _parts(name: str, part: str, experts: Sequence[Expert]) -> Iterator[tuple[str, Matrix]]:
    """Yield the same matrix of all experts with their official names."""
    for prefix, expert in zip(expert_prefixes(name, experts), experts, strict=True):
        yield f"{prefix}.{part}.weight", getattr(expert, part)


def _add(
    shard: GgufShard,
    converter: Converter,
    choose: Choose,
    name: str,
    matrices: Sequence[tuple[str, Matrix]],
    is_stack: bool = False,
) -> None:
    """Add a tensor of one matrix, or of a stack of them."""
    choices = [choose(own, matrix) for own, matrix in matrices]
    kinds = {_type_of(m, c) for (_, m), c in zip(matrices, choices, strict=True)}
    if len(kinds) > 1:
        raise BadFileError(converter.path, f"{name}: experts of a layer have different types")
    kind, first = kinds.pop(), matrices[0][1]

    def parts() -> Iterator[Job]:
        for (own, matrix), choice in zip(matrices, choices, strict=True):
            for begin, end in converter.spans(own, matrix):
                yield partial(_rows, converter, own, matrix, choice, begin, end)

    shape: tuple[int, ...] = (first.rows, first.cols)
    tensor = GgufTensor(
        gguf_name(name), kind, (len(matrices), *shape) if is_stack else shape, parts
    )
    shard.tensors.append(tensor)
    shard.decisions.append(
        Decision(
            name=tensor.name,
            kind=class_of(matrices[0][0]),
            layer=layer_of(name),
            rows=first.rows,
            cols=first.cols,
            count=len(matrices),
            source=blocks.FORMATS[first.format],
            format=kind,
            is_exact=choices[0].target is None,
            source_bytes=sum(matrix.nbytes for _, matrix in matrices),
            nbytes=tensor.nbytes,
            note=choices[0].note_on(kind),
        )
    )


def _type_of(matrix: Matrix, choice: Choice) -> str:
    return kept_type(matrix) if choice.target is None else choice.target.name


def _rows(
    converter: Converter, name: str, matrix: Matrix, choice: Choice, first: int, end: int
) -> Packed:
    part = converter.rows(name, matrix, first, end, choice)
    is_kept = choice.target is None
    rows = np.array(kept_rows(part, name, converter.path)) if is_kept else part.data
    give_back(matrix_rows(matrix, first, end))
    return rows


def _small(name: str, leaf: Leaf) -> GgufTensor:
    assert isinstance(leaf, np.ndarray)
    if leaf.dtype == np.int64:
        return GgufTensor(gguf_name(name), "I32", leaf.shape, lambda: [leaf.astype("<i4")])
    return GgufTensor(gguf_name(name), "F32", leaf.shape, lambda: [np.ascontiguousarray(leaf)])
