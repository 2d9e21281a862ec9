"""What a model costs, from the headers of its files: any form that can be opened."""

import math
import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, replace

from localv4.model.config import ModelConfig
from localv4.model.loading import read_model_config, read_names
from localv4.model.names import Slice
from localv4.planning.model_facts import EMBEDDING, HEAD, ROUTED, ModelFacts, Part
from localv4.planning.recipes import F32_BYTES, FORMATS_BY_NAME, TABLE_BYTES, matrix_bytes
from localv4.storage import Checkpoint, PackedFolder

IN_MEMORY = {
    "I8": "MX4",
    "MXFP4": "MX4",
    "Q4_0": "Q4",
    "Q8_0": "Q8",
    "F8_E4M3": "F8",
    "Q4_K": "Q4K",
    "Q6_K": "Q6",
    "Q3_K": "Q3",
    "Q2_K": "Q2",
    "IQ2_XXS": "IQ2",
    "BF16": "B16",
    "F16": "F32R",
    "F32": "B16",  # files of float32 hold the published bfloat16 values
}
"""The packed format of a stored type, as `model.packing` chooses it from the values."""

_FP4 = "I8"
_LAYER = re.compile(r"layers\.(\d+)\.(.+)")
_COMPONENTS = (
    ("ffn.experts", ROUTED),
    ("ffn.shared_experts", "shared experts"),
    ("ffn.gate.", "router"),
    ("attn.compressor.", "compressor and indexer"),
    ("attn.indexer.", "compressor and indexer"),
    ("attn.", "attention"),
    ("hc_", "hyper-connections"),
)
_LOOKED_UP = ("ape", "tid2eid")


@dataclass(frozen=True, slots=True)
class _Weight:
    """One tensor, or a part of one, in the form that it has in memory."""

    component: str
    layer: int
    leaf: str
    format: str
    rows: int
    nbytes: int


def facts_of_checkpoint(
    name: str, quant: str, checkpoint: Checkpoint, *, download_bytes: int | None = None
) -> ModelFacts:
    """Return what an opened model costs; nothing but headers is read.

    Raises NotFoundError or BadFileError.
    """
    table = read_names(checkpoint)
    config = read_model_config(checkpoint, table)
    facts = facts_of_tensors(checkpoint, table, config, name=name, quant=quant)
    return replace(facts, download_bytes=download_bytes)


def facts_of_tensors(
    checkpoint: Checkpoint,
    table: Mapping[str, Slice],
    config: ModelConfig,
    *,
    name: str,
    quant: str = "",
) -> ModelFacts:
    """Return what an opened model costs whose tensors, by official name, are known already."""
    packed = checkpoint if isinstance(checkpoint, PackedFolder) else None
    weights = _packed_weights(packed) if packed is not None else _stored_weights(table)
    resident: Counter[tuple[str, str]] = Counter()
    read: Counter[tuple[str, str]] = Counter()
    experts: Counter[int] = Counter()
    formats: dict[str, None] = {}
    for weight in weights:
        if weight.component == ROUTED:
            experts[weight.layer] += weight.nbytes
            formats |= dict.fromkeys(weight.format.split("+"))
        elif weight.component != EMBEDDING:
            key = (weight.component, weight.format)
            resident[key] += weight.nbytes
            is_looked_up = weight.leaf.endswith(_LOOKED_UP)
            read[key] += weight.nbytes // weight.rows if is_looked_up else weight.nbytes
    return ModelFacts(
        name=name,
        quant=quant,
        config=config,
        parts=tuple(Part(*key, nbytes, read[key]) for key, nbytes in resident.items()),
        expert_bytes=tuple(experts[i] // config.n_experts for i in range(config.n_layers)),
        expert_format="+".join(formats),
        file_bytes=sum(tensor.nbytes for tensor in checkpoint.tensors.values()),
        is_packed=packed is not None,
    )


def _packed_weights(folder: PackedFolder) -> list[_Weight]:
    found = []
    for name, tensor in folder.tensors.items():
        component, layer, leaf = _place(name)
        entry = folder.manifest.matrices.get(name)
        kind = tensor.dtype.name if entry is not None else "F32"
        if entry is None and tensor.dtype.name != "F32" and len(tensor.shape) > 1:
            kind = IN_MEMORY.get(tensor.dtype.name, tensor.dtype.name)
        rows = tensor.shape[0] if tensor.shape else 1
        found.append(_Weight(component, layer, leaf, kind, rows, tensor.nbytes))
    return found


def _stored_weights(table: Mapping[str, Slice]) -> list[_Weight]:
    found = []
    for name, part in table.items():
        if name.endswith(".scale") and name.removesuffix(".scale") + ".weight" in table:
            continue  # counted with its matrix
        component, layer, leaf = _place(name)
        kind, nbytes = _in_memory(leaf, part)
        rows = part.shape[0] if part.shape else 1
        found.append(_Weight(component, layer, leaf, kind, rows, nbytes))
    return found


def _in_memory(leaf: str, part: Slice) -> tuple[str, int]:
    """Return the format and the bytes that a stored tensor has in memory."""
    stored, size = part.tensor.dtype.name, math.prod(part.shape)
    if leaf.endswith("tid2eid"):
        return "F32", TABLE_BYTES * size
    if leaf.startswith("hc_") or len(part.shape) != 2 or leaf.endswith("ape"):
        return "F32", F32_BYTES * size
    rows, cols = part.shape
    if stored == _FP4:
        cols *= 2
    kind = IN_MEMORY.get(stored)
    if kind is None or cols % FORMATS_BY_NAME[kind].columns_unit:
        return stored, part.tensor.dtype.nbytes(size)  # multiplied as it is stored
    return kind, matrix_bytes(kind, rows, cols)


def _place(name: str) -> tuple[str, int, str]:
    """Return the component of an official name, its layer, and its name there."""
    match = _LAYER.fullmatch(name)
    if match is None:
        if name == "embed.weight":
            return EMBEDDING, -1, name
        if name == "head.weight":
            return HEAD, -1, name
        return ("hyper-connections" if name.startswith("hc_head") else "norms"), -1, name
    leaf = match[2]
    component = next((found for prefix, found in _COMPONENTS if leaf.startswith(prefix)), "norms")
    return component, int(match[1]), leaf
