"""A source whose files come one by one from elsewhere and are removed when they are converted."""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from localv4.errors import UsageError
from localv4.model.loading import read_model_config
from localv4.model.names import official_names
from localv4.storage import Checkpoint
from localv4.storage.mapped_file import MappedFile
from localv4.storage.safetensors_header import read_tensors
from quant.packed_shard import ShardSource
from quant.source import Source, SourceReader, read_shard
from quant.tensor_class import layer_of

Fetch = Callable[[str], Path]
"""Brings a file of the source here and returns its path; the file may be there already."""


@dataclass(frozen=True, slots=True)
class StreamedSource(Source):
    """A model of which only the headers are here: `checkpoint` opens files with holes for weights.

    `origin` names it for users; `mark` tells its contents from others. A file is fetched when a
    shard needs it and removed after the last one that does.
    """

    origin: str
    mark: str
    fetch: Fetch

    @property
    def name(self) -> str:
        """How the source is called."""
        return self.origin

    @property
    def label(self) -> Path:
        """What errors about its tensors name."""
        return Path(self.origin)

    def outline(self, number: int) -> Any:
        """Give what belongs into a shard, with zeros in the place of all values."""
        return Source.shard(self, number)

    @contextmanager
    def shard(self, number: int) -> Iterator[ShardSource]:
        """Fetch the files of a shard and give what belongs into it.

        Raises BadFileError unless its tensors are there, in the right shape, and what fetching
        raises.
        """
        users = self._users()
        names = [name for name, shards in users.items() if number in shards]
        paths = {name: self.fetch(name) for name in names}
        with ExitStack() as opened:
            files = [opened.enter_context(closing(MappedFile(path))) for path in paths.values()]
            tensors = {t.name: t for n, file in enumerate(files) for t in read_tensors(file, n)}
            part = Checkpoint("safetensors", self.label, files, tensors, {})
            opened.enter_context(closing(part))
            yield read_shard(SourceReader(part, official_names(part)), self.config, number)
            part.check_unchanged()
        for name in names:
            if max(users[name]) == number:
                paths[name].unlink()

    def check_unchanged(self) -> None:
        """Nothing can change: files are named by their contents."""

    def identity(self) -> list[list[Any]]:
        """Return what tells this model from others."""
        return [[self.origin, self.mark]]

    def _users(self) -> dict[str, set[int]]:
        """Return the shards that need each file."""
        found: dict[str, set[int]] = {}
        for name, part in self.table.items():
            layer = layer_of(name)
            shard = self.config.n_layers if layer is None else layer
            if shard <= self.config.n_layers:
                file = self.checkpoint.files[part.tensor.file].name
                found.setdefault(file, set()).add(shard)
        return found


def open_streamed(outline: Checkpoint, origin: str, mark: str, fetch: Fetch) -> StreamedSource:
    """Return a source of which `outline` has the headers.

    Raises UsageError for GGUF, whose files are as large as the model, BadFileError for no model.
    """
    if outline.kind != "safetensors":
        raise UsageError(
            f"{origin} is a GGUF model: its files cannot come one by one", hint="pull it first"
        )
    table = official_names(outline)
    config = read_model_config(outline, table)
    return StreamedSource(outline, table, config, origin, mark, fetch)
