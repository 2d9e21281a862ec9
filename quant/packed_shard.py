"""The tensors of one shard of a packed folder, from the weights of any checkpoint."""

from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from localv4.errors import BadFileError
from localv4.kernels import blocks
from localv4.kernels.buffers import aligned_bytes
from localv4.kernels.packed import GROUP_ROWS, group_bytes
from localv4.model.matrix import Floats, Matrix, Packed
from localv4.model.packing import (
    ExpertForm,
    PackedMatrix,
    expert_form,
    pack_expert,
    pack_matrix,
    packed_form,
)
from localv4.model.weights import Expert
from quant.packed_writer import (
    PACKED_BYTES,
    PAGE,
    MatrixEntry,
    ShardTensor,
    packed_bytes_tensor,
    records_tensor,
    rounded_up,
    stored_array,
)

Leaf = Matrix | Floats | NDArray[np.int64]

_PLAIN_TYPES = {
    blocks.F32: ("F32", 4),
    blocks.F16: ("F16", 2),
    blocks.BF16: ("BF16", 2),
    blocks.F8: ("F8_E4M3", 1),
}
"""Stored types with a name of their own in safetensors, and bytes of a value."""


@dataclass(slots=True)
class Shard:
    """The tensors of one file and what the manifest says about them."""

    name: str
    tensors: list[ShardTensor] = field(default_factory=list)
    entries: dict[str, MatrixEntry] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class ShardSource:
    """What belongs into a shard: leaves and groups of experts by official name."""

    name: str
    leaves: Mapping[str, Leaf]
    experts: Mapping[str, tuple[Expert, ...]]

    def planned_bytes(self) -> int:
        """Return about how many bytes the shard will have."""
        total = 0
        for name, leaf in self.leaves.items():
            total += _planned_bytes(leaf, stays_stored(name))
        for experts in self.experts.values():
            form = common_form(experts)
            if form is not None:
                total += len(experts) * rounded_up(form.nbytes, PAGE)
                continue
            for part, matrix in _named_parts(name, experts).items():
                total += _planned_bytes(matrix, stays_stored(part))
        return total


def stays_stored(name: str) -> bool:
    """Tell which matrices are never packed one by one.

    The embedding is looked up by row, those of hyper-connections are tiny, and routed experts that
    have no record are multiplied as they are stored.
    """
    return name == "embed.weight" or "hc_" in name or ".ffn.experts." in name


def common_form(experts: Sequence[Expert]) -> ExpertForm | None:
    """Return the form of the records of all these experts, None if there is none."""
    forms = {expert_form(expert) for expert in experts}
    return forms.pop() if len(forms) == 1 else None


def build_shard(source: ShardSource, path: Path, pool: ThreadPoolExecutor, window: int) -> Shard:
    """Pack the dense matrices of a shard; experts are packed while it is written.

    At most `window` expert records are in memory at a time. Writing raises BadFileError, blaming
    `path`, when an expert holds a NaN.
    """
    shard = Shard(source.name)
    dense = dict(source.leaves)
    for name, experts in source.experts.items():
        form = common_form(experts)
        if form is not None:
            _add_records(shard, name, experts, form, path, pool, window)
        else:
            dense |= _named_parts(name, experts)
    packable = {
        name: leaf
        for name, leaf in dense.items()
        if isinstance(leaf, Matrix) and not stays_stored(name)
    }
    packed = dict(zip(packable, pool.map(pack_matrix, packable.values()), strict=True))
    for name, leaf in dense.items():
        _add_leaf(shard, name, packed.get(name, leaf))
    return shard


def _add_leaf(shard: Shard, name: str, leaf: Leaf) -> None:
    if isinstance(leaf, PackedMatrix):
        _add_packed(shard, name, leaf)
    elif isinstance(leaf, Matrix):
        _add_stored(shard, name, leaf)
    else:
        dtype = "I64" if leaf.dtype == np.int64 else "F32"
        shard.tensors.append(stored_array(name, dtype, leaf))


def _add_packed(shard: Shard, name: str, matrix: PackedMatrix) -> None:
    shard.tensors.append(packed_bytes_tensor(name, matrix.packed.nbytes, lambda: [matrix.packed]))
    shard.entries[name] = MatrixEntry("packed", matrix.form.name, matrix.rows, matrix.cols)
    if matrix.scales is not None:
        shard.tensors.append(stored_array(_scale_name(name), "F32", matrix.scales))


def _add_stored(shard: Shard, name: str, matrix: Matrix) -> None:
    """Add a matrix as it is stored."""
    raw = np.ascontiguousarray(matrix.data)
    if matrix.format in _PLAIN_TYPES:
        dtype, _ = _PLAIN_TYPES[matrix.format]
        shape: tuple[int, ...] = (matrix.rows, matrix.cols)
    else:
        dtype, shape = PACKED_BYTES, raw.shape
        if matrix.format != blocks.FP4:
            kind = blocks.FORMATS[matrix.format]
            shard.entries[name] = MatrixEntry("rows", kind, matrix.rows, matrix.cols)
    shard.tensors.append(ShardTensor(name, dtype, shape, lambda: [raw]))
    if matrix.format in (blocks.F8, blocks.FP4):
        shard.tensors.append(stored_array(_scale_name(name), "F8_E8M0", matrix.scale))


def _scale_name(name: str) -> str:
    return name.removesuffix(".weight") + ".scale"


def _add_records(
    shard: Shard,
    name: str,
    experts: Sequence[Expert],
    form: ExpertForm,
    path: Path,
    pool: ThreadPoolExecutor,
    window: int,
) -> None:
    record_bytes = rounded_up(form.nbytes, PAGE)

    def pack(number: int) -> Packed:
        record = aligned_bytes(record_bytes)
        record[form.nbytes :] = 0
        if not pack_expert(record[: form.nbytes], experts[number], form):
            raise BadFileError(path, f"expert {number} of {name} holds a NaN")
        return record

    def parts() -> Iterator[Packed]:
        waiting: deque[Future[Packed]] = deque()
        for number in range(len(experts)):
            waiting.append(pool.submit(pack, number))
            if len(waiting) == window:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()

    shard.tensors.append(records_tensor(name, len(experts), record_bytes, parts))
    shard.entries[name] = MatrixEntry(
        "records",
        form.gate_up.name,
        form.inner,
        form.hidden,
        form.down.name,
        len(experts),
        record_bytes,
    )


def _parts(expert: Expert) -> dict[str, Matrix]:
    return {"w1": expert.w1, "w2": expert.w2, "w3": expert.w3}


def _named_parts(name: str, experts: Sequence[Expert]) -> dict[str, Leaf]:
    """Return the matrices of experts that have no record, by official name."""
    shared = name.endswith("shared_experts")
    prefixes = [name] if shared else [f"{name}.{number}" for number in range(len(experts))]
    return {
        f"{prefix}.{part}.weight": matrix
        for prefix, expert in zip(prefixes, experts, strict=True)
        for part, matrix in _parts(expert).items()
    }


def _planned_bytes(leaf: Leaf, stored: bool) -> int:
    form = packed_form(leaf) if isinstance(leaf, Matrix) and not stored else None
    if form is None or not isinstance(leaf, Matrix):
        return leaf.nbytes
    return -(-leaf.rows // GROUP_ROWS) * group_bytes(form, leaf.cols)
