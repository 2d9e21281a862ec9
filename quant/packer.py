"""Turn a checkpoint into a packed folder, value for value: no number changes, only its place.

    python -m quant.packer SOURCE TARGET

The source is an official folder of safetensors or a GGUF file. Drafting modules are left out.
"""

import shutil
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
from filelock import FileLock, Timeout
from numpy.typing import NDArray

from localv4.errors import DoesNotFitError, LocalV4Error, UsageError
from localv4.kernels.threads import most_threads
from localv4.model import weights as tree
from localv4.model.config import ModelConfig
from localv4.model.loading import read_model_config
from localv4.model.matrix import Floats, Matrix
from localv4.model.names import official_names
from localv4.small_file import read_small_file
from localv4.storage import Checkpoint, PackedFolder, open_checkpoint
from localv4.storage.names import member_path
from quant.gguf_header import header_without_tensors
from quant.journal import JOURNAL_NAME, Journal
from quant.packed_shard import Leaf, ShardSource, build_shard
from quant.packed_writer import (
    MANIFEST_NAME,
    VERSION,
    MatrixEntry,
    WrittenFile,
    write_file,
    write_manifest,
    write_shard,
)

ROOT_SHARD = "embedding-and-head.safetensors"
METADATA_NAME = "metadata.gguf"
LOCK_NAME = ".lock"
SMALL_FILES = (
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "LICENSE",
    "README.md",
    "MODEL_CARD.md",
)
"""What is copied from the folder of a safetensors model, where it is there."""

MAX_SMALL_FILE_BYTES = 64 << 20
RECORDS_PER_THREAD = 3
DISK_RESERVE_BYTES = 1 << 28

Progress = Callable[[int, int], None]


class SourceReader(tree.WeightReader):
    """Takes tensors out of a checkpoint and remembers them by official name."""

    found: dict[str, Leaf]

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


def pack_folder(
    source: Checkpoint,
    target: Path,
    *,
    threads: int | None = None,
    on_progress: Progress | None = None,
) -> None:
    """Write `source` as the packed folder `target`; `on_progress(bytes done, bytes in all)`.

    A run that was stopped goes on where it was when it is started again: finished shards are kept
    if their digests are right. Memory: the dense matrices of one layer and a few experts a thread.
    Raises BadFileError for a bad source, UsageError for one that is packed already and for a target
    that is something else, DoesNotFitError when the disk is too small, LocalV4Error when it cannot
    be written.
    """
    if isinstance(source, PackedFolder):
        raise UsageError(f"{source.path} is packed already")
    try:
        target.mkdir(parents=True, exist_ok=True)
        _check_target(target)
        with FileLock(target / LOCK_NAME, timeout=0):
            _check_target(target)
            _pack(source, target, threads or most_threads(), on_progress)
        (target / LOCK_NAME).unlink(missing_ok=True)
    except Timeout:
        raise LocalV4Error(f"another process is writing {target}", hint="wait for it") from None
    except OSError as error:
        raise LocalV4Error(
            f"cannot write {target}: {error.strerror or error}",
            hint="run the same command again to go on",
        ) from error


def _check_target(target: Path) -> None:
    """Refuse a folder with other contents than those of an unfinished run."""
    if (target / MANIFEST_NAME).exists():
        raise UsageError(f"{target} is a finished model already", hint="name another folder")
    others = [item.name for item in target.iterdir() if not item.name.startswith(".")]
    if others and not (target / JOURNAL_NAME).exists():
        raise UsageError(f"{target} holds other files", hint="name a new or empty folder")


