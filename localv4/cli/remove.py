"""`localv4 rm` and `localv4 prune`: what may go, told first and asked for."""

import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated

import typer

from localv4.cli import options, terminal

if TYPE_CHECKING:
    from localv4.library.removal import Removal

Names = Annotated[
    list[str], typer.Argument(metavar="MODEL...", help="Names as `localv4 list` shows them.")
]
DryRun = Annotated[
    bool, typer.Option("--dry-run", metavar="", help="Show what would be removed, and stop.")
]


def remove(
    models: Names,
    yes: options.Yes = False,
    dry_run: DryRun = False,
    no_color: options.NoColor = False,
) -> None:
    """Remove models from this computer."""
    from localv4.library.removal import plan_removal

    removals = [plan_removal(name) for name in dict.fromkeys(models)]
    _carry_out(list({item.path: item for item in removals}.values()), yes, dry_run, no_color)


def prune(
    yes: options.Yes = False, dry_run: DryRun = False, no_color: options.NoColor = False
) -> None:
    """Remove unfinished downloads and files that no model has."""
    from localv4.library.removal import find_leftovers

    leftovers = list(find_leftovers())
    if not leftovers:
        terminal.say("nothing to remove")
        return
    _carry_out(leftovers, yes, dry_run, no_color)


def _carry_out(removals: "Sequence[Removal]", yes: bool, dry_run: bool, no_color: bool) -> None:
    from localv4.cli.generation import format_bytes
    from localv4.cli.tables import print_table

    console = terminal.make_console(sys.stdout, no_color=no_color)
    rows = [(item.name, format_bytes(item.nbytes), str(item.path)) for item in removals]
    print_table(console, rows, header=("NAME", "FREES", "WHERE"), numbers=frozenset({1}))
    sys.stdout.flush()
    question = "Remove this?" if len(removals) == 1 else f"Remove these {len(removals)}?"
    if dry_run or not (yes or terminal.confirmed(question)):
        return
    for item in removals:
        item.execute()
    freed = sum(item.nbytes for item in removals)
    terminal.say(f"{format_bytes(freed)} freed")
