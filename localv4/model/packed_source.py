"""The weights of a packed folder: views of its maps, laid out as the kernels read them."""

import re
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from localv4.errors import BadFileError
from localv4.kernels.packed import (
    F8,
    F8_SPAN,
    FORMATS,
    PackedFormat,
    can_pack,
    down_offset,
    expert_bytes,
    group_bytes,
    packed_bytes,
)
from localv4.model import weights as tree
from localv4.model.config import ModelConfig
from localv4.model.config_gguf import config_from_gguf
from localv4.model.config_json import read_config
from localv4.model.matrix import Floats, Matrix, Packed
from localv4.model.names import Slice
from localv4.model.weights import Expert, Weights
from localv4.storage.manifest import MatrixEntry
from localv4.storage.packed_folder import PackedFolder

ONLY_PACKED = -1
"""The `format` of a matrix without stored rows: no code of `kernels.blocks`."""

_EXPERT_PART = re.compile(r"(layers\.\d+\.ffn\.experts)\.(\d+)\.(w[123])\.weight")
_NO_ROWS = np.zeros((1, 1), np.uint8)
_NO_ROWS.setflags(write=False)


@dataclass(frozen=True, slots=True)
class PackedOnly(Matrix):
    """A matrix that exists in its packed form alone; `data` and `scale` hold nothing.

    `packed` is contiguous, but for the gate and up projections of an expert record: those are
    every other group of it, (groups, group bytes). `scales` (rows / 128, cols / 128) is for F8.
    """

    form: PackedFormat
    packed: Packed
    scales: Floats | None

    @property
    def nbytes(self) -> int:
        """Bytes that one product reads."""
        return self.packed.nbytes + (0 if self.scales is None else self.scales.nbytes)


@dataclass(frozen=True, slots=True)
class RecordPart(PackedOnly):
    """One projection of an expert record; `record` is the whole, as `ExpertRecord.data`."""

    record: Packed


def packed_config(folder: PackedFolder) -> ModelConfig:
    """Return the configuration from the GGUF metadata or the `config.json` of a folder.

    Raises NotFoundError or BadFileError.
    """
    if folder.metadata:
        return config_from_gguf(folder.metadata, packed_names(folder), folder.path)
    return read_config(folder.path / "config.json")


def packed_names(folder: PackedFolder) -> dict[str, Slice]:
    """Map official names to tensors; expert matrices are parts of the records of their layer.

    Drafting modules are never in a packed folder.
    """
    table: dict[str, Slice] = {}
    for name, tensor in folder.tensors.items():
        entry = folder.manifest.matrices.get(name)
        if entry is None or entry.layout != "records":
            table[name] = Slice(tensor, tensor.shape)
            continue
        narrow, wide = (entry.rows, entry.cols), (entry.cols, entry.rows)
        for number in range(entry.records):
            for part, shape in (("w1", narrow), ("w2", wide), ("w3", narrow)):
                table[f"{name}.{number}.{part}.weight"] = Slice(tensor, shape)
    return table


def load_packed_weights(
    folder: PackedFolder,
    config: ModelConfig,
    on_progress: Callable[[int, int], None] | None = None,
) -> Weights:
    """Find every tensor that `config` calls for; `on_progress(layers done, layers)`.

    Matrices in a packed format are `PackedOnly`, those of expert records `RecordPart`; the rest is
    as in any other checkpoint. Raises BadFileError naming the tensor that is wrong.
    """
    read = PackedReader(folder)
    layers = []
    for index in range(config.n_layers):
        layers.append(tree._layer(read, config, index))
        if on_progress is not None:
            on_progress(index + 1, config.n_layers)
    hidden, width = config.hidden_size, config.hc_mult * config.hidden_size
    return Weights(
        embed=read.matrix("embed.weight", config.vocab_size, hidden),
        layers=tuple(layers),
        head_hc=tree._hyper_connection(read, "hc_head", config.hc_mult, width, 1),
        norm=read.floats("norm.weight", hidden),
        head=read.matrix("head.weight", config.vocab_size, hidden),
    )


