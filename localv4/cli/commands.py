"""The slash commands of the chat."""

import difflib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

from localv4.cli import generation, inputs, session_commands, terminal
from localv4.cli.repl import Chat
from localv4.cli.sampling_options import Effort
from localv4.cli.tables import print_table
from localv4.errors import UsageError


@dataclass(frozen=True, slots=True)
class Command:
    """A command: `run(chat, argument)` returns a question to put to the model, or None."""

    run: Callable[[Chat, str], str | None]
    usage: str
    help: str


def execute(chat: Chat, line: str) -> str | None:
    """Run the command in `line`. Raises UsageError, and EOFError to leave as Ctrl-D does."""
    name, _, argument = line.removeprefix("/").partition(" ")
    name = ALIASES.get(name, name)
    if name not in COMMANDS:
        near = difflib.get_close_matches(name, [*COMMANDS, *ALIASES], n=1)
        hint = f"did you mean /{near[0]}" if near else "/help lists them"
        raise UsageError(
            f"there is no command /{name}",
            hint=f"{hint} (a message that begins with a slash needs a space before it)",
        )
    command, argument = COMMANDS[name], argument.strip()
    if argument and command.usage == f"/{name}":
        raise UsageError(f"/{name} takes nothing more", hint=command.usage)
    return command.run(chat, argument)


def _help(chat: Chat, argument: str) -> None:
    rows = [(command.usage, command.help) for command in COMMANDS.values()]
    rows += [
        ('"""', "begin and end a message of several lines; Alt-Enter: a new line"),
        ("Ctrl-C", "stop the answer; at the prompt: clear the line"),
        ("Ctrl-D", "leave"),
        ("Ctrl-G", "write the message in $EDITOR"),
    ]
    print_table(chat.console, rows)
    chat.console.print()


def _exit(chat: Chat, argument: str) -> NoReturn:
    raise EOFError


def _clear(chat: Chat, argument: str) -> None:
    chat.clear()
    chat.say("(forgotten: the conversation starts anew)")


def _system(chat: Chat, argument: str) -> None:
    if argument:
        chat.conversation.system = None if argument == "none" else argument
    chat.say(f"system prompt: {chat.conversation.system or 'none'}")


def _think(chat: Chat, argument: str) -> None:
    efforts = [effort.value for effort in Effort]
    if argument and argument not in efforts:
        raise UsageError(f"no such effort: {argument}", hint=f"/think {'|'.join(efforts)}")
    chat.thinking, chat.effort = True, argument or None
    chat.say(f"thinking: on{f', effort {argument}' if argument else ''}")


def _nothink(chat: Chat, argument: str) -> None:
    chat.thinking, chat.effort = False, None
    chat.say("thinking: off")


def _set(chat: Chat, argument: str) -> None:
    name, _, value = argument.partition(" ")
    if name and not value.strip():
        raise UsageError(f"{name} needs a value", hint="/set NAME VALUE")
    if name:
        chat.settings = chat.settings.with_text(name, value.strip())
    print_table(chat.console, chat.settings.lines())
    chat.console.print()


def _show(chat: Chat, argument: str) -> None:
    model, engine = chat.loaded.model, chat.loaded.engine
    thinking = f"on, effort {chat.effort}" if chat.effort else "on" if chat.thinking else "off"
    rows = [
        ("model", model.name),
        ("path", str(model.path)),
        ("format", f"{model.format}, {generation.format_bytes(model.nbytes)}"),
        ("context", f"{chat.session.position} of {engine.ctx_size} tokens"),
        ("messages", str(len(chat.conversation.messages))),
        ("system", chat.conversation.system or "none"),
        ("thinking", thinking),
        *chat.settings.lines(),
    ]
    print_table(chat.console, rows)
    chat.console.print()


def _read(chat: Chat, argument: str) -> str:
    name, question = _split_file_name(argument)
    if not name:
        raise UsageError("/read needs a file", hint="/read FILE [QUESTION]")
    text = inputs.read_text_file(Path(name).expanduser(), chat.say)
    chat.say(f"(read {len(text)} characters)")
    return f"{text.rstrip()}\n\n{question}" if question else text


def _stats(chat: Chat, argument: str) -> None:
    chat.tell_statistics()
    state = generation.format_bytes(chat.session.state_bytes)
    chat.say(f"context {chat.session.position} tokens, {state} of state")


def _retry(chat: Chat, argument: str) -> str:
    question = chat.take_back()
    if question is None:
        raise UsageError("there is nothing to answer anew")
    if chat.settings.temp == 0 or chat.settings.seed is not None:
        chat.say("(the answer will be the same: /set temp 0.8, /set seed random)")
    return question


def _undo(chat: Chat, argument: str) -> None:
    question = chat.take_back()
    if question is None:
        raise UsageError("there is nothing to take back")
    chat.say(f"(taken back: {terminal.sanitize_line(question)[:60]})")


def _split_file_name(argument: str) -> tuple[str, str]:
    """Split `FILE rest`, where FILE may stand in quotes."""
    if argument[:1] in ("'", '"') and argument.count(argument[0]) > 1:
        name, _, rest = argument[1:].partition(argument[0])
    else:
        name, _, rest = argument.partition(" ")
    return name, rest.strip()


COMMANDS = {
    "help": Command(_help, "/help", "show this list"),
    "exit": Command(_exit, "/exit", "leave (also /bye, /quit)"),
    "clear": Command(_clear, "/clear", "forget the conversation"),
    "retry": Command(_retry, "/retry", "answer the last question anew"),
    "undo": Command(_undo, "/undo", "take back the last question and answer"),
    "save": Command(session_commands.save, "/save [NAME]", "keep the conversation, by this name"),
    "load": Command(session_commands.load, "/load NAME", "go on with a saved conversation"),
    "branch": Command(
        session_commands.branch, "/branch [NAME]", "keep the conversation, go on with a copy"
    ),
    "sessions": Command(session_commands.list_saved, "/sessions", "list saved conversations"),
    "read": Command(_read, "/read FILE [QUESTION]", "send the text of a file"),
    "system": Command(_system, "/system [TEXT]", "set the system prompt (none: no prompt)"),
    "think": Command(_think, "/think [EFFORT]", "think first: low, medium, high or max"),
    "nothink": Command(_nothink, "/nothink", "answer at once"),
    "set": Command(_set, "/set [NAME VALUE]", "show or change a sampling setting"),
    "show": Command(_show, "/show", "show the model and the settings"),
    "stats": Command(_stats, "/stats", "show speed and memory of the last answer"),
}
ALIASES = {"bye": "exit", "quit": "exit"}


class Completions:
    """What the tab key offers: commands, and those with an argument that is known."""

    def __init__(self, chat: Chat) -> None:
        self._chat = chat

    def __iter__(self) -> Iterator[str]:
        """Yield it as it is now, without the slash."""
        yield from (*COMMANDS, *ALIASES)
        yield from session_commands.names_to_load(self._chat)
        yield from (f"think {effort.value}" for effort in Effort)
