"""Prefixes of timelines on the disk: shared by all sessions, bounded in size, never trusted."""

import os
import shutil
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from localv4 import paths
from localv4.engine import session_blocks as blocks
from localv4.engine.session import Session
from localv4.engine.session_blocks import BLOCK_TOKENS
from localv4.engine.session_folder import FILLED, LIMIT_VARIABLE, SessionFolder, remove_file
from localv4.errors import BadFileError, LocalV4Error
from localv4.model.snapshot import Snapshot, restore
from localv4.model.state import State

LEFT_FREE = 1 << 30
"""Bytes of the disk that are left to others."""

THREADS = min(4, os.cpu_count() or 1)
"""Files that are read or written at the same time: disks want several requests."""

COPIED_BLOCKS = 64
"""Blocks that are copied between two looks at the memory for rows: 25 MB of Flash."""

T = TypeVar("T")
Warn = Callable[[str], None]


class SessionStore:
    """The part of a folder that one network can use. Trouble with files is told once, by `warn`.

    Processes may share the folder: files appear whole and never change, and one that another
    process removed is one that was never there.
    """

    def __init__(self, folder: SessionFolder, fingerprint: str, warn: Warn) -> None:
        """`fingerprint` tells the model and the way of computing."""
        self.folder = folder
        self._fingerprint = fingerprint
        self._warn: Warn | None = warn
        self._telling = threading.Lock()
        self._held: int | None = None  # bytes in the folder, as far as this process knows

    def chain(self, session: Session) -> list[str]:
        """Return the names of the blocks of a session up to its last rung."""
        marks = session.ladder.landmarks
        end = marks[-1].position if marks else 0
        return blocks.chain(self._root(session.state), session.tokens[:end])

    def load(self, state: State, token_ids: Sequence[int], valid: int) -> Snapshot | None:
        """Bring `state` to the longest stored prefix of `token_ids`; see `session.Store`."""
        names = blocks.chain(self._root(state), token_ids)
        for count in range(len(names), state.position // BLOCK_TOKENS, -1):
            if not self.folder.snapshot(names[count - 1]).exists():
                continue
            snapshot = self._load(state, names[:count], token_ids, valid)
            if snapshot is not None:
                self._touch(names[:count], [snapshot])
                return snapshot
        return None

    def _load(
        self, state: State, names: Sequence[str], token_ids: Sequence[int], valid: int
    ) -> Snapshot | None:
        """Read the snapshot after all these blocks and what lacks of them; None if that fails."""
        first = min(valid // BLOCK_TOKENS, len(names))
        wanted = [(index, self.folder.block(names[index])) for index in range(first, len(names))]
        if not all(path.exists() for _, path in wanted):
            return None
        end = len(names) * BLOCK_TOKENS
        snapshot = self._read(
            self.folder.snapshot(names[-1]), lambda path: blocks.read_snapshot(path, state, end)
        )
        if snapshot is None:
            return None
        state.open_rows(first * BLOCK_TOKENS, end)

        def put(item: tuple[int, Path]) -> int | None:
            index, path = item
            return self._read(path, lambda path: blocks.put_block(path, state, index, token_ids))

        done: list[int | None] = []
        with ThreadPoolExecutor(THREADS) as pool:
            for some in _parts(wanted):  # all of them, so that every bad one is removed
                state.make_way_to_copy(len(some) * BLOCK_TOKENS)
                done += pool.map(put, some)
        if None in done:
            return None
        restore(state, snapshot)
        return snapshot

    def save(self, session: Session) -> None:
        """Write what the folder lacks of a session: blocks up to its last rung, and landmarks."""
        names = self.chain(session)
        marks = [mark for mark in session.ladder.landmarks if mark.position]
        try:
            pending = [
                *self._missing_blocks(session, names),
                *self._missing_marks(session, names, marks),
            ]
            if pending and self._has_room(sum(item.form.nbytes for item in pending)):
                with ThreadPoolExecutor(THREADS) as pool:
                    for some in _parts(pending):
                        session.state.make_way_to_copy(len(some) * BLOCK_TOKENS)
                        self._held = (self._held or 0) + sum(pool.map(_write, some))
            self._touch(names, marks)
        except (OSError, LocalV4Error) as error:
            self._tell(f"cannot keep this session in {self.folder.folder}: {error}")

    def _root(self, state: State) -> str:
        return f"{self._fingerprint}\n{blocks.layout_of(state)}"

    def _missing_blocks(self, session: Session, names: Sequence[str]) -> "Iterator[_Pending]":
        for index, name in enumerate(names):
            path = self.folder.block(name)
            arrays = blocks.block_arrays(session.state, index, session.tokens)
            form = blocks.block_form(arrays)
            if not _has_size(path, form.nbytes):
                yield _Pending(path, form, arrays)

    def _missing_marks(
        self, session: Session, names: Sequence[str], marks: Sequence[Snapshot]
    ) -> "Iterator[_Pending]":
        for mark in marks:
            path = self.folder.snapshot(names[mark.position // BLOCK_TOKENS - 1])
            form = blocks.snapshot_form(session.state, mark.position)
            if not _has_size(path, form.nbytes):
                yield _Pending(path, form, mark.rows)

    def _has_room(self, nbytes: int) -> bool:
        """Make room for so many bytes; say whether there is some now."""
        folder, limit = self.folder.folder, self.folder.limit
        if nbytes > limit * FILLED:
            if limit:
                self._tell(f"this session is larger than {LIMIT_VARIABLE}: it is not kept")
            return False
        paths.private_dir(folder)
        if self._held is None or self._held + nbytes > limit:
            self._held = self.folder.make_room(nbytes)
        if shutil.disk_usage(folder).free < nbytes + LEFT_FREE:
            self._tell(f"the disk of {folder} is nearly full: this session is not kept")
            return False
        return True

    def _touch(self, names: Sequence[str], marks: Sequence[Snapshot]) -> None:
        """Note that files are in use: beginnings count as used later, for more depends on them."""
        now = time.time_ns()
        for index, name in enumerate(names):
            _set_time(self.folder.block(name), now - 1000 * index)
        for mark in marks:
            index = mark.position // BLOCK_TOKENS - 1
            _set_time(self.folder.snapshot(names[index]), now - 1000 * index)

    def _read(self, path: Path, read: Callable[[Path], T]) -> T | None:
        """Call `read`; a file that it cannot use is removed, so that a good one can follow."""
        try:
            return read(path)
        except FileNotFoundError:
            return None  # another process removed it
        except BadFileError as error:
            remove_file(path)
            self._tell(f"{error.message}: removed and computed anew")
        except OSError as error:
            self._tell(f"cannot read {path}: {error.strerror or error}; computed anew")
        return None

    def _tell(self, text: str) -> None:
        """Warn, but only the first time, whichever of the threads it is."""
        with self._telling:
            warn, self._warn = self._warn, None
        if warn is not None:
            warn(text)


@dataclass(frozen=True, slots=True)
class _Pending:
    """A file to be written."""

    path: Path
    form: blocks.Form
    arrays: Sequence[blocks.Array]


def _write(pending: _Pending) -> int:
    pending.path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    blocks.write_file(pending.path, pending.form, pending.arrays)
    return pending.form.nbytes


def _parts(items: Sequence[T]) -> Iterator[Sequence[T]]:
    """Cut a sequence into parts that are copied at a time."""
    return (items[at : at + COPIED_BLOCKS] for at in range(0, len(items), COPIED_BLOCKS))


def _has_size(path: Path, nbytes: int) -> bool:
    with suppress(OSError):
        return path.stat().st_size == nbytes
    return False


def _set_time(path: Path, time_ns: int) -> None:
    with suppress(OSError):  # removed meanwhile, or on a disk that cannot be written to
        os.utime(path, ns=(time_ns, time_ns))