def _pack(source: Checkpoint, target: Path, threads: int, on_progress: Progress | None) -> None:
    table = official_names(source)
    config = read_model_config(source, table)
    shards = list(_sources(source, config))
    journal = Journal(target, _recipe(source))
    files: dict[str, WrittenFile] = {}
    entries: dict[str, MatrixEntry] = {}
    sizes = {planned.name: planned.planned_bytes() for planned in shards}
    for name in sizes:
        if (kept := journal.finished(name)) is not None:
            files[name], found = kept
            entries |= found
    left = [planned for planned in shards if planned.name not in files]
    _check_disk(target, sum(sizes[planned.name] for planned in left))
    done, total = sum(sizes[name] for name in files), sum(sizes.values())

    def count(nbytes: int) -> None:
        nonlocal done
        done = min(done + nbytes, total)
        if on_progress is not None:
            on_progress(done, total)

    with ThreadPoolExecutor(threads, "packing") as pool:
        for planned in left:
            shard = build_shard(planned, source.path, pool, RECORDS_PER_THREAD * threads)
            written = write_shard(target / shard.name, shard.tensors, count)
            source.check_unchanged()
            journal.add(shard.name, written, shard.entries)
            files[shard.name] = written
            entries |= shard.entries
    files |= _small_files(source, target)
    write_manifest(target, f"packed from {source.path.name}", files, entries)
    journal.remove()


def _sources(source: Checkpoint, config: ModelConfig) -> Iterator[ShardSource]:
    """Yield what belongs into each shard; nothing is read before it is packed.

    Raises BadFileError unless all tensors of the network are there in the right shape.
    """
    read = SourceReader(source, official_names(source))
    hidden, width = config.hidden_size, config.hc_mult * config.hidden_size
    for index in range(config.n_layers):
        read.found = {}
        layer = tree.read_layer(read, config, index)
        prefix = f"layers.{index}.ffn."
        experts = {prefix + "experts": layer.experts, prefix + "shared_experts": (layer.shared,)}
        leaves = {
            name: leaf for name, leaf in read.found.items() if not name.startswith(tuple(experts))
        }
        yield ShardSource(f"layer-{index:05d}.safetensors", leaves, experts)
    read.found = {}
    read.matrix("embed.weight", config.vocab_size, hidden)
    read.matrix("head.weight", config.vocab_size, hidden)
    read.floats("norm.weight", hidden)
    tree.read_hyper_connection(read, "hc_head", config.hc_mult, width, 1)
    yield ShardSource(ROOT_SHARD, dict(read.found), {})


def _recipe(source: Checkpoint) -> dict[str, Any]:
    """Tell what is converted: the same files, unchanged, into the same format."""
    marks = [(file.name, file.stat().st_size, file.stat().st_mtime_ns) for file in source.files]
    return {"version": VERSION, "source": [list(mark) for mark in marks]}


def _check_disk(target: Path, nbytes: int) -> None:
    free = shutil.disk_usage(target).free
    if nbytes + DISK_RESERVE_BYTES > free:
        raise DoesNotFitError(
            f"{target} needs {nbytes / 1e9:.1f} GB, but the disk has {free / 1e9:.1f} GB left"
        )


def _small_files(source: Checkpoint, target: Path) -> Iterator[tuple[str, WrittenFile]]:
    if source.kind == "gguf":
        header = header_without_tensors(source.files[0])
        yield METADATA_NAME, write_file(target / METADATA_NAME, [header])
        return
    folder = source.path if source.path.is_dir() else source.path.parent
    for name in SMALL_FILES:
        path = member_path(folder, name, folder)
        if path.is_file():
            data = read_small_file(path, MAX_SMALL_FILE_BYTES)
            yield name, write_file(target / name, [data])


def main() -> int:
    """Pack the model that the command line names; return the exit code."""
    if len(sys.argv) != 3:
        sys.stderr.write("usage: python -m quant.packer SOURCE TARGET\n")
        return UsageError.exit_code
    try:
        with open_checkpoint(Path(sys.argv[1])) as source:
            pack_folder(source, Path(sys.argv[2]), on_progress=_print_progress)
    except LocalV4Error as error:
        hint = f"\n{error.hint}" if error.hint else ""
        sys.stderr.write(f"error: {error.message}{hint}\n")
        return error.exit_code
    return 0


def _print_progress(done: int, total: int) -> None:
    sys.stderr.write(f"\r{done / 1e9:8.1f} of {total / 1e9:.1f} GB")


if __name__ == "__main__":
    sys.exit(main())
