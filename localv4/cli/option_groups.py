"""How options are declared: one by one, or as a group that several commands share.

A group is a dataclass whose fields are annotated as typer's parameters are. A command that is
decorated with `with_groups` names the group as one parameter; the command line shows its options.
"""

import functools
import inspect
from collections.abc import Callable
from dataclasses import fields, is_dataclass
from typing import Any

import typer


def option(*names: str, panel: str, env: bool = True, **rest: Any) -> Any:
    """Declare an option in a help panel; its variable is LOCALV4_ and the long spelling."""
    long_name = names[0].split("/")[0].removeprefix("--") if len(names) == 1 else names[1]
    variable = "LOCALV4_" + long_name.removeprefix("--").replace("-", "_").upper()
    return typer.Option(
        *names,
        rich_help_panel=panel,
        envvar=variable if env else None,
        show_envvar=False,
        **rest,
    )


def flag(*names: str, panel: str, **rest: Any) -> Any:
    """Declare an option without a value."""
    return option(*names, panel=panel, metavar="", **rest)


def with_groups(command: Callable[..., None]) -> Callable[..., None]:
    """Return a command that has the options of each group in the place of its parameter."""
    groups: dict[str, Any] = {}
    parameters: list[inspect.Parameter] = []
    for parameter in inspect.signature(command).parameters.values():
        if is_dataclass(parameter.annotation):
            groups[parameter.name] = parameter.annotation
            parameters += [
                parameter.replace(name=field.name, default=field.default, annotation=field.type)
                for field in fields(parameter.annotation)
            ]
        else:
            parameters.append(parameter)

    @functools.wraps(command)
    def unfolded(**values: Any) -> None:
        made = {
            name: group(**{field.name: values.pop(field.name) for field in fields(group)})
            for name, group in groups.items()
        }
        command(**values, **made)

    # typer looks at both
    unfolded.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    unfolded.__annotations__ = {item.name: item.annotation for item in parameters}
    return unfolded
