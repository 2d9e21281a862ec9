"""The terminal: what may reach it, in which colours, and how it is left behind."""

import contextlib
import json
import os
import sys
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, TextIO

from localv4.errors import LocalV4Error, UsageError

if TYPE_CHECKING:
    from rich.console import Console

# Columns. Wide enough that nothing is wrapped where no screen sets a limit.
PIPE_WIDTH = 2**16

# Markdown in colours that can be read on a dark and on a light background.
STYLES = {
    "markdown.code": "cyan",
    "markdown.code_block": "none",
    "markdown.block_quote": "dim",
    "markdown.h1": "bold underline",
    "markdown.h2": "bold underline",
    "markdown.h3": "bold",
    "markdown.h4": "bold",
    "markdown.h5": "bold",
    "markdown.h6": "bold",
    "markdown.link": "none",
    "markdown.link_url": "underline",
    "markdown.item.bullet": "none",
    "markdown.table.border": "dim",
    "markdown.table.header": "bold",
}

# Code points that could command a terminal, reorder or hide text, or not be written at all.
REPLACED_RANGES = (
    (0x80, 0x9F),  # C1 controls
    (0x202A, 0x202E),  # bidirectional embeddings and overrides
    (0x2066, 0x2069),  # bidirectional isolates
    (0xD800, 0xDFFF),  # lone surrogates: no encoding has them
    (0xE0000, 0xE007F),  # tag characters: invisible text
)


def _visible_signs() -> dict[int, int]:
    """Map each unwanted code point to one visible sign: Unicode's control pictures, or U+FFFD."""
    table = {code: 0x2400 + code for code in range(0x20) if chr(code) not in "\t\n"}
    table[0x7F] = 0x2421
    for first, last in REPLACED_RANGES:
        table.update(dict.fromkeys(range(first, last + 1), 0xFFFD))
    return table


_SIGNS = _visible_signs()
_LINE_SIGNS = {**_SIGNS, 0x09: 0x2409, 0x0A: 0x240A}


def sanitize(text: str) -> str:
    """Replace everything in `text` that a terminal would obey, except tab and newline.

    Each character is judged alone, so text may be cut anywhere and sanitised piece by piece.
    """
    return text.translate(_SIGNS)


def sanitize_line(text: str) -> str:
    """Sanitise a name or value that must stay on one line: tab and newline become signs too."""
    return text.translate(_LINE_SIGNS)


def escape_json(text: str) -> str:
    r"""Write as \uXXXX what a terminal would obey in JSON text; the value it stands for is kept."""
    return "".join(_json_escape(char) if ord(char) in _SIGNS else char for char in text)


def say(text: str) -> None:
    """Write a line for people to stderr."""
    sys.stderr.write(f"{sanitize_line(text)}\n")
    sys.stderr.flush()


def print_json(value: Any) -> None:
    """Write a JSON document for people and programs to stdout."""
    print(escape_json(json.dumps(value, ensure_ascii=False, indent=2)))


def _json_escape(char: str) -> str:
    units = char.encode("utf-16-be", "surrogatepass")
    return "".join(f"\\u{units[i]:02x}{units[i + 1]:02x}" for i in range(0, len(units), 2))


def is_terminal(stream: TextIO | None) -> bool:
    """Say whether `stream` is open and a terminal."""
    try:
        return stream is not None and stream.isatty()
    except ValueError:  # a closed stream
        return False


def can_move_cursor(stream: TextIO | None) -> bool:
    """Say whether lines on `stream` may be redrawn: a terminal that is not a dumb one."""
    return is_terminal(stream) and os.environ.get("TERM", "").lower() not in ("dumb", "unknown")


def wants_color(stream: TextIO | None, *, no_color: bool = False) -> bool:
    """Apply --no-color, NO_COLOR, FORCE_COLOR and TERM=dumb, in this order."""
    if no_color or "NO_COLOR" in os.environ:
        return False
    if os.environ.get("FORCE_COLOR", "0") not in ("", "0"):
        return True
    return can_move_cursor(stream)


def make_console(stream: TextIO, *, no_color: bool = False) -> "Console":
    """Return a rich console for `stream` that follows the colour rules and reads no markup."""
    from rich.console import Console
    from rich.theme import Theme

    color = wants_color(stream, no_color=no_color)
    return Console(
        file=stream,
        force_terminal=color or is_terminal(stream),
        width=None if is_terminal(stream) else PIPE_WIDTH,
        no_color=not color,
        markup=False,
        highlight=False,
        emoji=False,
        theme=Theme(STYLES),
    )


def prepare_streams() -> None:
    """Make the standard streams safe to use whatever the locale and however they were opened.

    A pipe gets UTF-8 (a program reads it) unless PYTHONIOENCODING says otherwise; a terminal keeps
    its encoding, and characters that it lacks are written as escapes.
    """
    _fill_closed_descriptors()
    for stream in (sys.stdout, sys.stderr):
        reconfigure: Any = getattr(stream, "reconfigure", None)
        if reconfigure is None:
            continue
        if is_terminal(stream) or "PYTHONIOENCODING" in os.environ:
            reconfigure(errors="backslashreplace")
        else:
            reconfigure(encoding="utf-8", errors="backslashreplace", newline="\n")
    if sys.stderr is None:
        sys.stderr = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115, PTH123
    if sys.stdout is None:
        sys.stdout = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115, PTH123
        raise LocalV4Error("standard output is closed")


def _fill_closed_descriptors() -> None:
    """Open the null device on closed descriptors 0 to 2, so that no data file ends up there."""
    for descriptor in range(3):
        try:
            os.fstat(descriptor)
        except OSError:
            os.open(os.devnull, os.O_RDWR)


def silence_stdout() -> None:
    """Send what is still buffered to the null device: its reader is gone or its disk is full."""
    with contextlib.suppress(OSError, ValueError):
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, sys.stdout.fileno())
        os.close(null)


def confirmed(question: str) -> bool:
    """Ask before something is removed; raises UsageError where nobody can answer."""
    if not (is_terminal(sys.stdin) and is_terminal(sys.stderr)):
        raise UsageError("nothing was removed: there is nobody to ask", hint="add -y to remove")
    sys.stderr.write(f"{sanitize_line(question)} [y/N] ")
    sys.stderr.flush()
    return sys.stdin.readline().strip().lower() in ("y", "yes")


@contextlib.contextmanager
def no_echo() -> Iterator[None]:
    """Keep keys that are typed while output is redrawn from disturbing it (POSIX terminals)."""
    if sys.platform == "win32" or not _owns_terminal():
        yield
        return
    import termios

    descriptor = sys.stdin.fileno()
    before = termios.tcgetattr(descriptor)
    quiet = before.copy()
    quiet[3] &= ~termios.ECHO
    termios.tcsetattr(descriptor, termios.TCSADRAIN, quiet)
    try:
        yield
    finally:
        termios.tcsetattr(descriptor, termios.TCSADRAIN, before)


def _owns_terminal() -> bool:
    """Say whether stdin is a terminal whose modes this process may set without being stopped."""
    if sys.platform == "win32" or not is_terminal(sys.stdin):
        return False
    try:
        return os.tcgetpgrp(sys.stdin.fileno()) == os.getpgrp()
    except (OSError, ValueError):
        return False
