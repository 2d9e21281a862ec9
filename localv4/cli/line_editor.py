"""The prompt of the chat: editing, history, multi-line input and the status line below it."""

import os
from collections.abc import Callable, Iterable
from pathlib import Path

from prompt_toolkit import PromptSession
from prompt_toolkit.completion import CompleteEvent, Completer, Completion
from prompt_toolkit.document import Document
from prompt_toolkit.history import FileHistory, History, InMemoryHistory
from prompt_toolkit.key_binding import KeyBindings, KeyPressEvent
from prompt_toolkit.output import ColorDepth
from prompt_toolkit.shortcuts import CompleteStyle

from localv4 import paths
from localv4.cli.signals import Terminated, termination_calls
from localv4.errors import LocalV4Error

QUOTES = '"""'
PROMPT = "> "

# Bytes. A longer history file loses its older half when a chat starts.
MAX_HISTORY_BYTES = 2**20


class LineEditor:
    """Reads one message or command at a time."""

    def __init__(
        self,
        commands: Iterable[str],
        status: Callable[[], str],
        *,
        no_color: bool,
        warn: Callable[[str], None],
    ) -> None:
        self._session: PromptSession[str] = PromptSession(
            PROMPT,
            multiline=True,
            prompt_continuation="  ",
            key_bindings=_key_bindings(),
            history=open_history(warn),
            completer=_CommandCompleter(commands),
            complete_style=CompleteStyle.READLINE_LIKE,
            complete_while_typing=False,
            reserve_space_for_menu=0,
            bottom_toolbar=status,
            color_depth=ColorDepth.DEPTH_1_BIT if no_color else None,
        )

    def read(self) -> str:
        """Return what the user entered. Raises EOFError on Ctrl-D, KeyboardInterrupt on Ctrl-C."""
        with termination_calls(self._leave):
            return unquote(self._session.prompt())

    def _leave(self) -> None:
        """End the prompt with Terminated; an exception in its event loop would be swallowed."""
        app = self._session.app
        if app.loop is None or app.future is None or app.future.done():
            raise Terminated
        app.loop.call_soon_threadsafe(lambda: app.exit(exception=Terminated()))


def is_open_quote(text: str) -> bool:
    '''Say whether a message in """ still lacks its closing quotes.'''
    text = text.strip()
    return text.startswith(QUOTES) and (len(text) < 2 * len(QUOTES) or not text.endswith(QUOTES))


def unquote(text: str) -> str:
    '''Take the """ off a message.'''
    stripped = text.strip()
    if stripped.startswith(QUOTES):
        return stripped.removeprefix(QUOTES).removesuffix(QUOTES).strip("\n")
    return text


def open_history(warn: Callable[[str], None]) -> History:
    """Open the history file of this user alone; without one, remember within this chat only."""
    if os.environ.get("LOCALV4_NOHISTORY", "0") not in ("", "0"):
        return InMemoryHistory()
    path = paths.state_dir() / "history"
    try:
        paths.private_dir(path.parent)
        os.close(os.open(path, os.O_RDWR | os.O_CREAT, 0o600))
        path.chmod(0o600)
        _trim(path)
    except (OSError, LocalV4Error) as error:
        warn(f"this chat has no history file: {error}")
        return InMemoryHistory()
    return _History(path)


class _History(FileHistory):
    """A history file that is given up without a word when it cannot be written any more."""

    def store_string(self, string: str) -> None:
        try:
            super().store_string(string)
        except (OSError, UnicodeError):
            return


def _trim(path: Path) -> None:
    """Drop the older entries of a file that has grown beyond its bound."""
    if path.stat().st_size <= MAX_HISTORY_BYTES:
        return
    with path.open("rb") as file:
        file.seek(-MAX_HISTORY_BYTES // 2, os.SEEK_END)
        recent = file.read()
    start = recent.find(b"\n# ")  # where an entry begins
    path.write_bytes(recent[start:] if start >= 0 else b"")


def _key_bindings() -> KeyBindings:
    bindings = KeyBindings()

    @bindings.add("enter")
    def _enter(event: KeyPressEvent) -> None:
        buffer = event.current_buffer
        if is_open_quote(buffer.text):
            buffer.insert_text("\n")
        else:
            buffer.validate_and_handle()

    @bindings.add("escape", "enter")
    def _newline(event: KeyPressEvent) -> None:
        event.current_buffer.insert_text("\n")

    @bindings.add("c-g")
    def _open_editor(event: KeyPressEvent) -> None:
        event.current_buffer.open_in_editor()

    return bindings


class _CommandCompleter(Completer):
    """Completes slash commands; those with an argument once their name is there."""

    def __init__(self, commands: Iterable[str]) -> None:
        self._commands = commands

    def get_completions(
        self, document: Document, complete_event: CompleteEvent
    ) -> Iterable[Completion]:
        """Yield the commands that begin with what stands before the cursor."""
        typed = document.text_before_cursor
        for command in self._commands:
            is_due = " " in typed or " " not in command
            if is_due and typed.startswith("/") and f"/{command}".startswith(typed):
                yield Completion(f"/{command}", start_position=-len(typed))
