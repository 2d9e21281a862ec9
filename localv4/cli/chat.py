"""`localv4 chat`: a conversation in the terminal."""

import sys
from contextlib import ExitStack
from typing import TYPE_CHECKING

from localv4 import __version__
from localv4.cli import options, terminal
from localv4.cli.engine_options import EngineOptions, TraceRoutes
from localv4.cli.option_groups import with_groups
from localv4.cli.sampling_options import SamplingOptions, ThinkingOptions
from localv4.errors import LocalV4Error, UsageError

if TYPE_CHECKING:
    from localv4.cli.line_editor import LineEditor
    from localv4.cli.repl import Chat


@with_groups
def chat(
    model_argument: options.ModelArgument = None,
    *,
    model: options.Model = None,
    ctx_size: options.ContextSize = None,
    engine: EngineOptions,
    trace_routes: TraceRoutes = None,
    system: options.System = None,
    session: options.SessionName = None,
    resume: options.Continue = False,
    sampling: SamplingOptions,
    thought: ThinkingOptions,
    hide_thinking: options.HideThinking = False,
    stats: options.Stats = False,
    quiet: options.Quiet = False,
    no_color: options.NoColor = False,
) -> None:
    """Talk with a model in the terminal.

    Commands begin with a slash: /help lists them. Ctrl-C stops an answer, Ctrl-D leaves. What is
    said is kept for --continue and /load, unless LOCALV4_NOHISTORY=1 is set.
    """
    _check_terminal()
    if session is not None and resume:
        raise UsageError("--session contradicts --continue")
    thinking, effort = thought.mode()
    values = sampling.values()

    from localv4.cli import loading
    from localv4.cli.archive import open_archive
    from localv4.cli.repl import Chat

    reference = options.one_of(model_argument, model, "--model")
    setup = engine.setup(ctx_size)
    loaded = loading.load_engine(reference, setup, quiet=quiet, no_color=no_color)
    talking = Chat(
        loaded,
        terminal.make_console(sys.stdout, no_color=no_color),
        loaded.settings(values),
        system=system,
        thinking=thinking,
        effort=effort,
        hide_thinking=hide_thinking,
        stats=stats,
        archive=open_archive(loaded),
    )
    _find_conversation(talking, resume, session, system)
    with ExitStack() as stack:
        if trace_routes is not None:
            stack.enter_context(loaded.record_routes(trace_routes))
        talk(talking, no_color=no_color)


def _check_terminal() -> None:
    if not (terminal.is_terminal(sys.stdin) and terminal.is_terminal(sys.stdout)):
        raise UsageError(
            "chat needs a terminal for both input and output",
            hint='in scripts and pipes: localv4 run "PROMPT"',
        )


def _find_conversation(chat: "Chat", resume: bool, session: str | None, system: str | None) -> None:
    """Make a saved conversation the present one, if that was asked for."""
    from localv4.cli import session_commands

    if resume:
        session_commands.resume(chat)
    elif session is not None:
        session_commands.enter(chat, session)
    if system is not None:
        chat.conversation.system = system


def talk(chat: "Chat", *, no_color: bool) -> None:
    """Read and answer until the user leaves."""
    from localv4.cli import commands, loading
    from localv4.cli.line_editor import LineEditor

    editor = LineEditor(
        commands.Completions(chat),
        chat.status,
        no_color=not terminal.wants_color(sys.stdout, no_color=no_color),
        warn=loading.warn,
    )
    chat.say(f"localv4 {__version__} | {chat.loaded.name} | /help for help, Ctrl-D to leave")
    while (line := _read_line(chat, editor)) is not None:
        try:
            is_command = line.startswith("/")
            question = commands.execute(chat, line) if is_command else line
        except EOFError:
            return
        except LocalV4Error as error:
            chat.show_error(error)
            continue
        if question is not None and question.strip():
            chat.ask(question)


def _read_line(chat: "Chat", editor: "LineEditor") -> str | None:
    """Return the next line, or None when the user leaves; Ctrl-C only clears the line."""
    while True:
        try:
            return editor.read()
        except EOFError:
            return None
        except KeyboardInterrupt:
            chat.say("(Ctrl-D or /exit leaves)")
