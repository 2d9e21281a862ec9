"""Groups of options: one parameter of a command, several options of its command line."""

from dataclasses import dataclass
from typing import Annotated

import pytest
import typer
from typer.testing import CliRunner

from localv4.cli.option_groups import flag, option, with_groups

Name = Annotated[str, typer.Argument()]
Size = Annotated[int, option("--size", panel="Shape", min=1)]
Round = Annotated[bool, flag("--round", panel="Shape")]
Colour = Annotated[str | None, option("-c", "--colour", panel="Look")]


@dataclass(frozen=True, slots=True)
class Shape:
    """Two options."""

    size: Size = 3
    round: Round = False


def made_app(seen: list[tuple[str, Shape, str | None]]) -> typer.Typer:
    app = typer.Typer()

    @app.command()
    @with_groups
    def make(name: Name, *, shape: Shape, colour: Colour = None) -> None:
        """Make something."""
        seen.append((name, shape, colour))

    return app


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("ball", ("ball", Shape(3, False), None)),
        ("--round ball --size 7 -c red", ("ball", Shape(7, True), "red")),
    ],
)
def test_a_command_gets_its_groups(line: str, expected: tuple[str, Shape, str | None]) -> None:
    seen: list[tuple[str, Shape, str | None]] = []
    done = CliRunner().invoke(made_app(seen), line.split())
    assert (done.exit_code, seen) == (0, [expected]), done.output


def test_options_of_a_group_have_variables_and_bounds() -> None:
    seen: list[tuple[str, Shape, str | None]] = []
    app, runner = made_app(seen), CliRunner(env={"LOCALV4_SIZE": "5"})
    assert runner.invoke(app, ["ball"]).exit_code == 0
    assert seen == [("ball", Shape(5, False), None)]
    assert runner.invoke(app, ["ball", "--size", "0"]).exit_code == 2


def test_options_stand_where_the_group_does() -> None:
    command = typer.main.get_command(made_app([]))
    assert [parameter.name for parameter in command.params][:4] == [
        "name",
        "size",
        "round",
        "colour",
    ]
    assert command.help == "Make something."
