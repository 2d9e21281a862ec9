"""What the headers of a model's files tell about it."""

import math
import re
from collections import Counter, defaultdict
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from localv4.cli.generation import format_bytes
from localv4.library.installed import InstalledModel
from localv4.model.config import LayerKind, ModelConfig
from localv4.model.loading import read_model_config, read_names
from localv4.model.names import Slice
from localv4.storage import StoredTensor, open_checkpoint

Rows = list[tuple[str, str]]

# Bytes of a model card that are searched for the line that names the license.
MAX_CARD_BYTES = 4096
LICENSE_LINE = re.compile(rb"^license:[ \t]*[\"']?([^\"'\r\n]{1,80})", re.MULTILINE)

ROUTED_EXPERT = re.compile(r"layers\.\d+\.ffn\.experts\.\d+\.")
# Stored as tensors, but not counted as parameters: scales, expert tables, balancing biases.
NOT_PARAMETERS = re.compile(r"\.(scale|weight_scale_inv|gate\.tid2eid|gate\.bias)$")


@dataclass(frozen=True, slots=True)
class ModelFile:
    """One weight file."""

    name: str
    nbytes: int


@dataclass(frozen=True, slots=True)
class Description:
    """A model as its headers describe it."""

    model: InstalledModel
    config: ModelConfig
    table: Mapping[str, Slice]  # the network's tensors by official name, drafting modules left out
    tensors: tuple[StoredTensor, ...]
    files: tuple[ModelFile, ...]
    license: str

    @property
    def parameters(self) -> int:
        """Number of weights in the network; FP4 is stored as two in a byte."""
        return sum(
            math.prod(part.shape) * (2 if part.tensor.dtype.name == "I8" else 1)
            for name, part in self.table.items()
            if not NOT_PARAMETERS.search(name)
        )

    @property
    def expert_bytes(self) -> int:
        """Mean bytes of one routed expert, its scales included."""
        total = sum(
            _slice_bytes(part) for name, part in self.table.items() if ROUTED_EXPERT.match(name)
        )
        return total // (self.config.n_layers * self.config.n_experts)

    @property
    def bytes_by_type(self) -> dict[str, tuple[int, int]]:
        """(tensors, bytes) of each storage type, the largest first."""
        counts: Counter[str] = Counter()
        sizes: defaultdict[str, int] = defaultdict(int)
        for tensor in self.tensors:
            counts[tensor.dtype.name] += 1
            sizes[tensor.dtype.name] += tensor.nbytes
        ordered = sorted(sizes, key=lambda name: -sizes[name])
        return {name: (counts[name], sizes[name]) for name in ordered}

    def sections(self) -> list[tuple[str, Rows]]:
        """Return titled rows for display."""
        return [
            ("Model", self._model_rows()),
            ("Architecture", self._architecture_rows()),
            ("Experts", self._expert_rows()),
            ("Attention", self._attention_rows()),
            ("Quantization", self._quantization_rows()),
        ]

    def document(self, *, tensors: bool) -> dict[str, Any]:
        """Return everything as JSON values."""
        config = asdict(self.config)
        config["layer_kinds"] = [kind.value for kind in self.config.layer_kinds]
        found = {
            "name": self.model.name,
            "installed": True,
            "path": str(self.model.path),
            "source": self.model.source,
            "format": self.model.format,
            "bytes": self.model.nbytes,
            "parameters": self.parameters,
            "expert_bytes": self.expert_bytes,
            "config": config,
            "types": {
                name: {"tensors": count, "bytes": nbytes}
                for name, (count, nbytes) in self.bytes_by_type.items()
            },
            "files": [asdict(file) for file in self.files],
            "license": self.license,
        }
        if tensors:
            found["tensors"] = [
                {
                    "name": tensor.name,
                    "type": tensor.dtype.name,
                    "shape": list(tensor.shape),
                    "file": self.files[tensor.file].name,
                    "offset": tensor.offset,
                    "bytes": tensor.nbytes,
                }
                for tensor in self.tensors
            ]
        return found

    def _model_rows(self) -> Rows:
        return [
            ("name", self.model.name),
            ("path", str(self.model.path)),
            ("format", self.model.format),
            ("size", format_bytes(self.model.nbytes)),
        ]

    def _architecture_rows(self) -> Rows:
        config = self.config
        return [
            ("architecture", "deepseek_v4"),
            ("parameters", f"{self.parameters:,}"),
            ("context", f"{config.max_positions:,} tokens"),
            ("layers", str(config.n_layers)),
            ("hidden size", str(config.hidden_size)),
            ("residual streams", str(config.hc_mult)),
            ("vocabulary", f"{config.vocab_size:,}"),
        ]

    def _expert_rows(self) -> Rows:
        config = self.config
        return [
            ("routed per layer", f"{config.n_experts}, {config.experts_per_token} active"),
            ("shared per layer", str(config.shared_experts)),
            ("width", str(config.expert_width)),
            ("routed by token id", f"{sum(config.hashed)} of {config.n_layers} layers"),
            ("bytes of one", format_bytes(self.expert_bytes)),
        ]

    def _attention_rows(self) -> Rows:
        config = self.config
        kinds = Counter(config.layer_kinds)
        ratios = sorted({ratio for ratio in config.ratios if ratio})
        return [
            ("heads", f"{config.n_heads} x {config.head_dim}"),
            ("window", f"{config.window} tokens"),
            ("sliding layers", str(kinds[LayerKind.SLIDING])),
            ("sparse compressed layers", str(kinds[LayerKind.CSA])),
            ("dense compressed layers", str(kinds[LayerKind.HCA])),
            ("tokens per compressed entry", ", ".join(map(str, ratios)) or "none"),
            ("indexer", f"{config.index_heads} heads, top {config.index_top_k}"),
        ]

    def _quantization_rows(self) -> Rows:
        return [
            (name, f"{format_bytes(nbytes)} in {count:,} tensors")
            for name, (count, nbytes) in self.bytes_by_type.items()
        ]


def describe(model: InstalledModel) -> Description:
    """Read the headers of a model's files. Raises NotFoundError or BadFileError."""
    with open_checkpoint(model.path) as checkpoint:
        table = read_names(checkpoint)
        config = read_model_config(checkpoint, table)
        return Description(
            model=model,
            config=config,
            table=table,
            tensors=tuple(checkpoint.tensors.values()),
            files=tuple(ModelFile(file.name, file.stat().st_size) for file in checkpoint.files),
            license=_license(model, checkpoint.metadata.get("general.license")),
        )


def _license(model: InstalledModel, in_metadata: object) -> str:
    """Return the license that the registry, the file or the model card names."""
    if model.spec is not None and model.spec.license is not None:
        return model.spec.license
    if isinstance(in_metadata, str):
        return in_metadata
    card = _model_card(model.path)
    if card is None:
        return "not stated"
    with card.open("rb") as file:
        found = LICENSE_LINE.search(file.read(MAX_CARD_BYTES))
    return found[1].decode("utf-8", "replace").strip() if found else f"see {card}"


def _model_card(path: Path) -> Path | None:
    folder = path if path.is_dir() else path.parent
    cards = (folder / name for name in ("LICENSE", "README.md", "MODEL_CARD.md"))
    return next((card for card in cards if card.is_file()), None)


def _slice_bytes(part: Slice) -> int:
    """Return the bytes of a part of a tensor; its rows are whole blocks."""
    elements = math.prod(part.tensor.shape)
    return part.tensor.nbytes * math.prod(part.shape) // elements if elements else 0
