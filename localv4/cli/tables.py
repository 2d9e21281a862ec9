"""Columns of text on stdout: fitted to a terminal, one line per row into a pipe."""

from collections.abc import Sequence

from rich.console import Console
from rich.table import Table
from rich.text import Text

from localv4.cli import terminal
from localv4.cli.rendering import Lined, clean_lines


def print_table(
    console: Console,
    rows: Sequence[Sequence[str]],
    *,
    header: Sequence[str] = (),
    numbers: frozenset[int] = frozenset(),
) -> None:
    """Print rows in columns; those with an index in `numbers` are set to the right."""
    table = Table.grid(padding=(0, 2))
    columns = len(rows[0]) if rows else len(header)
    for index in range(columns):
        is_last = index == columns - 1
        table.add_column(
            justify="right" if index in numbers else "left",
            overflow="fold",
            no_wrap=index == 0 and not is_last,
        )
    if header:
        table.add_row(*(Text(name, style="dim") for name in header))
    for row in rows:
        table.add_row(*(Text(terminal.sanitize_line(cell)) for cell in row))
    console.print(Lined(clean_lines(console, table)), end="")


def print_section(console: Console, title: str, rows: Sequence[tuple[str, str]]) -> None:
    """Print a title and, below it, names with their values."""
    console.print(Text(title, style="bold"))
    print_table(console, [(f"  {name}", value) for name, value in rows])
    console.print()
