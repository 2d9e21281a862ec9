"""The weights of a packed folder: views of its maps, laid out as the kernels read them."""

import re
from collections.abc import Callable
from dataclasses import dataclass, field, replace

import numpy as np

from localv4.errors import BadFileError
from localv4.kernels.packed import F8, F8_SPAN, FORMATS, GROUP_ROWS, PackedFormat, group_bytes
from localv4.kernels.packed_kquants import KQUANTS
from localv4.kernels.packing_floats import B16, F32R
from localv4.model import weights as tree
from localv4.model.config import ModelConfig
from localv4.model.config_gguf import config_from_gguf
from localv4.model.config_json import read_config
from localv4.model.matrix import Matrix, Packed
from localv4.model.names import Slice
from localv4.model.packing import ExpertForm, PackedExpert, PackedMatrix
from localv4.model.weights import Expert, Layer, Weights
from localv4.storage.manifest import MatrixEntry
from localv4.storage.packed_folder import PackedFolder

ONLY_PACKED = -1
"""The `format` of a matrix without stored rows: no code of `kernels.blocks`."""

_FLOATS = (B16, F32R)
"""Formats whose last group of rows may be filled up with zeros."""

_FORMATS = {fmt.name: fmt for fmt in (*FORMATS, *KQUANTS, *_FLOATS)}
_SHARED = ".ffn.shared_experts"
_ROUTED = re.compile(r"(layers\.\d+\.ffn\.experts)(\..+)?")
_EXPERT_PART = re.compile(
    r"(layers\.\d+\.ffn\.experts)\.(\d+)\.w[123]\.weight"
    r"|(layers\.\d+\.ffn\.shared_experts)\.w[123]\.weight"
)
_NO_ROWS = np.zeros((1, 1), np.uint8)
_NO_ROWS.setflags(write=False)


def packed_config(folder: PackedFolder) -> ModelConfig:
    """Return the configuration from the GGUF metadata or the `config.json` of a folder.

    Raises NotFoundError or BadFileError.
    """
    if folder.metadata:
        return config_from_gguf(folder.metadata, packed_names(folder), folder.path)
    return read_config(folder.path / "config.json")


def packed_names(folder: PackedFolder) -> dict[str, Slice]:
    """Map official names to tensors; expert matrices are parts of the records of their layer."""
    table: dict[str, Slice] = {}
    for name, tensor in folder.tensors.items():
        entry = folder.manifest.matrices.get(name)
        if entry is None or entry.layout != "records":
            table[name] = Slice(tensor, tensor.shape)
            continue
        narrow, wide = (entry.rows, entry.cols), (entry.cols, entry.rows)
        shared, layer = name.endswith(_SHARED), _layer_of_records(name)
        for prefix in [name] if shared else [f"{layer}.{n}" for n in entry.numbers]:
            for part, shape in (("w1", narrow), ("w2", wide), ("w3", narrow)):
                table[f"{prefix}.{part}.weight"] = Slice(tensor, shape)
    return table


def load_packed_weights(
    folder: PackedFolder,
    config: ModelConfig,
    on_progress: Callable[[int, int], None] | None = None,
) -> Weights:
    """Find every tensor that `config` calls for; `on_progress(layers done, layers)`.

    Packed matrices are `PackedMatrix` without stored rows (format ONLY_PACKED), experts in records
    `PackedExpert`; the rest is as in any other checkpoint. Raises BadFileError naming the tensor
    that is missing or wrong.
    """
    read = PackedReader(folder)
    layers = []
    for index in range(config.n_layers):
        layers.append(read.with_records(tree.read_layer(read, config, index), index))
        if on_progress is not None:
            on_progress(index + 1, config.n_layers)
    hidden, width = config.hidden_size, config.hc_mult * config.hidden_size
    return Weights(
        embed=read.matrix("embed.weight", config.vocab_size, hidden),
        layers=tuple(layers),
        head_hc=tree.read_hyper_connection(read, "hc_head", config.hc_mult, width, 1),
        norm=read.floats("norm.weight", hidden),
        head=read.matrix("head.weight", config.vocab_size, hidden),
    )


@dataclass(slots=True)
class _Records:
    """Form and record of the experts of a layer; `tensor` is the first that holds some of them."""

    tensor: str
    by_number: dict[int, tuple[ExpertForm, Packed]] = field(default_factory=dict)


def _layer_of_records(name: str) -> str:
    """Return what the records of a tensor are part of: all experts of a layer.

    Where the experts of a layer have several forms, each form has a tensor of its own, whose name
    goes on behind that of the whole.
    """
    routed = _ROUTED.fullmatch(name)
    return routed[1] if routed else name


