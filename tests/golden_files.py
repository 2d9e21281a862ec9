"""The golden models: loaded with their reference logits, written in every safetensors naming."""

import json
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal

import numpy as np
from golden.names import hybrid_name, module_weights
from golden.presets import PRESETS, Preset, official_config
from golden.storage import Stored, official_storage
from golden.weights import Array, random_weights
from numpy.typing import NDArray

GOLDEN = Path(__file__).parent / "golden"

ConfigStyle = Literal["official", "transformers"]
Naming = Literal["official", "hybrid", "modules"]


@dataclass(frozen=True, slots=True)
class GoldenModel:
    """A tiny random model.

    `weights` has official names; float32 (`tid2eid` int64), exactly what `stored` stands for.
    `stored` has the tensors of the official storage, if the preset has that, else nothing.
    `oracle`: `input_ids` (S,), `logits_prefill` (S, V) f32, `layer{l}_topk` (S, k) int16, sorted,
    -1 = none; and at every 16th position `layer{l}_attn`, `layer{l}_mlp` (., D),
    `layer{l}_out` (., N, D), `hc_head` (., D). Empty for a model without a reference.
    """

    name: str
    preset: Preset
    weights: Mapping[str, Array]
    stored: Mapping[str, Stored]
    oracle: Mapping[str, NDArray[Any]]

    @property
    def input_ids(self) -> list[int]:
        """The prompt."""
        return [int(token) for token in self.oracle["input_ids"]]

    @property
    def logits(self) -> NDArray[np.float32]:
        """Logits of transformers for each position of the prompt, (S, V)."""
        logits: NDArray[np.float32] = self.oracle["logits_prefill"]
        return logits

    def config(self, style: ConfigStyle) -> dict[str, Any]:
        """Return `config.json` with official (older) keys, or as transformers wrote it."""
        if style == "official":
            return official_config(self.preset)
        text = (GOLDEN / self.name / "config.json").read_text(encoding="utf-8")
        config: dict[str, Any] = json.loads(text)
        return config


@lru_cache
def load_golden(name: str) -> GoldenModel:
    """Return the fixture `name` of `golden.presets.PRESETS`; its arrays are read-only."""
    with np.load(GOLDEN / name / "oracle.npz") as archive:
        oracle = {key: archive[key] for key in archive.files}
    return _model(PRESETS[name], oracle)


@lru_cache
def random_model(preset: Preset) -> GoldenModel:
    """Return a model of any dimensions, without reference logits; its arrays are read-only."""
    return _model(preset, {})


def _model(preset: Preset, oracle: dict[str, NDArray[Any]]) -> GoldenModel:
    weights, stored = random_weights(preset), dict[str, Stored]()
    if preset.official_storage:
        stored, weights = official_storage(weights)
    for array in (*weights.values(), *oracle.values()):
        array.flags.writeable = False
    return GoldenModel(preset.name, preset, weights, stored, oracle)


def write_model(
    model: GoldenModel,
    folder: Path,
    *,
    naming: Naming = "official",
    config: ConfigStyle = "official",
    shards: int = 2,
) -> Path:
    """Write a folder of float32 safetensors, with an index if there is more than one shard.

    naming: "official"; "hybrid" as `save_pretrained` of transformers; "modules" as its state dict,
    experts fused.
    """
    weights = model.weights
    if naming == "hybrid":
        weights = {hybrid_name(name): values for name, values in weights.items()}
    elif naming == "modules":
        weights = module_weights(weights)
    tensors = {name: Stored.of(values) for name, values in weights.items()}
    return write_folder(folder, tensors, model.config(config), shards=shards)


def write_stored(
    model: GoldenModel, folder: Path, *, config: ConfigStyle = "official", shards: int = 2
) -> Path:
    """Write a folder with the official names and types (FP8, FP4, BF16, F32, I64)."""
    return write_folder(folder, model.stored, model.config(config), shards=shards)


def write_folder(
    folder: Path, tensors: Mapping[str, Stored], config: Mapping[str, Any], *, shards: int
) -> Path:
    """Write `config.json` and the tensors, dealt out to the shards in turn; return the folder."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config, indent=2), encoding="utf-8")
    names = sorted(tensors)
    if shards == 1:
        write_safetensors(folder / "model.safetensors", tensors)
        return folder
    weight_map: dict[str, str] = {}
    for shard in range(shards):
        file = f"model-{shard + 1:05d}-of-{shards:05d}.safetensors"
        chosen = names[shard::shards]
        weight_map |= dict.fromkeys(chosen, file)
        write_safetensors(folder / file, {name: tensors[name] for name in chosen})
    total = sum(len(tensor.data) for tensor in tensors.values())
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index), encoding="utf-8")
    return folder


def write_safetensors(path: Path, tensors: Mapping[str, Stored]) -> None:
    """Write one file: header size (u64), JSON header padded to 8 bytes, data without gaps."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for name, tensor in tensors.items():
        end = offset + len(tensor.data)
        header[name] = {
            "dtype": tensor.dtype,
            "shape": list(tensor.shape),
            "data_offsets": [offset, end],
        }
        offset = end
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for tensor in tensors.values():
            file.write(tensor.data)
