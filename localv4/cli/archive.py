"""Where conversations are kept: under which name, by whom, and what is written when."""

import os
import threading
from collections.abc import Callable
from datetime import datetime
from typing import TYPE_CHECKING

from filelock import BaseFileLock

from localv4.cli import worker
from localv4.cli.conversation import Conversation
from localv4.cli.signals import interrupt_sets
from localv4.cli.sizes import parse_bytes
from localv4.engine.saved_sessions import SavedSession, SavedSessions, checked_name, now
from localv4.engine.session_folder import LIMIT_VARIABLE, SessionFolder, open_folder
from localv4.errors import LocalV4Error, NotFoundError, UsageError

if TYPE_CHECKING:
    from localv4.cli.loading import Loaded
    from localv4.engine.session import Session


def folder_of_user() -> SessionFolder:
    """Return the folder of all sessions, as large as LOCALV4_SESSIONS_MAX allows."""
    text = os.environ.get(LIMIT_VARIABLE, "").strip()
    return open_folder(parse_bytes(text, LIMIT_VARIABLE) if text else None)


def keeps_by_itself() -> bool:
    """Say whether conversations are kept that nobody asked to keep."""
    return os.environ.get("LOCALV4_NOHISTORY", "0") in ("", "0")


class Archive:
    """The saved conversations, and the one of them that is being held.

    A conversation is `held` by one process at a time. `keep` writes it after each change: always
    when the user named it, and otherwise unless LOCALV4_NOHISTORY is set.
    """

    def __init__(
        self, model: str, weights: str, arithmetic: str, folder: SessionFolder | None = None
    ) -> None:
        """`weights` and `arithmetic` are the fingerprints of the model of this name."""
        from localv4.engine.session_store import SessionStore

        self._warnings: list[str] = []
        self.store = SessionStore(folder or folder_of_user(), arithmetic, self._warnings.append)
        self.saved = SavedSessions(self.store.folder.folder)
        self.held: SavedSession | None = None
        self._model, self._weights = model, weights
        self._lock: BaseFileLock | None = None
        self._has_failed = False

    def take_warnings(self) -> list[str]:
        """Return what went wrong since the last call: it must not disturb an answer on screen."""
        taken = self._warnings.copy()
        self._warnings.clear()
        return taken

    def is_of_this_model(self, session: SavedSession) -> bool:
        """Say whether a conversation was held with the model that is loaded."""
        return session.weights == self._weights

    def keep(self, conversation: Conversation, session: "Session | None" = None) -> None:
        """Write the conversation, and what `session` knows of its tokens; warn when that fails."""
        if self.held is None and not (keeps_by_itself() and conversation.messages):
            return
        try:
            self.save(conversation, session)
        except LocalV4Error as error:
            if not self._has_failed:
                self._warnings.append(f"this conversation is not saved: {error.message}")
            self._has_failed = True

    def save(self, conversation: Conversation, session: "Session | None" = None) -> None:
        """Write the conversation in any case; raises LocalV4Error."""
        if self.held is None:
            name = self.saved.free_name(f"chat-{datetime.now():%Y%m%d-%H%M%S}")
            self._hold(self._new(name, named=False))
        assert self.held is not None
        changes = {
            "model": self._model,
            "weights": self._weights,
            "used": now(),
            **conversation.to_save(),
        }
        if session is not None:
            with interrupt_sets(threading.Event()):  # a second Ctrl-C is needed to lose something
                worker.call(lambda: self.store.save(session))
            changes |= {"tokens": session.position, "blocks": self.store.chain(session)}
        self.held = self.held.model_copy(update=changes)
        self.saved.write(self.held)

    def _new(self, name: str, *, named: bool) -> SavedSession:
        time = now()
        return SavedSession(
            name=checked_name(name),
            named=named,
            model=self._model,
            weights=self._weights,
            created=time,
            used=time,
        )

    def _hold(self, session: SavedSession) -> None:
        """Hold a conversation that is new, or a copy, instead of the present one."""
        lock = self.saved.claim(session.name, 0)
        self.release()
        self.held, self._lock = session, lock

    def release(self) -> None:
        """Let the conversation that is held go; the next one will have another name."""
        if self._lock is not None:
            self._lock.release()
        self.held = self._lock = None

    def enter(self, name: str, tell: Callable[[str], None]) -> Conversation:
        """Hold the conversation of this name, a new one if there is none; wait until it is free."""
        try:
            self._lock = self.saved.claim(name, 0)
        except UsageError:
            tell(f"waiting: another localv4 uses the session {name}")
            self._lock = self.saved.claim(name, -1)
        try:
            self.held = self.saved.read(name)
        except NotFoundError:
            self.held = self._new(name, named=True)
        return Conversation.of_saved(self.held)

    def open(self, name: str) -> SavedSession:
        """Hold a saved conversation instead of the present one; return it as it was written."""
        if self.held is not None and self.held.name == checked_name(name):
            return self.saved.read(name)
        if not self.saved.exists(name):
            self.saved.read(name)  # raises the error that says so, and leaves no lock behind
        lock = self.saved.claim(name, 0)
        try:
            found = self.saved.read(name)  # not before: its holder may just have written it
        except LocalV4Error:
            lock.release()
            raise
        self.release()
        self.held, self._lock = found, lock
        return found

    def rename(self, name: str, conversation: Conversation, session: "Session") -> None:
        """Keep the conversation under a name of the user's choice.

        One that had a name of its own stays as it is under that, too.
        """
        before = self.held
        name = checked_name(name)
        if before is None or before.name != name:
            if self.saved.exists(name):
                raise UsageError(
                    f"there is a session {name} already", hint=f"localv4 sessions rm {name}"
                )
            start = before or self._new(name, named=True)
            self._hold(start.model_copy(update={"name": name, "named": True}))
        else:
            self.held = before.model_copy(update={"named": True})
        self.save(conversation, session)
        if before is not None and not before.named and before.name != name:
            self.saved.remove(before.name)

    def branch(self, name: str, conversation: Conversation, session: "Session") -> tuple[str, str]:
        """Keep the conversation and go on with a copy; return the names of both."""
        self.save(conversation, session)
        base = self.held
        assert base is not None
        copy = checked_name(name) if name else self.saved.free_name(base.name)
        if self.saved.exists(copy):
            raise UsageError(f"there is a session {copy} already")
        changes = {"name": copy, "named": bool(name) or base.named, "created": now()}
        self._hold(base.model_copy(update=changes))
        self.save(conversation, None)
        return base.name, copy


def open_archive(loaded: "Loaded") -> Archive:
    """Open the archive of this user for a loaded model; raises LocalV4Error."""
    from localv4.engine.fingerprint import arithmetic_fingerprint, weights_fingerprint

    engine = loaded.engine

    def read() -> tuple[str, str]:
        checkpoint = engine.checkpoint
        return weights_fingerprint(checkpoint), arithmetic_fingerprint(checkpoint, engine.network)

    try:
        return Archive(loaded.model.name, *worker.call(read))
    except OSError as error:
        raise LocalV4Error(f"cannot read {engine.path}: {error.strerror or error}") from error
