"""`localv4 sessions`: saved conversations, listed, shown and removed."""

import sys
from datetime import datetime
from typing import TYPE_CHECKING, Annotated, Any

import typer

from localv4.cli import options, terminal
from localv4.cli.precedence import Command
from localv4.errors import UsageError

if TYPE_CHECKING:
    from rich.console import Console

    from localv4.engine.saved_sessions import SavedSession, SavedSessions
    from localv4.engine.session_folder import SessionFolder

TITLE_LETTERS = 40

app = typer.Typer(help="Saved conversations: list, show, rm.", no_args_is_help=True)

Name = Annotated[str, typer.Argument(metavar="NAME", help="As `localv4 sessions list` shows it.")]
Names = Annotated[
    list[str] | None,
    typer.Argument(metavar="NAME...", help="As `localv4 sessions list` shows them."),
]
All = Annotated[bool, typer.Option("--all", metavar="", help="All sessions, and all their files.")]


@app.command("list", cls=Command)
def list_sessions(
    output_format: options.Format = options.OutputFormat.AUTO,
    as_json: options.Json = False,
    no_color: options.NoColor = False,
) -> None:
    """List saved conversations, the last used first."""
    from localv4.cli.generation import format_bytes
    from localv4.cli.loading import note, warn

    folder, saved = _open()
    sessions, faults = saved.read_all()
    for fault in faults:
        warn(f"{fault.message}: not shown")
    if options.wants_json(output_format, as_json):
        rows = [_document(session, folder) for session in sessions]
        terminal.print_json(rows)
        return
    print_sessions(terminal.make_console(sys.stdout, no_color=no_color), sessions, folder)
    held = sum(file.nbytes for file in folder.files())
    note(f"{format_bytes(held)} of at most {format_bytes(folder.limit)} in {folder.folder}")


@app.command("show", cls=Command)
def show(
    name: Name,
    output_format: options.Format = options.OutputFormat.AUTO,
    as_json: options.Json = False,
    no_color: options.NoColor = False,
) -> None:
    """Show a saved conversation."""
    from localv4.cli.generation import format_bytes
    from localv4.cli.tables import print_table

    folder, saved = _open()
    session = saved.read(name)
    if options.wants_json(output_format, as_json):
        document = _document(session, folder) | {
            "system": session.system,
            "tools": session.tools,
            "messages": [message.model_dump(exclude_none=True) for message in session.messages],
        }
        terminal.print_json(document)
        return
    console = terminal.make_console(sys.stdout, no_color=no_color)
    rows = [
        ("name", session.name),
        ("model", session.model),
        ("created", _time(session.created)),
        ("used", _time(session.used)),
        ("tokens", str(session.tokens)),
        ("on disk", format_bytes(folder.nbytes_of(session.blocks))),
        ("system", session.system or "none"),
    ]
    print_table(console, rows)
    clean = terminal.sanitize if terminal.is_terminal(sys.stdout) else str
    for message in session.messages:
        mark = "> " if message.role == "user" else ""
        print(f"\n{mark}{clean(message.content)}")


@app.command("rm", cls=Command)
def remove(names: Names = None, everything: All = False, yes: options.Yes = False) -> None:
    """Remove saved conversations, and what only they have on the disk."""
    from localv4.cli.generation import format_bytes
    from localv4.cli.loading import note

    if bool(names) == everything:
        raise UsageError("name the sessions to remove, or say --all")
    folder, saved = _open()
    chosen = saved.names() if everything else list(dict.fromkeys(names or []))
    for name in chosen:
        if not saved.exists(name):
            saved.read(name)  # raises the error that says so
    what = f"all {len(chosen)} sessions" if everything else ", ".join(chosen)
    if not (yes or terminal.confirmed(f"Remove {what}?")):
        return
    freed = _remove(folder, saved, chosen)
    if everything:
        freed += folder.remove_all()
    note(f"{len(chosen)} removed, {format_bytes(freed)} freed")


def _remove(folder: "SessionFolder", saved: "SavedSessions", names: list[str]) -> int:
    """Remove sessions; return the bytes of the files that no other session has."""
    from localv4.errors import BadFileError

    mine: set[str] = set()
    for name in names:
        lock = saved.claim(name, 0)
        try:
            mine |= set(saved.read(name).blocks)
        except BadFileError:
            pass  # what it had on the disk goes when it was not used for longest
        finally:
            saved.remove(name)
            lock.release()
    others = (session.blocks for session in saved.read_all()[0])
    return folder.remove(mine.difference(*others))


def print_sessions(
    console: "Console", sessions: "list[SavedSession]", folder: "SessionFolder"
) -> None:
    """Print a table of conversations."""
    from localv4.cli.generation import format_bytes
    from localv4.cli.tables import print_table

    rows = [
        (
            session.name,
            session.model,
            str(len(session.messages)),
            str(session.tokens),
            format_bytes(folder.nbytes_of(session.blocks)),
            _time(session.used),
            session.title[:TITLE_LETTERS],
        )
        for session in sessions
    ]
    header = ("NAME", "MODEL", "MESSAGES", "TOKENS", "ON DISK", "USED", "ABOUT")
    sizes, times = frozenset({2, 3, 4}), frozenset({5})
    print_table(console, rows, header=header, numbers=sizes, whole=times, cuts_last=True)


def _open() -> "tuple[SessionFolder, SavedSessions]":
    from localv4.cli.archive import folder_of_user
    from localv4.engine.saved_sessions import SavedSessions

    folder = folder_of_user()
    return folder, SavedSessions(folder.folder)


def _time(time: datetime) -> str:
    return f"{time.astimezone():%Y-%m-%d %H:%M}"


def _document(session: "SavedSession", folder: "SessionFolder") -> dict[str, Any]:
    return {
        "name": session.name,
        "named": session.named,
        "model": session.model,
        "created": session.created.isoformat(),
        "used": session.used.isoformat(),
        "messages": len(session.messages),
        "tokens": session.tokens,
        "bytes": folder.nbytes_of(session.blocks),
        "title": session.title,
    }
