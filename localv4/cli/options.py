"""Command-line options that several commands share: one spelling, one help text, one variable."""

from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer

from localv4.cli.option_groups import flag, option
from localv4.errors import UsageError


class OutputFormat(StrEnum):
    """How results are written to stdout."""

    AUTO = "auto"
    HUMAN = "human"
    JSON = "json"


MODEL_HELP = "Name of an installed model, or a path: a checkpoint folder or a .gguf file."
# LOCALV4_MODEL is read where a missing name is resolved: an argument must win over it
Model = Annotated[
    str | None, option("-m", "--model", panel="Model", env=False, metavar="MODEL", help=MODEL_HELP)
]
ModelArgument = Annotated[str | None, typer.Argument(metavar="MODEL", help=MODEL_HELP)]
ContextSize = Annotated[
    int | None,
    option(
        "-c",
        "--ctx-size",
        panel="Model",
        metavar="TOKENS",
        help="Room for prompt and answer together. Default: what the model allows.",
    ),
]


def _assumed(name: str, what: str) -> Any:
    return option(f"--assume-{name}", panel="Another machine", env=False, metavar="X", help=what)


AssumeRam = Annotated[str | None, _assumed("ram", "Memory of the machine: 64GiB.")]
AssumeBandwidth = Annotated[str | None, _assumed("bandwidth", "Of its memory: 90GB/s.")]
AssumeDisk = Annotated[str | None, _assumed("disk", "Random reads of its disk: 7GB/s.")]
AssumeCores = Annotated[
    int | None,
    option(
        "--assume-cores",
        panel="Another machine",
        env=False,
        metavar="N",
        min=1,
        max=1024,
        help="Its physical performance cores.",
    ),
]

AssumeGpu = Annotated[str | None, _assumed("gpu", "Memory of a GPU in it: 24GiB.")]
AssumeGpuBandwidth = Annotated[
    str | None, _assumed("gpu-bandwidth", "Of the GPU's memory: 900GB/s. Default: 450GB/s.")
]

Prompt = Annotated[
    str | None, typer.Argument(metavar="PROMPT", help="What to ask.", show_default=False)
]
PromptOption = Annotated[
    str | None,
    option("-p", "--prompt", panel="Prompt", env=False, metavar="TEXT", help="The same as PROMPT."),
]
PromptFile = Annotated[
    Path | None,
    option(
        "-f", "--file", panel="Prompt", env=False, metavar="FILE", help="Add the text of a file."
    ),
]
Tools = Annotated[
    Path | None,
    option(
        "--tools",
        panel="Prompt",
        env=False,
        metavar="FILE",
        help="JSON list of tools that the model may call; it calls none itself.",
    ),
]
Raw = Annotated[
    bool, flag("--raw", panel="Prompt", help="Continue the text itself: no chat format.")
]
System = Annotated[
    str | None, option("-s", "--system", panel="Prompt", metavar="TEXT", help="System prompt.")
]


def _session_name(value: str | None) -> str | None:
    """Judge the name of a session long before a model is loaded."""
    if value is None:
        return None
    from localv4.engine.saved_sessions import checked_name

    return checked_name(value)


SessionName = Annotated[
    str | None,
    option(
        "--session",
        panel="Prompt",
        metavar="NAME",
        env=False,
        callback=_session_name,
        help="Go on with the saved conversation of this name, or begin it.",
    ),
]
Continue = Annotated[
    bool,
    flag(
        "--continue",
        panel="Prompt",
        env=False,
        help="Go on with the last conversation that was held with this model.",
    ),
]

Stop = Annotated[
    list[str] | None,
    option(
        "--stop",
        panel="Sampling",
        env=False,
        metavar="TEXT",
        help="End the answer before TEXT; may be given several times.",
    ),
]

HideThinking = Annotated[
    bool,
    flag("--hide-thinking", panel="Thinking", help="Show only how long the model thought."),
]

Format = Annotated[
    OutputFormat,
    option("--format", panel="Output", help="auto and human: text; json: one JSON document."),
]
Json = Annotated[bool, flag("--json", panel="Output", help="The same as --format json.")]
NoStream = Annotated[
    bool, flag("--no-stream", panel="Output", help="Print the answer when it is complete.")
]
Stats = Annotated[
    bool, flag("--stats", panel="Output", help="Print speed and memory to stderr at the end.")
]
Quiet = Annotated[
    bool, flag("-q", "--quiet", panel="Output", help="No notes and no progress on stderr.")
]
NoColor = Annotated[
    bool, flag("--no-color", panel="Output", help="No colours (NO_COLOR does the same).")
]
Yes = Annotated[bool, typer.Option("--yes", "-y", metavar="", help="Do not ask.")]


def wants_json(output_format: OutputFormat, as_json: bool) -> bool:
    """Say whether `--format json` or its short form was given."""
    return as_json or output_format is OutputFormat.JSON


def one_of(argument: str | None, typed: str | None, name: str) -> str | None:
    """Return what was given as an argument or by the option `name`; UsageError for both."""
    if argument is not None and typed is not None:
        raise UsageError(f"given twice, as an argument and by {name}")
    return argument if argument is not None else typed