def expert_record(expert: Expert) -> tuple[PackedFormat, Packed] | None:
    """Return format and bytes of the record that holds an expert, None if there is none."""
    part = expert.w1
    return (part.form, part.record) if isinstance(part, RecordPart) else None


class PackedReader(tree.WeightReader):
    """Takes tensors out of a packed folder by official name; every shape is checked."""

    def __init__(self, folder: PackedFolder) -> None:
        super().__init__(folder, packed_names(folder))
        self._entries = folder.manifest.matrices
        self._forms = {
            name: self._form(name, entry)
            for name, entry in self._entries.items()
            if entry.layout != "rows"
        }
        self._records = {
            name: folder.bytes(name).reshape(entry.records, entry.record_bytes)
            for name, entry in self._entries.items()
            if entry.layout == "records"
        }

    def matrix(self, name: str, rows: int, cols: int) -> Matrix:
        """Return a matrix, packed or as it is stored; raise BadFileError where it is wrong."""
        inside = _EXPERT_PART.fullmatch(name)
        if inside is not None and inside[1] in self._records:
            return self._record_part(inside[1], int(inside[2]), inside[3], rows, cols)
        entry = self._entries.get(name)
        if entry is None or entry.layout != "packed":
            return super().matrix(name, rows, cols)
        part, form = self._part(name), self._forms[name]
        if part.shape != (rows, cols):
            raise self._bad(part, f"has shape {part.shape}, expected {(rows, cols)}")
        nbytes = packed_bytes(form, rows, cols)
        if part.tensor.nbytes != nbytes:
            raise self._bad(part, f"has {part.tensor.nbytes} bytes, {form.name} needs {nbytes}")
        scales = None
        if form is F8:
            scale_name = name.removesuffix(".weight") + ".scale"
            scales = self.floats(scale_name, -(-rows // F8_SPAN), cols // F8_SPAN)
        packed = self.checkpoint.bytes(name)
        return PackedOnly(ONLY_PACKED, rows, cols, _NO_ROWS, _NO_ROWS, form, packed, scales)

    def _record_part(self, layer: str, number: int, which: str, rows: int, cols: int) -> RecordPart:
        entry, records = self._entries[layer], self._records[layer]
        expected = (cols, rows) if which == "w2" else (rows, cols)
        if number >= entry.records or (entry.rows, entry.cols) != expected:
            shape = (entry.records, entry.rows, entry.cols)
            raise self._wrong(layer, f"holds experts {shape}, expected {which} {(rows, cols)}")
        form, inner, hidden = self._forms[layer], entry.rows, entry.cols
        record = records[number][: expert_bytes(form, hidden, inner)]
        down = down_offset(form, hidden, inner)
        if which == "w2":
            packed = record[down:]
        else:
            pairs = record[:down].reshape(-1, 2, group_bytes(form, hidden))
            packed = pairs[:, 0 if which == "w1" else 1]
        return RecordPart(ONLY_PACKED, rows, cols, _NO_ROWS, _NO_ROWS, form, packed, None, record)

    def _form(self, name: str, entry: MatrixEntry) -> PackedFormat:
        """Return the format of packed bytes; raise BadFileError when they cannot have it."""
        form = next((known for known in FORMATS if known.name == entry.format), None)
        if form is None:
            raise self._wrong(name, f"is in the packed format {entry.format}, which is not known")
        shapes = [(entry.rows, entry.cols)]
        if entry.layout == "records":
            shapes.append((entry.cols, entry.rows))
        if not all(can_pack(form, *shape) for shape in shapes):
            raise self._wrong(name, f"{entry.rows} x {entry.cols} has no packed form {form.name}")
        if entry.layout == "records":
            least = expert_bytes(form, entry.cols, entry.rows)
            if form is F8 or entry.record_bytes < least:
                raise self._wrong(name, f"its records are too short for {form.name}")
        return form

    def _wrong(self, name: str, what: str) -> BadFileError:
        tensor = self.checkpoint.tensors[name]
        return self._bad(Slice(tensor, tensor.shape), what)
