"""Whether the files of a model are what they were published as, or written as: digest by digest.

The digests come from the manifest of a packed folder, from the names of contents in the hub's
cache, from the record of a download, or from the hub itself.
"""

import re
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from localv4.errors import BadFileError, LocalV4Error, NotFoundError
from localv4.library.digests import (
    Digester,
    FileRecord,
    OnBytes,
    RecordDocument,
    damaged_ranges,
    digest_file,
    read_record,
    tensors_in,
)
from localv4.library.hub_cache import RECORD_FOLDER
from localv4.library.installed import InstalledModel
from localv4.library.model_files import files_of_gguf
from localv4.storage.manifest import read_manifest

JOBS = 4

_DIGEST = re.compile(r"[0-9a-f]{40}|[0-9a-f]{64}")

State = Literal["right", "damaged", "missing"]


@dataclass(frozen=True, slots=True)
class ExpectedFile:
    """A file as it should be."""

    name: str
    path: Path
    known: FileRecord


@dataclass(frozen=True, slots=True)
class FileReport:
    """A file as it is; `detail` and `tensors` say what is wrong, as far as can be told."""

    name: str
    path: Path
    nbytes: int
    digest: str
    state: State
    detail: str = ""
    tensors: tuple[str, ...] = ()


def expected_files(model: InstalledModel, *, online: bool = False) -> list[ExpectedFile]:
    """Return the files of an installed model with their digests.

    With `online` the hub is asked, and nothing that lies beside the files is trusted. Raises
    NotFoundError where no digest is known, LocalV4Error when the hub cannot be asked.
    """
    if model.format == "packed":
        if online:
            raise LocalV4Error(f"{model.name} was made here: the hub does not know its digests")
        return _of_manifest(model.path)
    root = _root(model.path)
    record = _record(root)
    found = _from_hub(model, root, record) if online else _from_disk(model, root, record)
    if not found:
        raise NotFoundError(
            f"no digests of {model.name} are known",
            hint="pull and quantize record them; of others only the maker can tell",
        )
    return found


def _of_manifest(folder: Path) -> list[ExpectedFile]:
    files = read_manifest(folder).files
    return [
        ExpectedFile(name, folder / name, FileRecord(bytes=entry.nbytes, etag=entry.sha256))
        for name, entry in files.items()
    ]


def _root(path: Path) -> Path:
    """Return the folder that names of files count from: a snapshot, or that of a record."""
    places = [place for place in (path, *path.parents[:3]) if place.is_dir()]
    for place in places:
        if place.parent.name == "snapshots" or (place / RECORD_FOLDER).is_dir():
            return place
    return places[0]


def _record(root: Path) -> RecordDocument | None:
    if root.parent.name == "snapshots":
        return read_record(root.parents[1] / RECORD_FOLDER / f"{root.name}.json")
    return read_record(root / RECORD_FOLDER / "pull.json")


def _paths(model: InstalledModel) -> list[Path]:
    if model.format == "gguf":
        return files_of_gguf(model.path)
    if model.path.is_file():
        return [model.path]
    return sorted(
        path
        for path in model.path.rglob("*")
        if not path.is_dir() and not any(part.startswith(".") for part in _parts(path, model.path))
    )


def _parts(path: Path, folder: Path) -> tuple[str, ...]:
    return path.relative_to(folder).parts


def _from_disk(
    model: InstalledModel, root: Path, record: RecordDocument | None
) -> list[ExpectedFile]:
    known = dict(record.files) if record is not None else {}
    if model.format == "gguf":  # the record may be of other forms as well
        wanted = {path.relative_to(root).as_posix() for path in _paths(model)}
        known = {name: entry for name, entry in known.items() if name in wanted}
    for path in _paths(model):
        name = path.relative_to(root).as_posix()
        etag = path.readlink().name if path.is_symlink() else ""
        if _DIGEST.fullmatch(etag) and (name not in known or known[name].etag != etag):
            size = path.stat().st_size if path.exists() else 0
            known[name] = FileRecord(bytes=size, etag=etag)
    return [ExpectedFile(name, root / name, known[name]) for name in sorted(known)]


def _from_hub(
    model: InstalledModel, root: Path, record: RecordDocument | None
) -> list[ExpectedFile]:
    from localv4.library.published import list_files  # here: it imports the hub's client

    if root.parent.name == "snapshots":
        repo = root.parents[1].name.removeprefix("models--").replace("--", "/", 1)
        commit = root.name
    elif record is not None:
        repo, commit = record.repo, record.commit
    else:
        raise NotFoundError(f"it is not known which repository {model.name} comes from")
    here = {path.relative_to(root).as_posix() for path in _paths(model)}
    blocks = record.files if record is not None else {}
    found = []
    for file in list_files(repo, commit).files:
        if file.name in here or (model.format != "gguf" and file.name in blocks):
            entry = blocks.get(file.name)
            sums = entry.blocks if entry is not None and entry.etag == file.etag else ""
            fields = FileRecord(bytes=file.nbytes, etag=file.etag, blocks=sums)
            found.append(ExpectedFile(file.name, root / file.name, fields))
    return found


def check_files(files: Sequence[ExpectedFile], on_bytes: OnBytes | None = None) -> list[FileReport]:
    """Read all files and compare; `on_bytes` is told how much was read, from several threads."""
    with ThreadPoolExecutor(JOBS) as pool:
        return list(pool.map(lambda file: _check(file, on_bytes), files))


def _check(file: ExpectedFile, on_bytes: OnBytes | None) -> FileReport:
    known = file.known

    def report(state: State, detail: str = "", tensors: tuple[str, ...] = ()) -> FileReport:
        return FileReport(file.name, file.path, known.bytes, known.etag, state, detail, tensors)

    try:
        if not file.path.is_file():
            return report("missing", "the file is not there")
        size = file.path.stat().st_size
        if size != known.bytes:
            return report("damaged", f"has {size} bytes, not {known.bytes}")
        digester = Digester(known.etag, known.bytes)
        digest_file(file.path, digester, on_bytes)
        if digester.matches():
            return report("right")
        kind = "SHA-256" if len(known.etag) == 64 else "digest"
        detail = f"its {kind} is not {known.etag[:16]}..."
        if not known.blocks:
            return report("damaged", detail)
        ranges = damaged_ranges(file.path, known.blocks)
        places = ", ".join(f"{begin} to {end}" for begin, end in ranges[:3])
        more = f" and {len(ranges) - 3} more blocks" if len(ranges) > 3 else ""
        tensors = tuple(tensors_in(file.path, ranges))
        return report("damaged", f"{detail}: bytes {places}{more}", tensors)
    except OSError as error:
        return report("damaged", f"cannot be read: {error.strerror or error}")


def refuse_wrong(model: InstalledModel, reports: Sequence[FileReport]) -> None:
    """Raise BadFileError naming the first file that is wrong, and its tensor where it is known."""
    wrong = [report for report in reports if report.state != "right"]
    if not wrong:
        return
    first = wrong[0]
    tensor = f", tensor {first.tensors[0]}" if first.tensors else ""
    others = "one more file is" if len(wrong) == 2 else f"{len(wrong) - 1} more files are"
    more = f"; {others} wrong" if len(wrong) > 1 else ""
    if model.format == "packed":
        hint = "copy or convert the model again"
    else:
        hint = f"delete {first.path.resolve()}, then: localv4 pull {model.name}"
    raise BadFileError(first.path, f"{first.detail}{tensor}{more}", hint=hint)
