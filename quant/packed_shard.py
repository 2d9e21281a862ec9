"""The tensors of one shard of a packed folder, from the weights of any checkpoint.

Nothing is converted here: a shard is a list of tensors whose bytes are computed when it is their
turn to be written.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial

import numpy as np
from numpy.typing import NDArray

from localv4.errors import BadFileError
from localv4.kernels import blocks
from localv4.kernels.buffers import aligned_bytes
from localv4.kernels.packed import F8, GROUP_ROWS, PackedFormat, group_bytes
from localv4.kernels.packing import f8_scales
from localv4.kernels.packing_floats import F32R, groups_of, pack_f32
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
from quant.choice import Choice
from quant.converter import Converter, ggml_name
from quant.decision import Decision
from quant.output_file import Buffers, Job, Lent
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
from quant.strips import give_back
from quant.tensor_class import class_of, layer_of

Leaf = Matrix | Floats | NDArray[np.int64]
Choose = Callable[[str, Matrix], Choice]

PLAIN_TYPES = {
    blocks.F32: "F32",
    blocks.F16: "F16",
    blocks.BF16: "BF16",
    blocks.F8: "F8_E4M3",
}
"""Stored types with a name of their own in safetensors."""

PARTS = ("w1", "w2", "w3")


@dataclass(slots=True)
class Shard:
    """The tensors of one file, what the manifest says about them, and what was decided."""

    name: str
    tensors: list[ShardTensor] = field(default_factory=list)
    entries: dict[str, MatrixEntry] = field(default_factory=dict)
    decisions: list[Decision] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class ShardSource:
    """What belongs into a shard: leaves and groups of experts by official name."""

    name: str
    leaves: Mapping[str, Leaf]
    experts: Mapping[str, tuple[Expert, ...]]


def build_shard(source: ShardSource, converter: Converter, choose: Choose) -> Shard:
    """Lay out a shard; `choose` says what becomes of a matrix. Nothing is converted yet.

    Writing raises BadFileError, naming the tensor, when a weight is not finite.
    """
    shard = Shard(source.name)
    for name, experts in source.experts.items():
        _add_experts(shard, name, experts, converter, choose)
    for name, leaf in source.leaves.items():
        if isinstance(leaf, Matrix):
            _add_matrix(shard, name, leaf, choose(name, leaf), converter)
        else:
            dtype = "I64" if leaf.dtype == np.int64 else "F32"
            shard.tensors.append(stored_array(name, dtype, leaf))
    return shard


def expert_prefixes(name: str, experts: Sequence[Expert]) -> list[str]:
    """Return how official names of each expert's matrices begin; a shared one has no number."""
    is_shared = name.endswith("shared_experts")
    return [name] if is_shared else [f"{name}.{number}" for number in range(len(experts))]


def stays_stored(name: str) -> bool:
    """Tell which matrices are never packed one by one.

    The embedding is looked up by row, those of hyper-connections are tiny, and routed experts that
    have no record are multiplied as they are stored.
    """
    return name == "embed.weight" or "hc_" in name or ".ffn.experts." in name


def kept_form(name: str, matrix: Matrix) -> PackedFormat | None:
    """Return the packed format that keeps the values of a matrix, None if it stays as stored."""
    return None if stays_stored(name) else packed_form(matrix)


def kept_bits(matrix: Matrix) -> float:
    """Return the bits of a weight in the form that a packed folder keeps it in."""
    form = packed_form(matrix)
    if form is None:
        return 8 * matrix.nbytes / (matrix.rows * matrix.cols)
    return 8 * form.superblock_bytes / (GROUP_ROWS * form.columns)


# --- matrices


def _add_matrix(
    shard: Shard, name: str, matrix: Matrix, choice: Choice, converter: Converter
) -> None:
    form = _form_of(name, matrix, choice)
    if form is not None:
        kind = form.name
        tensor = _packed_tensor(name, matrix, form, choice, converter)
        shard.entries[name] = MatrixEntry("packed", form.name, matrix.rows, matrix.cols)
        if form is F8:
            scales = partial(f8_scales, matrix.scale)
            shape = tuple(matrix.scale.shape)
            shard.tensors.append(ShardTensor(_scale_name(name), "F32", shape, lambda: [scales]))
    else:
        kind, tensor = _stored_tensor(shard, name, matrix, choice, converter)
    shard.tensors.append(tensor)
    shard.decisions.append(
        Decision(
            name=name,
            kind=class_of(name),
            layer=layer_of(name),
            rows=matrix.rows,
            cols=matrix.cols,
            count=1,
            source=blocks.FORMATS[matrix.format],
            format=kind,
            is_exact=choice.target is None,
            source_bytes=matrix.nbytes,
            nbytes=tensor.nbytes,
            note=choice.note_on(kind),
        )
    )


