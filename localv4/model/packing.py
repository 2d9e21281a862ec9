"""Weights repacked in memory for the fast kernels, value for value.

Dense matrices are packed when a model is loaded, experts when a token first chooses them
(`model.experts`). What has no packed form stays in the file and is multiplied as it is stored.
"""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, fields, is_dataclass, replace
from typing import Any, TypeVar

from localv4.kernels import blocks, packing, packing_floats, packing_kquants
from localv4.kernels.buffers import aligned_bytes
from localv4.kernels.packed import (
    F8,
    GROUP_ROWS,
    MX4,
    Q4,
    Q8,
    PackedFormat,
    can_pack,
    group_bytes,
    packed_bytes,
)
from localv4.kernels.packed_kquants import IQ2, KQUANTS, Q2, Q3, Q4K, Q6
from localv4.kernels.packing_floats import B16, F32R, fits_bf16, float_bytes, groups_of
from localv4.model.matrix import Floats, Matrix, Packed
from localv4.model.weights import Expert, HyperConnection, Layer, Weights

_PACKED_FORMS = {
    blocks.FP4: MX4,
    blocks.MXFP4: MX4,
    blocks.Q4_0: Q4,
    blocks.Q8_0: Q8,
    blocks.F8: F8,
    blocks.Q4_K: Q4K,
    blocks.Q6_K: Q6,
    blocks.Q3_K: Q3,
    blocks.Q2_K: Q2,
    blocks.IQ2_XXS: IQ2,
    blocks.BF16: B16,
    blocks.F16: F32R,
    blocks.F32: F32R,  # or B16, where no digit is lost
}
_FLOAT_PACKERS = {
    (blocks.BF16, B16): packing_floats.pack_bf16,
    (blocks.F16, F32R): packing_floats.pack_f16,
    (blocks.F32, F32R): packing_floats.pack_f32,
    (blocks.F32, B16): packing_floats.pack_f32_as_b16,
}
_INTEGER_FORMS = (MX4, Q4, Q8, *KQUANTS)
"""Formats that experts are packed into."""

Node = TypeVar("Node")
PackLeaf = Callable[[Matrix | Expert], Matrix | Expert]


@dataclass(frozen=True, slots=True)
class PackedMatrix(Matrix):
    """A stored matrix with a packed copy; `scales` (rows / 128, cols / 128) f32 for F8 only."""

    form: PackedFormat
    packed: Packed
    scales: Floats | None


@dataclass(frozen=True, slots=True)
class ExpertForm:
    """How an expert is packed into one record: gate and up in turn, then down.

    `hidden` and `inner` are the dimensions of the expert, `nbytes` those of its record, of which
    down starts at `offset`.
    """

    gate_up: PackedFormat
    down: PackedFormat
    hidden: int
    inner: int

    @property
    def offset(self) -> int:
        """Where the down projection starts in a record."""
        return 2 * packed_bytes(self.gate_up, self.inner, self.hidden)

    @property
    def nbytes(self) -> int:
        """Bytes of a record."""
        return self.offset + packed_bytes(self.down, self.hidden, self.inner)


@dataclass(frozen=True, slots=True)
class PackedExpert(Expert):
    """An expert with its packed record."""

    form: ExpertForm
    record: Packed


def packed_form(weight: Matrix) -> PackedFormat | None:
    """Return the format that a stored matrix packs into, None if there is none."""
    form = _PACKED_FORMS.get(weight.format)
    if form in (B16, F32R):  # the last group of rows may be short
        if weight.cols % form.columns_unit:
            return None
        halved = weight.format == blocks.F32 and fits_bf16(weight.data.reshape(-1))
        return B16 if halved else form
    return form if form is not None and can_pack(form, weight.rows, weight.cols) else None


def pack_matrix(weight: Matrix) -> Matrix:
    """Return the packed form of a matrix, or the matrix itself if it has none or holds a NaN."""
    form = packed_form(weight)
    if form is None:
        return weight
    if form in (B16, F32R):
        return _pack_floats(weight, form)
    data = aligned_bytes(packed_bytes(form, weight.rows, weight.cols))
    if _pack(data, weight, step=1) > 0:
        return weight
    scales = packing.f8_scales(weight.scale) if form is F8 else None
    return PackedMatrix(*_stored(weight), form, data, scales)


def _pack_floats(weight: Matrix, form: PackedFormat) -> PackedMatrix:
    data = aligned_bytes(float_bytes(form, weight.rows, weight.cols))
    source, groups = weight.data.reshape(-1), groups_of(weight.rows)
    _FLOAT_PACKERS[weight.format, form](data, source, weight.cols, 0, groups, 1)
    return PackedMatrix(*_stored(weight), form, data, None)


def _stored(weight: Matrix) -> tuple[int, int, int, Packed, Packed]:
    """Return the fields of a matrix as it is stored."""
    return weight.format, weight.rows, weight.cols, weight.data, weight.scale


def expert_form(expert: Expert) -> ExpertForm | None:
    """Return the form of an expert's record; None if a matrix of it has no packed form."""
    if isinstance(expert, PackedExpert):
        return expert.form
    gate, up, down = packed_form(expert.w1), packed_form(expert.w3), packed_form(expert.w2)
    if gate not in _INTEGER_FORMS or down not in _INTEGER_FORMS or up is not gate:
        return None
    return ExpertForm(gate, down, expert.w1.cols, expert.w1.rows)


