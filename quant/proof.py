"""A proof that a conversion kept the values that it says it kept, tensor by tensor, to the bit."""

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from localv4.kernels import blocks
from localv4.kernels.threads import usable_processors
from localv4.model.loading import read_model_config, read_names
from localv4.model.matrix import Floats, Matrix, decode
from localv4.model.packed_source import PackedReader
from localv4.model.packing import PackedMatrix, packed_form
from localv4.model.weights import Expert, WeightReader
from localv4.storage import Checkpoint, PackedFolder, open_checkpoint
from quant.ggml_rows import kept_type
from quant.output_file import in_order
from quant.packed_shard import PARTS, Leaf, expert_prefixes
from quant.source import Source, open_source
from quant.strips import give_back, strip, strips_of
from quant.unpacking import unpacked

OnBytes = Callable[[int], None]
State = Literal["equal", "rounded", "different"]


@dataclass(frozen=True, slots=True)
class Comparison:
    """A tensor of both: "equal" to the bit, "rounded" to another format, or "different".

    `different` counts values that should be equal and are not, `minus_zeros` those that are -0 in
    the source and 0 in a format that has no -0.
    """

    name: str
    format: str
    state: State
    values: int
    different: int = 0
    minus_zeros: int = 0


@dataclass(frozen=True, slots=True)
class Proof:
    """All tensors of a model against those of its source."""

    tensors: Sequence[Comparison]

    def of(self, state: State) -> list[Comparison]:
        """Return the tensors of a state."""
        return [item for item in self.tensors if item.state == state]

    @property
    def wrong_values(self) -> int:
        """How many values differ that should not."""
        return sum(item.different for item in self.tensors)


def prove(
    model: Path, source: Path, on_bytes: OnBytes | None = None, threads: int | None = None
) -> Proof:
    """Decode a converted model and its source and compare every value that was to be kept.

    A tensor was to be kept if it is in the form that keeps values of the source's format; one in
    another format counts as rounded and is not compared. `on_bytes` is told the bytes of the source
    that have been compared. Raises BadFileError when one of both is damaged or they do not fit.
    """
    with (
        open_checkpoint(model) as converted,
        open_checkpoint(source) as opened,
        ThreadPoolExecutor(threads or usable_processors(), "proving") as pool,
    ):
        original = open_source(opened)
        read = _reader(converted)
        read_model_config(converted, read.table)
        tensors = []
        for number in range(original.shards):
            for name, leaf in _leaves(original, number):
                tensors.append(_compared(name, leaf, read, pool))
                if on_bytes is not None:
                    on_bytes(leaf.nbytes)
        return Proof(tensors)


def _reader(converted: Checkpoint) -> WeightReader:
    if isinstance(converted, PackedFolder):
        return PackedReader(converted)
    return WeightReader(converted, read_names(converted))


def _leaves(source: Source, number: int) -> Iterator[tuple[str, Leaf]]:
    """Yield every tensor of a shard of the source by its official name."""
    with source.shard(number) as found:
        yield from found.leaves.items()
        for name, experts in found.experts.items():
            for prefix, expert in zip(expert_prefixes(name, experts), experts, strict=True):
                yield from _matrices(prefix, expert)


def _matrices(prefix: str, expert: Expert) -> Iterator[tuple[str, Matrix]]:
    for part in PARTS:
        yield f"{prefix}.{part}.weight", getattr(expert, part)


def _compared(name: str, leaf: Leaf, read: WeightReader, pool: ThreadPoolExecutor) -> Comparison:
    if not isinstance(leaf, Matrix):
        return _compared_arrays(name, leaf, read)
    other = read.matrix(name, leaf.rows, leaf.cols)
    found = Comparison(name, _format_of(other), "equal", leaf.rows * leaf.cols)
    if not _is_kept(leaf, other):
        return replace(found, state="rounded")
    jobs = (
        (0, partial(_differences, leaf, other, first, end))
        for first, end in strips_of(leaf.rows, leaf.cols)
    )
    counts = np.sum([np.asarray(part) for _, part in in_order(jobs, pool, 2)], axis=0)
    give_back(leaf)
    different, minus_zeros = int(counts[0]), int(counts[1])
    state: State = "different" if different else "equal"
    return replace(found, state=state, different=different, minus_zeros=minus_zeros)


def _is_kept(matrix: Matrix, other: Matrix) -> bool:
    """Tell whether the format of `other` is the one that keeps the values of `matrix`."""
    if isinstance(other, PackedMatrix):
        return other.form is packed_form(matrix)
    if other.format == matrix.format:
        return True
    return _format_of(other) == kept_type(matrix)


def _format_of(matrix: Matrix) -> str:
    if isinstance(matrix, PackedMatrix):
        return matrix.form.name
    return blocks.FORMATS[matrix.format]


def _differences(matrix: Matrix, other: Matrix, first: int, end: int) -> NDArray[np.int64]:
    """Return how many values of a strip differ, and how many lost the sign of a zero."""
    expected, actual = decode(strip(matrix, first, end)), _values(other, first, end)
    unequal = expected.view(np.uint32) != actual.view(np.uint32)
    if not unequal.any():
        return np.zeros(2, np.int64)
    zeros = unequal & (expected == 0) & (actual == 0)
    lost = int(zeros.sum()) if blocks.MXFP4 in (matrix.format, other.format) else 0
    return np.array([int(unequal.sum()) - lost, lost])


def _values(matrix: Matrix, first: int, end: int) -> Floats:
    if isinstance(matrix, PackedMatrix):
        return unpacked(matrix, first, end)
    return decode(strip(matrix, first, end))


def _compared_arrays(name: str, leaf: Leaf, read: WeightReader) -> Comparison:
    """Compare norms, biases and tables, which are always kept."""
    assert isinstance(leaf, np.ndarray)
    part = read.table[name]
    kind = part.tensor.dtype.name
    if leaf.dtype == np.int64:
        experts = int(leaf.max()) + 1
        other = read.expert_table(name, leaf.shape[0], leaf.shape[1], experts)
        different = int((other != leaf).sum())
    else:
        floats = read.floats(name, *leaf.shape)
        different = int((floats.view(np.uint32) != leaf.view(np.uint32)).sum())
    state: State = "different" if different else "equal"
    return Comparison(name, kind, state, leaf.size, different)
