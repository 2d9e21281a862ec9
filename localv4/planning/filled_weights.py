"""The weights of a network in packed formats, all of one small value: for measurements.

Kernels do the same work on them as on any others, as long as none of them is a NaN, an infinity, or
so small that the processor treats it apart.
"""

from dataclasses import replace

import numpy as np

from localv4.kernels import blocks
from localv4.kernels.buffers import aligned_bytes
from localv4.kernels.packed import F8, F8_SPAN
from localv4.model.config import ModelConfig
from localv4.model.matrix import F32, Floats, Matrix, Packed
from localv4.model.packed_source import ONLY_PACKED
from localv4.model.packing import ExpertForm, PackedExpert, PackedMatrix
from localv4.model.weights import (
    Expert,
    Router,
    WeightReader,
    Weights,
    read_hyper_connection,
    read_layer,
)
from localv4.planning.network import Role
from localv4.planning.recipes import FORMATS_BY_NAME, Recipe, matrix_bytes

DISTINCT_EXPERTS = 12
"""Records of a layer that differ; the others share their memory. Equal logits always choose the
same experts, the first ones."""

VALUE = 1 / 64
_BYTES = {"MX4": 0x78, "B16": 0x3C, "F32R": 0x3C}
"""What fills a matrix, by format: MX4 scales of 2^-7, floats of a hundredth."""
_OTHER_BYTE = 0x20
"""Small integers and scales in all other formats."""
_NO_ROWS = np.zeros((1, 1), np.uint8)

_ROLES: tuple[tuple[str, Role], ...] = (
    ("compressor.", "compressor"),
    ("weights_proj", "index_weights"),
    ("indexer.", "indexer"),
    ("attn.wkv", "attention_kv"),
    ("attn.wq", "attention_q"),
    ("attn.wo", "attention_o"),
    ("shared_experts.w2", "shared_down"),
    ("shared_experts", "shared_gate_up"),
    ("gate.", "router"),
    ("head.", "head"),
)
"""The first part that is found in a tensor's name tells its role."""


def filled_weights(config: ModelConfig, recipe: Recipe) -> Weights:
    """Return the weights of a network without hash layers in the formats of a recipe."""
    read = _FilledReader(recipe)
    hidden, streams = config.hidden_size, config.hc_mult
    layers = []
    for index in range(config.n_layers):
        layer = read_layer(read, replace(config, n_experts=1), index)
        records = [read.expert(hidden, config.expert_width) for _ in range(DISTINCT_EXPERTS)]
        experts = tuple(records[i % DISTINCT_EXPERTS] for i in range(config.n_experts))
        gate = read.matrix("ffn.gate.weight", config.n_experts, hidden)
        router = Router(gate, read.floats("bias", config.n_experts), None)
        layers.append(replace(layer, router=router, experts=experts))
    return Weights(
        embed=read.stored(config.vocab_size, hidden),
        layers=tuple(layers),
        head_hc=read_hyper_connection(read, "hc_head", streams, streams * hidden, 1),
        norm=read.floats("norm.weight", hidden),
        head=read.matrix("head.weight", config.vocab_size, hidden),
    )


class _FilledReader(WeightReader):
    """Makes each tensor that is asked for."""

    def __init__(self, recipe: Recipe) -> None:
        self._recipe = recipe

    def matrix(self, name: str, rows: int, cols: int) -> Matrix:
        """Return a packed matrix; those of the hyper-connections are stored in float32."""
        role = next((role for part, role in _ROLES if part in name), None)
        if role is None:
            return self.stored(rows, cols)
        return _packed(self._recipe.format_of(role), rows, cols)

    def stored(self, rows: int, cols: int) -> Matrix:
        """Return a matrix in float32."""
        data = np.full((rows, cols), VALUE, F32).view(np.uint8)
        return Matrix(blocks.F32, rows, cols, data, _NO_ROWS)

    def floats(self, name: str, *shape: int) -> Floats:
        """Return small numbers."""
        return np.full(shape, VALUE, F32)

    def expert(self, hidden: int, inner: int) -> Expert:
        """Return a routed expert, one record."""
        names = (self._recipe.format_of(role) for role in ("experts_gate_up", "experts_down"))
        gate_up, down = (FORMATS_BY_NAME[name] for name in names)
        form = ExpertForm(gate_up, down, hidden, inner)
        record = aligned_bytes(form.nbytes)
        record[: form.offset] = _byte_of(gate_up.name)
        record[form.offset :] = _byte_of(down.name)
        return _recorded(form, record)


def _packed(name: str, rows: int, cols: int) -> PackedMatrix:
    fmt = FORMATS_BY_NAME[name]
    scales, nbytes = None, matrix_bytes(name, rows, cols)
    if fmt is F8:
        scales = np.full((-(-rows // F8_SPAN), cols // F8_SPAN), VALUE, F32)
        nbytes -= scales.nbytes
    data = aligned_bytes(nbytes)
    data[:] = _byte_of(name)
    return PackedMatrix(ONLY_PACKED, rows, cols, _NO_ROWS, _NO_ROWS, fmt, data, scales)


def _recorded(form: ExpertForm, record: Packed) -> PackedExpert:
    """Return an expert whose matrices are nothing but their shapes: kernels see the record."""
    wide, narrow = (form.hidden, form.inner), (form.inner, form.hidden)
    gate, down = (
        PackedMatrix(ONLY_PACKED, *shape, _NO_ROWS, _NO_ROWS, fmt, record, None)
        for shape, fmt in ((narrow, form.gate_up), (wide, form.down))
    )
    return PackedExpert(gate, down, gate, form, record)


def _byte_of(name: str) -> int:
    return _BYTES.get(name, _OTHER_BYTE)