class PackedReader(tree.WeightReader):
    """Takes tensors out of a packed folder by official name; every shape is checked."""

    def __init__(self, folder: PackedFolder) -> None:
        super().__init__(folder, packed_names(folder))
        self._entries = folder.manifest.matrices
        self._records: dict[str, _Records] = {}
        for name, entry in self._entries.items():
            if entry.layout == "records":
                self._add_records(name, entry)

    def matrix(self, name: str, rows: int, cols: int) -> Matrix:
        """Return a matrix, packed or as it is stored; raise BadFileError where it is wrong."""
        inside = _EXPERT_PART.fullmatch(name)
        if inside is not None and (records := inside[1] or inside[3]) in self._records:
            return self._part_of_record(records, int(inside[2] or 0), name, rows, cols)
        entry = self._entries.get(name)
        if entry is None or entry.layout != "packed":
            return super().matrix(name, rows, cols)
        part, form = self._part(name), self._form(name, entry.format, entry.rows, entry.cols)
        if part.shape != (rows, cols):
            raise self._bad(part, f"has shape {part.shape}, expected {(rows, cols)}")
        nbytes = -(-rows // GROUP_ROWS) * group_bytes(form, cols)
        if part.tensor.nbytes != nbytes:
            raise self._bad(part, f"has {part.tensor.nbytes} bytes, {form.name} needs {nbytes}")
        scales = None
        if form is F8:
            scale_name = name.removesuffix(".weight") + ".scale"
            scales = self.floats(scale_name, -(-rows // F8_SPAN), cols // F8_SPAN)
        packed = self.checkpoint.bytes(name)
        return PackedMatrix(ONLY_PACKED, rows, cols, _NO_ROWS, _NO_ROWS, form, packed, scales)

    def with_records(self, layer: Layer, index: int) -> Layer:
        """Return a layer whose experts know the records that hold their matrices."""
        shared, routed = (f"layers.{index}.ffn.{name}" for name in ("shared_experts", "experts"))
        return replace(
            layer,
            shared=self._recorded(shared, (layer.shared,))[0],
            experts=self._recorded(routed, layer.experts),
        )

    def _add_records(self, name: str, entry: MatrixEntry) -> None:
        """Take note of where the experts of a tensor of records lie."""
        form = self._record_form(name, entry)
        data = self.checkpoint.bytes(name).reshape(entry.records, entry.record_bytes)
        found = self._records.setdefault(_layer_of_records(name), _Records(name))
        for number, record in zip(entry.numbers, data, strict=True):
            if number in found.by_number:
                raise self._wrong(name, f"holds expert {number}, as {found.tensor!r} does")
            found.by_number[number] = form, record[: form.nbytes]

    def _recorded(self, name: str, experts: tuple[Expert, ...]) -> tuple[Expert, ...]:
        if name not in self._records:
            return experts
        found = self._records[name]
        if found.by_number.keys() != set(range(len(experts))):
            count = len(found.by_number)
            raise self._wrong(found.tensor, f"holds {count} experts, expected {len(experts)}")
        return tuple(
            PackedExpert(expert.w1, expert.w2, expert.w3, *found.by_number[number])
            for number, expert in enumerate(experts)
        )

    def _part_of_record(
        self, records: str, number: int, name: str, rows: int, cols: int
    ) -> PackedMatrix:
        """Return a projection of an expert; gate and up are every other group of its record."""
        found = self._records[records]
        if number not in found.by_number:
            count = len(found.by_number)
            raise self._wrong(found.tensor, f"holds {count} experts, expert {number} is not there")
        form, record = found.by_number[number]
        is_down = name.endswith("w2.weight")
        shape = (form.hidden, form.inner) if is_down else (form.inner, form.hidden)
        if shape != (rows, cols):
            raise self._wrong(found.tensor, f"holds experts of {shape}, expected {(rows, cols)}")
        if is_down:
            own, packed = form.down, record[form.offset :]
        else:
            groups = record[: form.offset].reshape(-1, 2, group_bytes(form.gate_up, cols))
            own, packed = form.gate_up, groups[:, int(name.endswith("w3.weight"))]
        return PackedMatrix(ONLY_PACKED, rows, cols, _NO_ROWS, _NO_ROWS, own, packed, None)

    def _record_form(self, name: str, entry: MatrixEntry) -> ExpertForm:
        gate_up = self._form(name, entry.format, entry.rows, entry.cols)
        down = self._form(name, entry.down_format, entry.cols, entry.rows)
        if F8 in (gate_up, down) or {gate_up, down} & set(_FLOATS):
            raise self._wrong(name, f"has records of {gate_up.name} and {down.name}")
        form = ExpertForm(gate_up, down, entry.cols, entry.rows)
        if entry.record_bytes < form.nbytes:
            raise self._wrong(
                name, f"has records of {entry.record_bytes} bytes, {form.nbytes} are needed"
            )
        return form

    def _form(self, name: str, format_name: str, rows: int, cols: int) -> PackedFormat:
        """Return a format by its name; raise BadFileError when it cannot be that."""
        form = _FORMATS.get(format_name)
        if form is None:
            raise self._wrong(name, f"is in the packed format {format_name}, which is not known")
        if cols % form.columns_unit or (form not in _FLOATS and rows % GROUP_ROWS):
            raise self._wrong(name, f"is {rows} x {cols}, which has no packed form {form.name}")
        return form

    def _wrong(self, name: str, what: str) -> BadFileError:
        tensor = self.checkpoint.tensors[name]
        return self._bad(Slice(tensor, tensor.shape), what)
