"""What a conversion has finished, so that it can go on after any stop."""

import hashlib
import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

from quant.packed_writer import MatrixEntry, WrittenFile, write_file

JOURNAL_NAME = ".packing.json"
MAX_JOURNAL_BYTES = 64 << 20

_PIECE_BYTES = 1 << 24


class Journal:
    """The finished shards of a folder, and the manifest's entries of their tensors.

    `recipe` tells what is converted and how. What was written by another recipe does not count.
    """

    def __init__(self, folder: Path, recipe: dict[str, Any]) -> None:
        """Read what an earlier run left; a journal that is damaged or of another recipe is none."""
        self.path = folder / JOURNAL_NAME
        self._recipe = recipe
        self._files: dict[str, Any] = {}
        found = _read(self.path)
        if found is not None and found.get("recipe") == recipe:
            files = found.get("files")
            self._files = files if isinstance(files, dict) else {}

    def finished(self, name: str) -> tuple[WrittenFile, dict[str, MatrixEntry]] | None:
        """Return what is known about a shard if it is there with its size and digest."""
        try:
            fields = self._files[name]
            written = WrittenFile(**fields["file"])
            entries = {key: MatrixEntry(**entry) for key, entry in fields["matrices"].items()}
        except (KeyError, TypeError, AttributeError):
            return None
        path = self.path.with_name(name)
        if not path.is_file() or path.stat().st_size != written.bytes:
            return None
        return (written, entries) if _digest(path) == written.sha256 else None

    def add(self, name: str, written: WrittenFile, entries: dict[str, MatrixEntry]) -> None:
        """Note that a shard is finished."""
        matrices = {key: asdict(entry) for key, entry in entries.items()}
        self._files[name] = {"file": asdict(written), "matrices": matrices}
        document = {"recipe": self._recipe, "files": self._files}
        write_file(self.path, [json.dumps(document).encode()])

    def remove(self) -> None:
        """Forget everything: the manifest knows it now."""
        self.path.unlink(missing_ok=True)


def _read(path: Path) -> dict[str, Any] | None:
    try:
        if path.stat().st_size > MAX_JOURNAL_BYTES:
            return None
        found = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError):
        return None
    return found if isinstance(found, dict) else None


def _digest(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while piece := file.read(_PIECE_BYTES):
            digest.update(piece)
    return digest.hexdigest()