def pack_expert(out: Packed, expert: Expert, form: ExpertForm) -> bool:
    """Fill a record; return False if it would hold a NaN that no product shows."""
    nans = _pack(out, expert.w1, step=2)
    nans += _pack(out[group_bytes(form.gate_up, form.hidden) :], expert.w3, step=2)
    nans += _pack(out[form.offset :], expert.w2, step=1)
    return nans == 0


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
        blocks.Q4_K: packing_kquants.pack_q4_k,
        blocks.Q6_K: packing_kquants.pack_q6_k,
        blocks.Q3_K: packing_kquants.pack_q3_k,
        blocks.Q2_K: packing_kquants.pack_q2_k,
        blocks.IQ2_XXS: packing_kquants.pack_iq2_xxs,
    }[weight.format]
    return pack(out, data, weight.cols, 0, groups, step)


def pack_dense(
    weights: Weights,
    threads: int,
    on_progress: Callable[[int, int], None] | None = None,
    *,
    copies: bool = False,
) -> Weights:
    """Return the weights with every dense matrix packed that has a packed form.

    Not the routed experts, the embedding, which is looked up by row, and the small matrices of the
    hyper-connections. With `copies` what a file holds in packed form is copied to memory of our
    own, from where no reading of experts can push it. `on_progress(layers done, layers)`.
    """
    pack_leaf = _pack_and_copy if copies else _pack_leaf
    layers: list[Layer] = []
    with ThreadPoolExecutor(threads) as pool:
        for layer in weights.layers:
            dense = _map_matrices(replace(layer, experts=()), pool, pack_leaf)
            layers.append(replace(dense, experts=layer.experts))
            if on_progress is not None:
                on_progress(len(layers), len(weights.layers))
        head = _map_matrices(weights.head, pool, pack_leaf)
    return replace(weights, layers=tuple(layers), head=head)


def _map_matrices(node: Node, pool: ThreadPoolExecutor, pack_leaf: PackLeaf) -> Node:
    """Return a tree of dataclasses with its experts and other matrices packed."""
    found: list[Matrix | Expert] = []
    _collect(node, found)
    packed = dict(zip(map(id, found), pool.map(pack_leaf, found), strict=True))
    result: Node = _rebuild(node, packed)
    return result


def _pack_leaf(leaf: Matrix | Expert) -> Matrix | Expert:
    if isinstance(leaf, Matrix):
        return pack_matrix(leaf)
    if isinstance(leaf, PackedExpert):
        return leaf
    form = expert_form(leaf)
    if form is not None:
        record = aligned_bytes(form.nbytes)
        if pack_expert(record, leaf, form):
            return PackedExpert(leaf.w1, leaf.w2, leaf.w3, form, record)
    return Expert(pack_matrix(leaf.w1), pack_matrix(leaf.w2), pack_matrix(leaf.w3))


def _pack_and_copy(leaf: Matrix | Expert) -> Matrix | Expert:
    """The same, and never a view of a file's packed bytes."""
    packed = _pack_leaf(leaf)
    if isinstance(packed, PackedExpert):
        return replace(packed, record=_copied(packed.record))
    if isinstance(packed, Expert):
        return Expert(*map(_own, (packed.w1, packed.w2, packed.w3)))
    return _own(packed)


def _own(weight: Matrix) -> Matrix:
    """Return a matrix whose packed bytes are in memory of our own."""
    if not isinstance(weight, PackedMatrix):
        return weight
    return replace(weight, packed=_copied(weight.packed))


def _copied(data: Packed) -> Packed:
    """Return bytes in memory of our own."""
    if data.flags.writeable:
        return data
    copy = aligned_bytes(data.nbytes)
    copy[:] = data.reshape(-1)
    return copy


def _collect(node: object, found: list[Matrix | Expert]) -> None:
    if isinstance(node, (Matrix, Expert)):
        found.append(node)
    elif is_dataclass(node) and not isinstance(node, HyperConnection):
        for field in fields(node):
            _collect(getattr(node, field.name), found)


def _rebuild(node: Any, packed: dict[int, Matrix | Expert]) -> Any:
    if isinstance(node, (Matrix, Expert)):
        return packed[id(node)]
    if not is_dataclass(node) or isinstance(node, (type, HyperConnection)):
        return node
    return replace(node, **{f.name: _rebuild(getattr(node, f.name), packed) for f in fields(node)})


def families(weights: Weights) -> set[str]:
    """Return the families of kernels that the packed form of a network needs."""
    found: list[Matrix | Expert] = [weights.head]
    for layer in weights.layers:
        _collect(layer, found)
        found += layer.experts
    return {"fast"}.union(*map(_formats_of, found))


def _formats_of(leaf: Matrix | Expert) -> set[str]:
    """Return the names of the formats that a matrix or an expert is or may be packed in."""
    if isinstance(leaf, PackedExpert):
        return {leaf.form.gate_up.name, leaf.form.down.name}
    if isinstance(leaf, Expert):
        return _formats_of(leaf.w1) | _formats_of(leaf.w2) | _formats_of(leaf.w3)
    if isinstance(leaf, PackedMatrix):
        return {leaf.form.name}
    form = _PACKED_FORMS.get(leaf.format)
    names = {form.name} if form is not None else set()
    return names | {B16.name} if leaf.format == blocks.F32 else names


def packed_bytes_of(weights: Weights) -> int:
    """Return the bytes that packed copies of dense weights take; mapped ones do not count."""
    found: list[Matrix | Expert] = [weights.head]
    for layer in weights.layers:
        _collect(layer, found)
    return sum(_copied_bytes(leaf) for leaf in found)


def _copied_bytes(leaf: Matrix | Expert) -> int:
    if isinstance(leaf, PackedExpert):
        return leaf.record.nbytes if leaf.record.flags.writeable else 0
    if isinstance(leaf, Expert):
        return sum(map(_copied_bytes, (leaf.w1, leaf.w2, leaf.w3)))
    copied = isinstance(leaf, PackedMatrix) and leaf.packed.flags.writeable
    return leaf.packed.nbytes if isinstance(leaf, PackedMatrix) and copied else 0
