"""Turn a checkpoint into a GGUF model, in one file or in parts of a largest size."""

import re
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from localv4.errors import UsageError
from quant.chooser import Chooser
from quant.converter import Converter
from quant.decision import Plan, bytes_per_token
from quant.gguf_header import keys_of
from quant.gguf_metadata import official_metadata, split_metadata
from quant.gguf_shard import GgufShard, build_gguf_shard
from quant.gguf_writer import VERSION, GgufTensor, gguf_bytes, padded, write_gguf
from quant.importance import Importance
from quant.journal import Finished, Journal
from quant.output_file import Job, Part, in_order
from quant.task import OnProgress, Progress, Task
from quant.workplace import claimed, reserve_all

SUFFIX = ".gguf"
MAX_PARTS = 99_999
_PART_NAME = re.compile(r".+-\d{5}-of-\d{5}")


@dataclass(frozen=True, slots=True)
class _File:
    """A file of the result: which tensors it has, each as shard and place in it, and its size."""

    name: str
    tensors: Sequence[tuple[int, int]]
    metadata: Sequence[bytes]
    nbytes: int


class GgufConversion:
    """One conversion into a GGUF model; parts have at most `split_bytes` (0: one file)."""

    def __init__(self, task: Task, split_bytes: int, name: str) -> None:
        """Raises UsageError for a recipe that GGUF cannot hold or that needs statistics."""
        if task.recipe.needs_routing:
            raise UsageError(
                f"GGUF has one type for all experts of a layer, the recipe {task.recipe.name} more",
                hint="choose another recipe, or --format packed",
            )
        importance = Importance(task.statistics) if task.statistics is not None else None
        self.task = task
        self.converter = Converter(task.source.label, importance, task.moments)
        layers = task.source.config.n_layers
        self._chooser = Chooser(task.recipe, layers, task.statistics, task.moments)
        self._split_bytes = split_bytes
        self._name = name

    def plan(self, target: Path | None = None) -> Plan:
        """Return what will be done. Weights are not read; raises BadFileError for a bad source."""
        shards = self._outlines()
        decisions = [decision for shard in shards for decision in shard.decisions]
        config = self.task.source.config
        stem = (target or Path(self._name)).name.removesuffix(SUFFIX)
        files = self._files(shards, stem)
        return Plan(
            decisions=decisions,
            files=[(file.name, file.nbytes) for file in files],
            tensors={file.name: len(file.tensors) for file in files},
            source_bytes=self.task.source.nbytes,
            bytes_per_token=bytes_per_token(decisions, config.n_experts, config.experts_per_token),
        )

    def run(self, target: Path, on_progress: OnProgress | None = None) -> Plan:
        """Write the model as `target`, a file or an existing folder, and return what was done.

        A run that was stopped goes on with the part that it was at. Memory: as for a packed folder.
        Raises BadFileError for a bad source, UsageError for a target that is there, DoesNotFitError
        when the disk is too small, LocalV4Error when it cannot be written.
        """
        self.check(target)
        target = self.file_in(target)
        plan = self.plan(target)
        stem = target.name.removesuffix(SUFFIX)
        with claimed(target.parent, f".{stem}.lock"):
            files = self._files(self._outlines(), stem)
            identity = self.task.identity(f"gguf {VERSION} {self._split_bytes} {self._name}")
            journal = Journal(target.parent / f".{stem}.quantize.json", identity)
            self._write(target.parent, files, journal, on_progress)
            journal.remove()
        return plan

    def check(self, target: Path) -> None:
        """Raise UsageError for a name that `run` would refuse."""
        target = self.file_in(target)
        if _PART_NAME.fullmatch(target.name.removesuffix(SUFFIX)):
            raise UsageError(f"{target} is the name of a part", hint="name the whole: NAME.gguf")

    def file_in(self, target: Path) -> Path:
        """Return the file to write: `target` itself, or one in it where it is a folder."""
        if target.is_dir():
            return target / f"{self._name}-{self.task.recipe.name}{SUFFIX}"
        if target.suffix != SUFFIX:
            raise UsageError(f"{target} is no .gguf file", hint=f"name a folder or a {SUFFIX} file")
        return target

    def _outlines(self) -> list[GgufShard]:
        shards = []
        for number in range(self.task.source.shards):
            with self.task.source.outline(number) as found:
                shards.append(build_gguf_shard(found, self.converter, self._chooser.ggml))
        return shards

    def _files(self, shards: Sequence[GgufShard], stem: str) -> list[_File]:
        """Divide the tensors among files."""
        places = [(s, t) for s, shard in enumerate(shards) for t in range(len(shard.tensors))]
        parts = list(_divided(places, shards, self._split_bytes))
        if len(parts) > MAX_PARTS:
            raise UsageError(f"{len(parts)} parts are too many", hint="give a larger --split-size")
        keys = self._metadata()
        files = []
        for number, tensors in enumerate(parts):
            name, metadata = f"{stem}{SUFFIX}", keys
            if len(parts) > 1:
                name = f"{stem}-{number + 1:05d}-of-{len(parts):05d}{SUFFIX}"
                own = split_metadata(number, len(parts), len(places))
                metadata = [*(keys if number == 0 else []), *own]
            found = [shards[s].tensors[t] for s, t in tensors]
            files.append(_File(name, tensors, metadata, gguf_bytes(metadata, found)))
        return files

    def _metadata(self) -> list[bytes]:
        source = self.task.source
        if source.checkpoint.kind == "gguf":
            return keys_of(source.checkpoint.files[0], dropped=("general.alignment",))[1]
        return official_metadata(source.folder, source.config, self._name, self.task.recipe.name)

    def _write(
        self,
        folder: Path,
        files: Sequence[_File],
        journal: Journal,
        on_progress: OnProgress | None,
    ) -> None:
        kept = {file.name: journal.finished(file.name) for file in files}
        done = {name: found for name, found in kept.items() if found is not None}
        left = [file for file in files if file.name not in done]
        for file in left:
            if (folder / file.name).exists() and not journal.path.exists():
                raise UsageError(f"{folder / file.name} is there", hint="remove it first")
        journal.begin()
        reserve_all(folder, {file.name: file.nbytes for file in left})
        total = sum(file.nbytes for file in files)
        errors = self.converter.errors
        for found in done.values():
            errors.add_file(found.errors)
        missing = sum(file.nbytes for file in left)
        tensors = {file.name: len(file.tensors) for file in files}
        tally = Progress(
            total - missing,
            total,
            sum(tensors[name] for name in done),
            sum(tensors.values()),
            errors,
            on_progress,
        )
        with ThreadPoolExecutor(self.task.threads, "converting") as pool:
            for file in left:
                outlines = [tensor for _, tensor in self._tensors_of(file)]
                data = self._data(file, pool)
                written = write_gguf(folder / file.name, file.metadata, outlines, data, tally)
                journal.add(file.name, Finished(written, {}, dict(errors.close_file())))

    def _tensors_of(self, file: _File) -> Iterator[tuple[int, GgufTensor]]:
        """Yield the tensors of a file for its header, with the number of their shard."""
        for number in dict.fromkeys(shard for shard, _ in file.tensors):
            with self.task.source.outline(number) as found:
                shard = build_gguf_shard(found, self.converter, self._chooser.ggml)
            for own, place in file.tensors:
                if own == number:
                    yield number, shard.tensors[place]

    def _data(self, file: _File, pool: ThreadPoolExecutor) -> Iterator[tuple[int, Part]]:
        """Yield the bytes of the tensors of a file, each with the number of its tensor."""
        numbers = {place: number for number, place in enumerate(file.tensors)}
        for number in dict.fromkeys(shard for shard, _ in file.tensors):
            with self.task.source.shard(number) as found:
                shard = build_gguf_shard(found, self.converter, self._chooser.ggml)
                jobs: Iterator[tuple[int, Job]] = (
                    (numbers[number, place], job)
                    for place, tensor in enumerate(shard.tensors)
                    if (number, place) in numbers
                    for job in tensor.parts()
                )
                yield from in_order(jobs, pool, self.task.ahead)
                self.task.source.check_unchanged()


def _divided(
    places: Sequence[tuple[int, int]], shards: Sequence[GgufShard], limit: int
) -> Iterator[list[tuple[int, int]]]:
    """Yield the tensors of each part; one that is larger than the limit is alone in its part."""
    part: list[tuple[int, int]] = []
    filled = 0
    for shard, place in places:
        nbytes = padded(shards[shard].tensors[place].nbytes)
        if part and limit and filled + nbytes > limit:
            yield part
            part, filled = [], 0
        part.append((shard, place))
        filled += nbytes
    yield part