def _form_of(name: str, matrix: Matrix, choice: Choice) -> PackedFormat | None:
    """Return the packed format that a matrix gets, None if it stays rows."""
    if choice.target is None:
        return kept_form(name, matrix)
    return None if stays_stored(name) else packed_form(_example(matrix, choice))


def _example(matrix: Matrix, choice: Choice) -> Matrix:
    """Return a matrix without data in the format that is chosen."""
    if choice.target is None:
        return matrix
    fmt = blocks.FORMATS.index(ggml_name(choice.target))
    return Matrix(fmt, matrix.rows, matrix.cols, np.zeros((0, 0), np.uint8), _NO_SCALE)


_NO_SCALE = np.zeros((1, 1), np.uint8)


def _packed_tensor(
    name: str, matrix: Matrix, form: PackedFormat, choice: Choice, converter: Converter
) -> ShardTensor:
    def pack(first: int, end: int) -> Packed:
        part = converter.rows(name, matrix, first, end, choice)
        packed = _pack_floats(part) if form is F32R else pack_matrix(part)
        give_back(matrix_rows(matrix, first, end))
        if isinstance(packed, Matrix):
            if not isinstance(packed, PackedMatrix):
                raise BadFileError(converter.path, f"tensor {name!r} holds a NaN")
            return packed.packed
        return packed

    def parts() -> Iterator[Job]:
        for first, end in converter.spans(name, matrix):
            yield partial(pack, first, end)

    groups = -(-matrix.rows // GROUP_ROWS)
    return packed_bytes_tensor(name, groups * group_bytes(form, matrix.cols), parts)


def matrix_rows(matrix: Matrix, first: int, end: int) -> Matrix:
    """Return the rows of a matrix whose pages have been read; scales are small and stay."""
    return Matrix(matrix.format, end - first, matrix.cols, matrix.data[first:end], _NO_SCALE)


def _pack_floats(part: Matrix) -> Packed:
    """Pack rows of float32, also where no digit below those of bfloat16 is set in them."""
    groups = groups_of(part.rows)
    out = aligned_bytes(groups * group_bytes(F32R, part.cols))
    if part.format == blocks.F32:
        pack_f32(out, part.data.reshape(-1), part.cols, 0, groups, 1)
        return out
    packed = pack_matrix(part)
    assert isinstance(packed, PackedMatrix)
    return packed.packed


def _stored_tensor(
    shard: Shard, name: str, matrix: Matrix, choice: Choice, converter: Converter
) -> tuple[str, ShardTensor]:
    """Return a matrix as rows: as they are stored, or in blocks of a ggml type."""
    fmt = _example(matrix, choice).format

    def convert(first: int, end: int) -> Packed:
        part = converter.rows(name, matrix, first, end, choice)
        raw = np.array(part.data)
        give_back(matrix_rows(matrix, first, end))
        return raw

    def parts() -> Iterator[Job]:
        for first, end in converter.spans(name, matrix):
            yield partial(convert, first, end)

    row_bytes = blocks.row_bytes(fmt, matrix.cols)
    if fmt in PLAIN_TYPES:
        return PLAIN_TYPES[fmt], _with_scale(
            shard, matrix, ShardTensor(name, PLAIN_TYPES[fmt], (matrix.rows, matrix.cols), parts)
        )
    if fmt != blocks.FP4:
        kind = blocks.FORMATS[fmt]
        shard.entries[name] = MatrixEntry("rows", kind, matrix.rows, matrix.cols)
    tensor = ShardTensor(name, PACKED_BYTES, (matrix.rows, row_bytes), parts)
    return blocks.FORMATS[fmt], _with_scale(shard, matrix, tensor)


def _with_scale(shard: Shard, matrix: Matrix, tensor: ShardTensor) -> ShardTensor:
    if tensor.dtype == "F8_E4M3" or (
        matrix.format == blocks.FP4 and tensor.name not in shard.entries
    ):
        scale = stored_array(_scale_name(tensor.name), "F8_E8M0", matrix.scale)
        shard.tensors.append(scale)
    return tensor


def _scale_name(name: str) -> str:
    return name.removesuffix(".weight") + ".scale"


# --- experts


@dataclass(frozen=True, slots=True)
class _PlannedExpert:
    """An expert of a layer: what its matrices become, and the form of its record."""

    number: int
    expert: Expert
    gate_up: Choice
    down: Choice
    form: ExpertForm


def _add_experts(
    shard: Shard,
    name: str,
    experts: tuple[Expert, ...],
    converter: Converter,
    choose: Choose,
) -> None:
    """Add the experts of a layer: records by their form, or else matrix by matrix."""
    prefixes = expert_prefixes(name, experts)
    by_form: dict[ExpertForm, list[_PlannedExpert]] = {}
    for number, (prefix, expert) in enumerate(zip(prefixes, experts, strict=True)):
        gate_up = choose(f"{prefix}.w1.weight", expert.w1)
        down = choose(f"{prefix}.w2.weight", expert.w2)
        form = _record_form(expert, gate_up, down)
        if form is None:
            _add_single_matrices(shard, prefixes, experts, converter, choose)
            return
        planned = _PlannedExpert(number, expert, gate_up, down, form)
        by_form.setdefault(form, []).append(planned)
    for form in sorted(by_form, key=lambda form: (-form.nbytes, form.gate_up.name)):
        tensor_name = name if len(by_form) == 1 else f"{name}.{_label(form)}"
        numbers = () if len(by_form) == 1 else tuple(p.number for p in by_form[form])
        _add_records(shard, tensor_name, prefixes, by_form[form], numbers, converter)


def _record_form(expert: Expert, gate_up: Choice, down: Choice) -> ExpertForm | None:
    return expert_form(
        Expert(
            _example(expert.w1, gate_up), _example(expert.w2, down), _example(expert.w3, gate_up)
        )
    )


def _add_single_matrices(
    shard: Shard,
    prefixes: Sequence[str],
    experts: tuple[Expert, ...],
    converter: Converter,
    choose: Choose,
) -> None:
    """Add experts that have no records.

    Those of a layer that are routed stay as they are stored: rounding them would leave them without
    a packed form all the same.
    """
    for prefix, expert in zip(prefixes, experts, strict=True):
        for part, matrix in zip(PARTS, (expert.w1, expert.w2, expert.w3), strict=True):
            name = f"{prefix}.{part}.weight"
            choice = choose(name, matrix)
            if stays_stored(name):
                choice = Choice(None, note="its layer has experts without a packed form")
            _add_matrix(shard, name, matrix, choice, converter)


def _add_records(
    shard: Shard,
    name: str,
    prefixes: Sequence[str],
    planned: Sequence[_PlannedExpert],
    numbers: tuple[int, ...],
    converter: Converter,
) -> None:
    form = planned[0].form
    record_bytes = rounded_up(form.nbytes, PAGE)

    def parts() -> Iterator[Job]:
        buffers = Buffers(record_bytes)
        for item in planned:
            yield partial(_record, item, prefixes[item.number], buffers, converter)

    shard.tensors.append(records_tensor(name, len(planned), record_bytes, parts))
    shard.entries[name] = MatrixEntry(
        "records",
        form.gate_up.name,
        form.inner,
        form.hidden,
        form.down.name,
        len(planned),
        record_bytes,
        numbers,
    )
    shard.decisions += _decisions_of_records(name, prefixes, planned)


def _record(item: _PlannedExpert, prefix: str, buffers: Buffers, converter: Converter) -> Lent:
    """Return the record of an expert, filled up with zeros."""
    form, expert = item.form, item.expert
    lent = buffers.take()
    record = lent.data
    record[form.nbytes :] = 0
    converted = Expert(
        converter.convert(f"{prefix}.w1.weight", expert.w1, item.gate_up),
        converter.convert(f"{prefix}.w2.weight", expert.w2, item.down),
        converter.convert(f"{prefix}.w3.weight", expert.w3, item.gate_up),
    )
    if not pack_expert(record[: form.nbytes], converted, form):
        raise BadFileError(converter.path, f"expert {prefix} holds a NaN")
    for matrix in (expert.w1, expert.w2, expert.w3):
        give_back(matrix)
    return lent


def _decisions_of_records(
    name: str, prefixes: Sequence[str], planned: Sequence[_PlannedExpert]
) -> Iterator[Decision]:
    first, count = planned[0], len(planned)
    form, prefix = first.form, prefixes[first.number]
    expert = first.expert
    for part, matrix, choice, fmt, share in (
        ("w1", expert.w1, first.gate_up, form.gate_up, form.offset),
        ("w2", expert.w2, first.down, form.down, form.nbytes - form.offset),
    ):
        copies = 2 if part == "w1" else 1
        yield Decision(
            name=name,
            kind=class_of(f"{prefix}.{part}.weight"),
            layer=layer_of(name),
            rows=matrix.rows,
            cols=matrix.cols,
            count=copies * count,
            source=blocks.FORMATS[matrix.format],
            format=fmt.name,
            is_exact=choice.target is None,
            source_bytes=copies * count * matrix.nbytes,
            nbytes=count * share,
            note=choice.note_on(fmt.name),
        )


def _label(form: ExpertForm) -> str:
    names = dict.fromkeys((form.gate_up.name, form.down.name))
    return "_".join(names)
