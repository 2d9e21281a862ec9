"""The slash commands of the chat that save, load and branch conversations."""

from collections.abc import Iterator
from typing import TYPE_CHECKING

from localv4.cli import terminal
from localv4.cli.conversation import Conversation
from localv4.cli.repl import Chat
from localv4.errors import LocalV4Error, UsageError

if TYPE_CHECKING:
    from localv4.cli.archive import Archive
    from localv4.engine.saved_sessions import SavedSession

SHOWN_LETTERS = 300
"""Of the last question and the last answer, when a conversation is loaded."""


def save(chat: Chat, argument: str) -> None:
    """Keep the conversation, under a name if one is given."""
    archive = _archive(chat)
    if argument:
        archive.rename(argument, chat.conversation, chat.session)
    else:
        archive.save(chat.conversation, chat.session)
    assert archive.held is not None
    chat.say(f"(saved as {archive.held.name})")


def load(chat: Chat, argument: str) -> None:
    """Go on with a saved conversation."""
    if not argument:
        raise UsageError("/load needs a name", hint="/sessions lists them")
    _show(chat, _archive(chat).open(argument))


def branch(chat: Chat, argument: str) -> None:
    """Keep the conversation and go on with a copy of it."""
    if not chat.conversation.messages:
        raise UsageError("there is nothing to branch from")
    before, after = _archive(chat).branch(argument, chat.conversation, chat.session)
    chat.say(f"({before} is kept; this is {after} now)")


def list_saved(chat: Chat, argument: str) -> None:
    """Print the saved conversations."""
    from localv4.cli.sessions import print_sessions

    archive = _archive(chat)
    sessions, faults = archive.saved.read_all()
    for fault in faults:
        chat.say(f"warning: {fault.message}")
    if sessions:
        print_sessions(chat.console, sessions, archive.store.folder)
        chat.console.print()
    else:
        chat.say("(no saved conversations)")


def resume(chat: Chat) -> None:
    """Go on with the last conversation that was held with this model."""
    archive = _archive(chat)
    sessions, _ = archive.saved.read_all()
    last = next((session for session in sessions if archive.is_of_this_model(session)), None)
    if last is None:
        chat.say("(there is no conversation with this model yet: a new one)")
        return
    try:
        _show(chat, archive.open(last.name))
    except UsageError:  # two chats must not write to the same file
        _show(chat, last)
        chat.say(f"({last.name} is open in another chat: this one gets a name of its own)")


def enter(chat: Chat, name: str) -> None:
    """Go on with the conversation of this name, or begin it."""
    archive = _archive(chat)
    if archive.saved.exists(name):
        _show(chat, archive.open(name))
    else:
        archive.rename(name, chat.conversation, chat.session)
        chat.say(f"(a new conversation: {name})")


def names_to_load(chat: Chat) -> Iterator[str]:
    """Yield `load NAME` for each saved conversation, for completion."""
    if chat.archive is None:
        return
    try:
        yield from (f"load {name}" for name in chat.archive.saved.names())
    except LocalV4Error:
        return


def _archive(chat: Chat) -> "Archive":
    if chat.archive is None:
        raise UsageError("this chat saves nothing")
    return chat.archive


def _show(chat: Chat, saved: "SavedSession") -> None:
    """Make a saved conversation the present one and show how it ended."""
    assert chat.archive is not None
    chat.conversation = Conversation.of_saved(saved)
    for message in chat.conversation.messages[-2:]:
        text = " ".join(message["content"].split())
        short = text if len(text) <= SHOWN_LETTERS else f"{text[:SHOWN_LETTERS]} ..."
        chat.say(f"> {short}" if message["role"] == "user" else short)
    note = f"({terminal.sanitize_line(saved.name)}: {len(saved.messages)} messages"
    if not chat.archive.is_of_this_model(saved):
        note += f", with {terminal.sanitize_line(saved.model)} so far: read anew"
    chat.say(f"{note})")
