"""Find the configuration that belongs to an opened checkpoint."""

from collections.abc import Mapping

from localv4.model.config import ModelConfig
from localv4.model.config_gguf import config_from_gguf
from localv4.model.config_json import read_config
from localv4.model.names import Slice
from localv4.storage import Checkpoint


def read_model_config(checkpoint: Checkpoint, table: Mapping[str, Slice]) -> ModelConfig:
    """Return the configuration from GGUF metadata or the `config.json` beside the weights.

    `table` holds the tensors by official name. Raises NotFoundError or BadFileError.
    """
    if checkpoint.kind == "gguf":
        return config_from_gguf(checkpoint.metadata, table, checkpoint.path)
    folder = checkpoint.path if checkpoint.path.is_dir() else checkpoint.path.parent
    return read_config(folder / "config.json")
