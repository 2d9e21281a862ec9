"""Weights repacked in memory for the fast kernels, value for value.

Dense matrices are packed when a model is loaded, experts when a token first chooses them. What has
no packed form (other storage types, odd shapes) stays in the file and is multiplied exactly.
"""

from collections import OrderedDict
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, fields, is_dataclass, replace
from typing import Any, TypeVar

import numpy as np

from localv4.kernels import blocks, packing
from localv4.kernels.buffers import aligned_bytes
from localv4.kernels.packed import (
    F8,
    GROUP_ROWS,
    MX4,
    Q4,
    Q8,
    PackedFormat,
    can_pack,
    down_offset,
    expert_bytes,
    group_bytes,
    packed_bytes,
)
from localv4.model.matrix import Floats, Matrix, Packed
from localv4.model.weights import Expert, Layer, Weights

_PACKED_FORMS = {
    blocks.FP4: MX4,
    blocks.MXFP4: MX4,
    blocks.Q4_0: Q4,
    blocks.Q8_0: Q8,
    blocks.F8: F8,
}

Node = TypeVar("Node")


@dataclass(frozen=True, slots=True)
class PackedMatrix(Matrix):
    """A stored matrix with a packed copy; `scales` (rows / 128, cols / 128) f32 for F8 only."""

    form: PackedFormat
    packed: Packed
    scales: Floats | None


@dataclass(frozen=True, slots=True)
class ExpertRecord:
    """One expert, packed: groups of gate and up in turn, then those of down."""

    form: PackedFormat
    data: Packed


def packed_form(weight: Matrix) -> PackedFormat | None:
    """Return the format that a stored matrix packs into, None if there is none."""
    form = _PACKED_FORMS.get(weight.format)
    return form if form is not None and can_pack(form, weight.rows, weight.cols) else None


def pack_matrix(weight: Matrix) -> Matrix:
    """Return the packed form of a matrix, or the matrix itself if it has none or holds a NaN."""
    form = packed_form(weight)
    if form is None:
        return weight
    data = aligned_bytes(packed_bytes(form, weight.rows, weight.cols))
    if _pack(data, weight, step=1) > 0:
        return weight
    scales = packing.f8_scales(weight.scale) if form is F8 else None
    stored = (weight.format, weight.rows, weight.cols, weight.data, weight.scale)
    return PackedMatrix(*stored, form, data, scales)


def expert_form(expert: Expert) -> PackedFormat | None:
    """Return the one format that all three matrices of an expert pack into, None if none."""
    form = packed_form(expert.w1)
    same = form is packed_form(expert.w2) is packed_form(expert.w3)
    return form if same and form is not F8 else None


def pack_expert(expert: Expert) -> ExpertRecord | None:
    """Return the packed form of an expert, None if it has none or holds a NaN."""
    form = expert_form(expert)
    if form is None:
        return None
    hidden, inner = expert.w1.cols, expert.w1.rows
    data = aligned_bytes(expert_bytes(form, hidden, inner))
    nans = _pack(data, expert.w1, step=2)
    nans += _pack(data[group_bytes(form, hidden) :], expert.w3, step=2)
    nans += _pack(data[down_offset(form, hidden, inner) :], expert.w2, step=1)
    return None if nans else ExpertRecord(form, data)


def _pack(out: Packed, weight: Matrix, step: int) -> int:
    """Pack all row groups of a matrix; return the number of NaN codes."""
    data, groups = weight.data.reshape(-1), weight.rows // GROUP_ROWS
    if weight.format == blocks.FP4:
        return packing.pack_fp4(out, data, weight.scale.reshape(-1), weight.cols, 0, groups, step)
    pack = {
        blocks.MXFP4: packing.pack_mxfp4,
        blocks.Q4_0: packing.pack_q4_0,
        blocks.Q8_0: packing.pack_q8_0,
        blocks.F8: packing.pack_f8,
    }[weight.format]
    return pack(out, data, weight.cols, 0, groups, step)


def pack_dense(
    weights: Weights, threads: int, on_progress: Callable[[int, int], None] | None = None
) -> Weights:
    """Return the weights with every dense matrix packed that has a packed form.

    Routed experts and the embedding, which is looked up by row, stay as they are.
    `on_progress(layers done, layers)`.
    """
    layers: list[Layer] = []
    with ThreadPoolExecutor(threads) as pool:
        for layer in weights.layers:
            dense = _map_matrices(replace(layer, experts=()), pool)
            layers.append(replace(dense, experts=layer.experts))
            if on_progress is not None:
                on_progress(len(layers), len(weights.layers))
        head = pool.submit(pack_matrix, weights.head).result()
    return replace(weights, layers=tuple(layers), head=head)


def _map_matrices(node: Node, pool: ThreadPoolExecutor) -> Node:
    """Return a tree of dataclasses with `pack_matrix` applied to the matrices in it."""
    found: list[Matrix] = []
    _collect(node, found)
    packed = dict(zip(map(id, found), pool.map(pack_matrix, found), strict=True))
    result: Node = _rebuild(node, packed)
    return result


def _collect(node: object, found: list[Matrix]) -> None:
    if isinstance(node, Matrix):
        found.append(node)
    elif is_dataclass(node):
        for field in fields(node):
            _collect(getattr(node, field.name), found)


def _rebuild(node: Any, packed: dict[int, Matrix]) -> Any:
    if isinstance(node, Matrix):
        return packed[id(node)]
    if not is_dataclass(node) or isinstance(node, type):
        return node
    return replace(node, **{f.name: _rebuild(getattr(node, f.name), packed) for f in fields(node)})


class ExpertCache:
    """Packed experts by (layer, number), the least recently used given up beyond `budget` bytes."""

    def __init__(self, budget_bytes: int, threads: int = 1) -> None:
        self.budget_bytes = budget_bytes
        self._pool = ThreadPoolExecutor(threads, "packing")
        self._records: OrderedDict[tuple[int, int], ExpertRecord] = OrderedDict()
        self.held_bytes = 0

    def get_all(
        self, layer: int, numbers: Sequence[int], experts: Sequence[Expert]
    ) -> dict[int, ExpertRecord] | None:
        """Return the records of some experts of a layer; None if any has no packed form.

        What is not there is packed by all threads. The caller's references keep the records
        alive, even when they do not fit into the budget together.
        """
        missing = [number for number in numbers if (layer, number) not in self._records]
        packed = self._pool.map(pack_expert, [experts[number] for number in missing])
        fresh = dict(zip(missing, packed, strict=True))
        found: dict[int, ExpertRecord] = {}
        for number in numbers:
            key = (layer, number)
            record = fresh[number] if number in fresh else self._records[key]
            if record is None:
                return None
            found[number] = record
        for number in numbers:
            self._keep((layer, number), found[number])
        return found

    def _keep(self, key: tuple[int, int], record: ExpertRecord) -> None:
        """Put a record at the young end, giving up the oldest ones for it."""
        if self._records.pop(key, None) is None:
            self.held_bytes += record.data.nbytes
        while self._records and self.held_bytes > self.budget_bytes:
            _, oldest = self._records.popitem(last=False)
            self.held_bytes -= oldest.data.nbytes
        self._records[key] = record


def record_addresses(records: list[ExpertRecord]) -> np.ndarray[tuple[int], np.dtype[np.int64]]:
    """Return where the records lie; they must be kept alive while the addresses are in use."""
    return np.array([record.data.ctypes.data for record in records], np.int64)
