"""Columns of text on stdout: fitted to a terminal, one line per row into a pipe."""

from collections.abc import Sequence

from rich.cells import cell_len
from rich.console import Console
from rich.table import Table
from rich.text import Text

from localv4.cli import terminal
from localv4.cli.rendering import Lined, clean_lines

GAP = 2
"""Letters between two columns."""

LEAST_CUT = 10
"""Letters of a column whose cells are cut, at least."""


def print_table(
    console: Console,
    rows: Sequence[Sequence[str]],
    *,
    header: Sequence[str] = (),
    numbers: frozenset[int] = frozenset(),
    whole: frozenset[int] = frozenset(),
    cuts_last: bool = False,
) -> None:
    """Print rows in columns; those with an index in `numbers` are set to the right.

    Where a terminal is narrow, neither numbers nor cells of the `whole` columns are broken; with
    `cuts_last` those of the last one lose their ends.
    """
    table = Table.grid(padding=(0, GAP))
    cells = [tuple(map(terminal.sanitize_line, row)) for row in rows]
    columns = len(rows[0]) if rows else len(header)
    for index in range(columns):
        is_last = index == columns - 1
        is_cut = is_last and cuts_last
        table.add_column(
            justify="right" if index in numbers else "left",
            overflow="ellipsis" if is_cut else "fold",
            no_wrap=(index == 0 and not is_last) or index in numbers | whole or is_cut,
            max_width=_room_for_last(console, [header, *cells]) if is_cut else None,
        )
    if header:
        table.add_row(*(Text(name, style="dim") for name in header))
    for row in cells:
        table.add_row(*map(Text, row))
    console.print(Lined(clean_lines(console, table)), end="")


def _room_for_last(console: Console, rows: Sequence[Sequence[str]]) -> int:
    """Return how wide the last column may be, that the others have what they need."""
    others = zip(*(row[:-1] for row in rows if row), strict=True)
    taken = sum(max(map(cell_len, column)) + GAP for column in others)
    return max(LEAST_CUT, console.width - taken)


def print_section(console: Console, title: str, rows: Sequence[tuple[str, str]]) -> None:
    """Print a title and, below it, names with their values."""
    console.print(Text(title, style="bold"))
    print_table(console, [(f"  {name}", value) for name, value in rows])
    console.print()
