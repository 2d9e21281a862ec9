"""Where a conversion reads from: a checkpoint that is here, as shards of a packed folder."""

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from localv4.errors import UsageError
from localv4.model import weights as tree
from localv4.model.config import ModelConfig
from localv4.model.loading import read_model_config
from localv4.model.matrix import Floats, Matrix
from localv4.model.names import Slice, official_names
from localv4.storage import Checkpoint, PackedFolder
from quant.packed_shard import Leaf, ShardSource

ROOT_SHARD = "embedding-and-head.safetensors"


class SourceReader(tree.WeightReader):
    """Takes tensors out of a checkpoint and remembers them by official name."""

    def __init__(self, checkpoint: Checkpoint, table: dict[str, Slice]) -> None:
        super().__init__(checkpoint, table)
        self.found: dict[str, Leaf] = {}

    def matrix(self, name: str, rows: int, cols: int) -> Matrix:
        """Return and remember a matrix."""
        self.found[name] = leaf = super().matrix(name, rows, cols)
        return leaf

    def floats(self, name: str, *shape: int) -> Floats:
        """Return and remember a small tensor."""
        self.found[name] = leaf = super().floats(name, *shape)
        return leaf

    def expert_table(
        self, name: str, vocab: int, per_token: int, experts: int
    ) -> NDArray[np.int64]:
        """Return and remember the experts of each token id."""
        self.found[name] = leaf = super().expert_table(name, vocab, per_token, experts)
        return leaf


@dataclass(frozen=True, slots=True)
class Source:
    """A checkpoint on this machine; `table` has its tensors by official name."""

    checkpoint: Checkpoint
    table: dict[str, Slice]
    config: ModelConfig

    @property
    def path(self) -> Path:
        """Where the checkpoint is."""
        return self.checkpoint.path

    @property
    def name(self) -> str:
        """How the source is called."""
        return self.path.name

    @property
    def label(self) -> Path:
        """What errors about its tensors name."""
        return self.path

    @property
    def folder(self) -> Path:
        """Where the small files of the model are."""
        return self.path if self.path.is_dir() else self.path.parent

    @property
    def nbytes(self) -> int:
        """Size of all tensors that the network calls for."""
        found = {part.tensor.name: part.tensor.nbytes for part in self.table.values()}
        return sum(found.values())

    @property
    def shards(self) -> int:
        """Number of shards: one for each layer, and one for the rest."""
        return self.config.n_layers + 1

    @contextmanager
    def shard(self, number: int) -> Iterator[ShardSource]:
        """Give what belongs into a shard.

        Raises BadFileError unless its tensors are there, in the right shape.
        """
        yield read_shard(SourceReader(self.checkpoint, self.table), self.config, number)

    def outline(self, number: int) -> AbstractContextManager[ShardSource]:
        """Give the same for planning: shapes and types, whose weights need not be here."""
        return self.shard(number)

    def check_unchanged(self) -> None:
        """Raise BadFileError when a file of the source was written to since it was opened."""
        self.checkpoint.check_unchanged()

    def identity(self) -> list[list[Any]]:
        """Return what tells these files from others, or from themselves after a change."""
        marks = [(file.name, file.stat()) for file in self.checkpoint.files]
        return [[name, mark.st_size, mark.st_mtime_ns] for name, mark in marks]


def open_source(checkpoint: Checkpoint) -> Source:
    """Return a checkpoint as a source.

    Raises UsageError for one that is packed: its rows are gone. Raises BadFileError if it is no
    model that is known.
    """
    if isinstance(checkpoint, PackedFolder):
        raise UsageError(f"{checkpoint.path} is packed already", hint="convert what it was made of")
    table = official_names(checkpoint)
    return Source(checkpoint, table, read_model_config(checkpoint, table))


def read_shard(read: SourceReader, config: ModelConfig, number: int) -> ShardSource:
    """Return what belongs into layer `number`, or (after the last) what belongs to no layer."""
    if number == config.n_layers:
        return _root(read, config)
    layer = tree.read_layer(read, config, number)
    prefix = f"layers.{number}.ffn."
    experts = {prefix + "experts": layer.experts, prefix + "shared_experts": (layer.shared,)}
    leaves = {
        name: leaf for name, leaf in read.found.items() if not name.startswith(tuple(experts))
    }
    return ShardSource(f"layer-{number:05d}.safetensors", leaves, experts)


def _root(read: SourceReader, config: ModelConfig) -> ShardSource:
    hidden, width = config.hidden_size, config.hc_mult * config.hidden_size
    read.matrix("embed.weight", config.vocab_size, hidden)
    read.matrix("head.weight", config.vocab_size, hidden)
    read.floats("norm.weight", hidden)
    tree.read_hyper_connection(read, "hc_head", config.hc_mult, width, 1)
    return ShardSource(ROOT_SHARD, read.found, {})
