"""What a conversion has finished, so that it can go on after any stop."""

import hashlib
import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from quant.errors_made import Share
from quant.output_file import WrittenFile, write_file
from quant.packed_writer import MatrixEntry
from quant.tensor_class import TensorClass

JOURNAL_NAME = ".packing.json"
MAX_JOURNAL_BYTES = 64 << 20


@dataclass(frozen=True, slots=True)
class Finished:
    """A finished file: the manifest's entries of its tensors, and the errors made in it."""

    file: WrittenFile
    matrices: dict[str, MatrixEntry] = field(default_factory=dict)
    errors: dict[TensorClass, Share] = field(default_factory=dict)


class Journal:
    """The finished files of a conversion.

    `task` tells what is converted and how. What was written for another task does not count.
    """

    def __init__(self, path: Path, task: dict[str, Any]) -> None:
        """Read what an earlier run left; a journal that is damaged or of another task is none."""
        self.path = path
        self._task = task
        self._files: dict[str, Any] = {}
        found = _read(self.path)
        if found is not None and found.get("task") == task:
            files = found.get("files")
            self._files = files if isinstance(files, dict) else {}

    def finished(self, name: str) -> Finished | None:
        """Return what is known about a file if it is there with its size and digest."""
        try:
            found = _finished(self._files[name])
        except (KeyError, TypeError, ValueError, AttributeError):
            return None
        path = self.path.with_name(name)
        if not path.is_file() or path.stat().st_size != found.file.bytes:
            return None
        return found if _digest(path) == found.file.sha256 else None

    def begin(self) -> None:
        """Write the journal, so that finished files are known to be part of a conversion."""
        self._write()

    def add(self, name: str, finished: Finished) -> None:
        """Note that a file is finished."""
        self._files[name] = asdict(finished)
        self._write()

    def _write(self) -> None:
        document = {"task": self._task, "files": self._files}
        write_file(self.path, [json.dumps(document).encode()])

    def remove(self) -> None:
        """Forget everything: the conversion is complete."""
        self.path.unlink(missing_ok=True)


def _finished(fields: Any) -> Finished:
    matrices = {
        name: MatrixEntry(**{**entry, "experts": tuple(entry["experts"])})
        for name, entry in fields["matrices"].items()
    }
    errors = {TensorClass(kind): Share(**share) for kind, share in fields["errors"].items()}
    return Finished(WrittenFile(**fields["file"]), matrices, errors)


def _read(path: Path) -> dict[str, Any] | None:
    try:
        if path.stat().st_size > MAX_JOURNAL_BYTES:
            return None
        found = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError):
        return None
    return found if isinstance(found, dict) else None


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
