"""Tables fit a terminal: what is copied stays whole."""

import io

from rich.console import Console

from localv4.cli.tables import print_table

HEADER = ("NAME", "MODEL", "TOKENS", "ON DISK", "USED", "ABOUT")
ROW = ("a-chat", "some-model:q4", "1400", "585.0 KiB", "2026-11-24 01:59", "What is the capital?")


def printed(width: int) -> list[str]:
    """The lines of a table in a terminal of that width."""
    file = io.StringIO()
    console = Console(width=width, file=file, force_terminal=True, color_system=None)
    shown = {"numbers": frozenset({2, 3}), "whole": frozenset({4})}
    print_table(console, [ROW, ROW], header=HEADER, cuts_last=True, **shown)
    return file.getvalue().splitlines()


def test_a_wide_terminal_shows_all() -> None:
    header, *lines = printed(120)
    assert header.split() == " ".join(HEADER).split()
    assert all(cell in line for line in lines for cell in ROW) and len(lines) == 2


def test_a_narrow_terminal_cuts_the_last_column_alone() -> None:
    _, *lines = printed(76)
    assert len(lines) == 2
    assert all(cell in line for line in lines for cell in ROW[:-1])
    assert all("What is" in line and line.endswith("…") for line in lines)


def test_a_very_narrow_one_breaks_only_what_may_be_broken() -> None:
    _, *lines = printed(66)
    assert len(lines) > 2
    assert all(cell in lines[0] for cell in (ROW[0], *ROW[2:5]))
