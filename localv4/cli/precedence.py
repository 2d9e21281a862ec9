"""What is typed wins over the environment, also where two different options contradict."""

from typing import Any

from typer.core import TyperCommand

_ANY = object()

# (option, other option, its value): what the environment says of the first is forgotten when the
# second is typed with this value.
OVERRULED = (
    ("greedy", "temp", _ANY),
    ("as_json", "output_format", _ANY),
    ("think_effort", "think", False),
    ("think", "think_effort", _ANY),
    *((name, "raw", True) for name in ("system", "think", "think_effort")),
    *(("raw", name, _ANY) for name in ("system", "think", "think_effort", "tools")),
)


class Command(TyperCommand):
    """A command whose environment variables give way to contradicting options."""

    def invoke(self, ctx: Any) -> Any:
        """Call the command without the settings that are overruled."""
        defaults = {parameter.name: parameter.default for parameter in self.params}
        values = ctx.params
        typed = {name: values[name] for name in values if _is_from(ctx, name, "COMMANDLINE")}
        for name, other, value in OVERRULED:
            is_overruled = other in typed and value in (_ANY, typed[other])
            if is_overruled and _is_from(ctx, name, "ENVIRONMENT"):
                values[name] = defaults[name]
        return super().invoke(ctx)


def _is_from(context: Any, name: str, place: str) -> bool:
    source = context.get_parameter_source(name)
    return source is not None and source.name == place
