"""Find tensors, configuration and weights in an opened checkpoint, whatever its form."""

from collections.abc import Callable, Mapping

from localv4.model.config import ModelConfig
from localv4.model.config_gguf import config_from_gguf
from localv4.model.config_json import read_config
from localv4.model.names import Slice, official_names
from localv4.model.packed_source import load_packed_weights, packed_config, packed_names
from localv4.model.weights import Weights, load_weights
from localv4.storage import Checkpoint, PackedFolder


def read_names(checkpoint: Checkpoint) -> dict[str, Slice]:
    """Return the tensors by official name. Raises BadFileError."""
    if isinstance(checkpoint, PackedFolder):
        return packed_names(checkpoint)
    return official_names(checkpoint)


def read_model_config(checkpoint: Checkpoint, table: Mapping[str, Slice]) -> ModelConfig:
    """Return the configuration from GGUF metadata or the `config.json` beside the weights.

    `table` holds the tensors by official name. Raises NotFoundError or BadFileError.
    """
    if isinstance(checkpoint, PackedFolder):
        return packed_config(checkpoint)
    if checkpoint.kind == "gguf":
        return config_from_gguf(checkpoint.metadata, table, checkpoint.path)
    folder = checkpoint.path if checkpoint.path.is_dir() else checkpoint.path.parent
    return read_config(folder / "config.json")


def read_weights(
    checkpoint: Checkpoint,
    table: dict[str, Slice],
    config: ModelConfig,
    on_progress: Callable[[int, int], None] | None = None,
) -> Weights:
    """Find every tensor that `config` calls for; `on_progress(layers done, layers)`.

    Raises BadFileError naming the tensor that is missing or wrong.
    """
    if isinstance(checkpoint, PackedFolder):
        return load_packed_weights(checkpoint, config, on_progress)
    return load_weights(checkpoint, table, config, on_progress)
