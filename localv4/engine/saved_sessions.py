"""Saved conversations: a small JSON file for each, which names the blocks of its tokens."""

import os
import re
import unicodedata
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Any, Final, Literal

from filelock import FileLock, Timeout
from pydantic import AwareDatetime, BaseModel, ConfigDict, Field, ValidationError

from localv4 import paths
from localv4.errors import BadFileError, LocalV4Error, NotFoundError, UsageError
from localv4.finished_file import finished_file
from localv4.small_file import read_small_file

FORMAT: Final = "localv4-session"
VERSION: Final = 1
MAX_FILE_BYTES = 64 << 20
"""A context of a million tokens has about 5 MB of text and 8,192 blocks."""

MOST_UNNAMED = 500
"""Conversations that nobody gave a name to; the oldest are forgotten beyond that."""

MAX_NAME_LETTERS = 48
_NAME = re.compile(rf"\w[\w.-]{{0,{MAX_NAME_LETTERS - 1}}}")
_SUFFIX = ".json"
_MANY = 1 << 20

BlockName = Annotated[str, Field(pattern=r"^[0-9a-f]{40}$")]
Objects = Annotated[list[dict[str, Any]], Field(max_length=_MANY)]


class _Strict(BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid")


class SavedMessage(_Strict):
    """One message in the form of a request; its meaning is checked when a prompt is rendered."""

    role: Literal["user", "assistant"]
    content: str
    reasoning_content: str | None = None
    tool_calls: Objects | None = None


class SavedSession(_Strict):
    """One conversation and where its tokens are.

    `weights` is the fingerprint of the model that it was held with, called `model`. `blocks` are
    those of the last prompt and answer, `tokens` the number of all their tokens. `named` tells
    whether a person chose the name.
    """

    format: Literal["localv4-session"] = FORMAT
    version: Literal[1] = VERSION
    name: str
    named: bool
    model: str
    weights: str
    created: AwareDatetime
    used: AwareDatetime
    system: str | None = None
    tools: Objects = []
    messages: Annotated[list[SavedMessage], Field(max_length=_MANY)] = []
    tokens: Annotated[int, Field(ge=0)] = 0
    blocks: Annotated[list[BlockName], Field(max_length=_MANY)] = []

    @property
    def title(self) -> str:
        """The first question on one line."""
        return next((" ".join(m.content.split()) for m in self.messages if m.role == "user"), "")


class _Head(BaseModel):
    """What every version of the file has."""

    format: str
    version: int


def now() -> datetime:
    """Return the time to be noted in a file."""
    return datetime.now(UTC).replace(microsecond=0)


def checked_name(name: str) -> str:
    """Return a name that can be a file's; raises UsageError for others."""
    normal = unicodedata.normalize("NFC", name)
    if not _NAME.fullmatch(normal):
        raise UsageError(
            f"{name!r} cannot be the name of a session",
            hint=f"letters, digits, '.', '-' and '_', at most {MAX_NAME_LETTERS} of them",
        )
    return normal


class SavedSessions:
    """The saved conversations of this user, each in a file of its own."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder / "names"

    def path(self, name: str) -> Path:
        """Return the file of a conversation."""
        return self.folder / f"{checked_name(name)}{_SUFFIX}"

    def names(self) -> list[str]:
        """Return the names of all files, the last written first."""
        found = []
        try:
            for entry in os.scandir(self.folder):
                stem = entry.name.removesuffix(_SUFFIX)
                if entry.name.endswith(_SUFFIX) and _NAME.fullmatch(stem):
                    found.append((entry.stat().st_mtime_ns, stem))
        except FileNotFoundError:
            pass
        except OSError as error:
            raise LocalV4Error(f"cannot read {self.folder}: {error.strerror or error}") from error
        return [name for _, name in sorted(found, reverse=True)]

    def exists(self, name: str) -> bool:
        """Say whether there is a file of this name."""
        return self.path(name).exists()

    def free_name(self, base: str) -> str:
        """Return `base`, or with the first number behind it that is not taken."""
        stem, number = base[: MAX_NAME_LETTERS - 5], 1
        name = stem
        while self.exists(name):
            number += 1
            name = f"{stem}-{number}"
        return name

    def read(self, name: str) -> SavedSession:
        """Return a conversation; raises NotFoundError or BadFileError."""
        path = self.path(name)
        if not path.exists():
            raise NotFoundError(
                f"there is no session {name}", hint="localv4 sessions list shows them"
            )
        data = read_small_file(path, MAX_FILE_BYTES)
        try:
            head = _Head.model_validate_json(data)
            if head.format == FORMAT and head.version > VERSION:
                raise BadFileError(path, "made by a newer version", hint="update localv4")
            found = SavedSession.model_validate_json(data)
        except ValidationError as error:
            raise BadFileError(path, f"is not a saved session: {_first(error)}") from None
        if found.name != checked_name(name):
            raise BadFileError(path, "is the session of another name")
        return found

    def read_all(self) -> tuple[list[SavedSession], list[LocalV4Error]]:
        """Return all conversations, the last used first, and what is wrong with other files."""
        found, faults = [], []
        for name in self.names():
            try:
                found.append(self.read(name))
            except NotFoundError:
                continue  # another process removed it
            except LocalV4Error as error:
                faults.append(error)
        return sorted(found, key=lambda session: session.used, reverse=True), faults

    def write(self, session: SavedSession) -> None:
        """Write a conversation over the one of its name; raises LocalV4Error."""
        path = self.path(session.name)
        text = session.model_dump_json(indent=1, exclude_none=True)
        try:
            paths.private_dir(self.folder.parent)
            paths.private_dir(self.folder)
        except OSError as error:
            raise LocalV4Error(f"cannot write {path}: {error.strerror or error}") from error
        with finished_file(path) as file:
            file.write(text.encode())
        if not session.named:
            self._forget_old()

    def remove(self, name: str) -> None:
        """Remove a conversation's file, not its blocks: others may have them, too."""
        path = self.path(name)
        try:
            path.unlink(missing_ok=True)
        except OSError as error:
            raise LocalV4Error(f"cannot remove {path}: {error.strerror or error}") from error

    def _forget_old(self) -> None:
        """Remove the oldest conversations that nobody gave a name to, if there are too many."""
        names = self.names()
        if len(names) <= MOST_UNNAMED:
            return
        sessions, _ = self.read_all()
        for session in [session for session in sessions if not session.named][MOST_UNNAMED:]:
            self.remove(session.name)

    def claim(self, name: str, timeout_s: float) -> FileLock:
        """Keep other processes from this conversation until the lock is released or we end.

        Raises UsageError when another one has it for longer than the time-out; -1 waits for ever.
        """
        try:
            paths.private_dir(self.folder.parent)
            paths.private_dir(self.folder)
            lock = FileLock(self.folder / f".{checked_name(name)}.lock")
            lock.acquire(timeout=timeout_s)
        except Timeout:
            raise UsageError(f"the session {name} is in use by another localv4") from None
        except OSError as error:
            raise LocalV4Error(f"cannot lock the session {name}: {error}") from error
        return lock


def _first(error: ValidationError) -> str:
    """Describe the first thing that is wrong, in a few words."""
    detail = error.errors(include_url=False, include_input=False, include_context=False)[0]
    where = ".".join(map(str, detail["loc"]))
    return f"{where}: {detail['msg']}"[:200] if where else detail["msg"][:200]
