"""Turn a checkpoint into a packed folder, by a recipe or value for value."""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from localv4.errors import UsageError
from localv4.small_file import read_small_file
from localv4.storage import Checkpoint
from localv4.storage.names import member_path
from quant.chooser import Chooser
from quant.converter import Converter
from quant.decision import Plan, bytes_per_token
from quant.gguf_header import header_without_tensors
from quant.importance import Importance
from quant.journal import JOURNAL_NAME, Finished, Journal
from quant.output_file import WrittenFile, write_file
from quant.packed_shard import Shard, ShardSource, build_shard
from quant.packed_writer import (
    MANIFEST_NAME,
    VERSION,
    shard_bytes,
    write_manifest,
    write_shard,
)
from quant.report import REPORT_NAME, report_of
from quant.task import OnProgress, Progress, Task
from quant.workplace import claimed, reserve_all

METADATA_NAME = "metadata.gguf"
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


class Packer:
    """One conversion into a packed folder."""

    def __init__(self, task: Task) -> None:
        """Raises UsageError for a recipe that needs statistics that the task does not have."""
        importance = Importance(task.statistics) if task.statistics is not None else None
        self.task = task
        self.converter = Converter(task.source.label, importance, task.moments)
        layers = task.source.config.n_layers
        self._chooser = Chooser(task.recipe, layers, task.statistics, task.moments)

    def plan(self, target: Path | None = None) -> Plan:
        """Return what will be done. Weights are not read; no name depends on `target`.

        Raises BadFileError for a bad source.
        """
        shards = []
        for number in range(self.task.source.shards):
            with self.task.source.outline(number) as found:
                shards.append(self._build(found))
        decisions = [decision for shard in shards for decision in shard.decisions]
        config = self.task.source.config
        return Plan(
            decisions=decisions,
            files=[(shard.name, shard_bytes(shard.tensors)) for shard in shards],
            tensors={shard.name: len(shard.tensors) for shard in shards},
            source_bytes=self.task.source.nbytes,
            bytes_per_token=bytes_per_token(decisions, config.n_experts, config.experts_per_token),
        )

    def run(self, target: Path, on_progress: OnProgress | None = None) -> Plan:
        """Write the folder and return what was done.

        A run that was stopped goes on where it was when it is started again: finished shards are
        kept if their digests are right. Memory: a few parts for each thread, a part being a strip
        of rows or the record of an expert. Raises BadFileError for a bad source, UsageError for a
        target that is something else, DoesNotFitError when the disk is too small, LocalV4Error when
        it cannot be written.
        """
        self.check(target)
        plan = self.plan()
        with claimed(target):
            check_target(target)
            self._write(target, plan, on_progress)
        return plan

    def check(self, target: Path) -> None:
        """Raise UsageError for a target that `run` would refuse."""
        if target.exists():
            check_target(target)

    def _build(self, found: ShardSource) -> Shard:
        return build_shard(found, self.converter, self._chooser.packed)

    def _write(self, target: Path, plan: Plan, on_progress: OnProgress | None) -> None:
        task = self.task
        journal = Journal(target / JOURNAL_NAME, task.identity(f"packed {VERSION}"))
        finished = {name: journal.finished(name) for name, _ in plan.files}
        done = {name: found for name, found in finished.items() if found is not None}
        left = {name: nbytes for name, nbytes in plan.files if name not in done}
        journal.begin()
        reserve_all(target, left)
        for found in done.values():
            self.converter.errors.add_file(found.errors)
        tally = Progress(
            plan.nbytes - sum(left.values()),
            plan.nbytes,
            sum(plan.tensors[name] for name in done),
            sum(plan.tensors.values()),
            self.converter.errors,
            on_progress,
        )
        with ThreadPoolExecutor(task.threads, "converting") as pool:
            for number, (name, _) in enumerate(plan.files):
                if name not in left:
                    continue
                with task.source.shard(number) as contents:
                    shard = self._build(contents)
                    written = write_shard(target / name, shard.tensors, tally, pool, task.ahead)
                    task.source.check_unchanged()
                errors = dict(self.converter.errors.close_file())
                done[name] = Finished(written, shard.entries, errors)
                journal.add(name, done[name])
        self._finish(target, plan, done)
        journal.remove()

    def _finish(self, target: Path, plan: Plan, done: dict[str, Finished]) -> None:
        """Write the small files, and the manifest last."""
        source = self.task.source
        files = {name: found.file for name, found in done.items()}
        files |= _small_files(source.checkpoint, target)
        recipe = self.task.recipe
        report = report_of(recipe, source.name, plan, self.converter.errors.finished)
        files[REPORT_NAME] = write_file(target / REPORT_NAME, [report])
        entries = {key: entry for found in done.values() for key, entry in found.matrices.items()}
        origin = f"{source.name}, recipe {recipe.name}"
        write_manifest(target, origin, files, entries)


def check_target(target: Path) -> None:
    """Refuse a folder with other contents than those of an unfinished conversion."""
    if not target.is_dir():
        raise UsageError(f"{target} is a file", hint="name a new or empty folder")
    if (target / MANIFEST_NAME).exists():
        raise UsageError(f"{target} is a finished model already", hint="name another folder")
    others = [item.name for item in target.iterdir() if not item.name.startswith(".")]
    if others and not (target / JOURNAL_NAME).exists():
        raise UsageError(f"{target} holds other files", hint="name a new or empty folder")


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
