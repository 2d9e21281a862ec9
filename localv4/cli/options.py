"""Command-line options that several commands share: one spelling, one help text, one variable."""

from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from localv4.errors import UsageError

if TYPE_CHECKING:
    from localv4.engine.memory import MemoryOptions

MAX_TOKENS = 2**31 - 1  # also the bound of --top-k; real limits are far below


class OutputFormat(StrEnum):
    """How results are written to stdout."""

    AUTO = "auto"
    HUMAN = "human"
    JSON = "json"


class Arithmetic(StrEnum):
    """How weights are multiplied."""

    EXACT = "exact"
    FAST = "fast"


class IoWay(StrEnum):
    """How experts come from the disk."""

    AUTO = "auto"
    MAP = "map"
    DIRECT = "direct"
    BUFFERED = "buffered"


class Kv(StrEnum):
    """How compressed rows of the context are stored."""

    F32 = "f32"
    BF16 = "bf16"
    COMPACT = "compact"


class Caching(StrEnum):
    """Which experts stay in memory."""

    DECAY = "decay"
    LRU = "lru"
    LFU = "lfu"


class Effort(StrEnum):
    """How long the model may think before it answers."""

    LOW = "low"
    MEDIUM = "medium"
    HIGH = "high"
    MAX = "max"


def _option(*names: str, panel: str, env: bool = True, **rest: Any) -> Any:
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


def _flag(*names: str, panel: str, **rest: Any) -> Any:
    """Declare an option without a value."""
    return _option(*names, panel=panel, metavar="", **rest)


MODEL_HELP = "Name of an installed model, or a path: a checkpoint folder or a .gguf file."
# LOCALV4_MODEL is read where a missing name is resolved: an argument must win over it
Model = Annotated[str | None, _option("-m", "--model", panel="Model", env=False, help=MODEL_HELP)]
ModelArgument = Annotated[str | None, typer.Argument(metavar="MODEL", help=MODEL_HELP)]
ContextSize = Annotated[
    int | None,
    _option(
        "-c",
        "--ctx-size",
        panel="Model",
        metavar="TOKENS",
        help="Room for prompt and answer together. Default: what the model allows.",
    ),
]
Threads = Annotated[
    int | None,
    _option(
        "-t",
        "--threads",
        panel="Model",
        metavar="N",
        help="CPU threads. Default: one for each physical performance core.",
    ),
]
Pin = Annotated[
    bool,
    _option(
        "--pin",
        panel="Model",
        help="Bind each thread to a core of its own. For machines with nothing else to do.",
    ),
]

Numerics = Annotated[
    Arithmetic,
    _option(
        "--numerics",
        panel="Model",
        help="fast: packed weights, activations rounded to 8 bits; exact: float32 throughout.",
    ),
]

Ram = Annotated[
    str | None,
    _option(
        "--ram",
        panel="Memory",
        metavar="SIZE",
        help="The most memory to take, as 48GiB. Default: what is available, less the reserve.",
    ),
]
Reserve = Annotated[
    str | None,
    _option(
        "--reserve",
        panel="Memory",
        metavar="SIZE",
        help="Memory to leave to other programs. Default: 8 %, at least 4GiB.",
    ),
]
Io = Annotated[
    IoWay,
    _option(
        "--io",
        panel="Memory",
        help="How experts are read. auto: mapped if all fit, else directly from the disk.",
    ),
]
CachePolicy = Annotated[
    Caching,
    _option(
        "--cache-policy",
        panel="Memory",
        help="Which experts stay: those used most of late (decay), last (lru) or ever (lfu).",
    ),
]
ExpertReaders = Annotated[
    int | None,
    _option(
        "--readers",
        panel="Memory",
        metavar="N",
        min=1,
        max=64,
        help="Threads that read experts. Default: as many as the disk takes.",
    ),
]
Prefetch = Annotated[
    bool,
    _option(
        "--prefetch/--no-prefetch",
        panel="Memory",
        help="Read what the next layer may need while that makes tokens faster.",
    ),
]
KvRows = Annotated[
    Kv | None,
    _option(
        "--kv",
        panel="Memory",
        help="How the compressed context is stored; compact: FP8 and FP4. Default: f32.",
    ),
]
TraceRoutes = Annotated[
    Path | None,
    _option(
        "--trace-routes",
        panel="Memory",
        env=False,
        metavar="FILE",
        help="Record which experts tokens choose, for localv4 tune; no text is kept.",
    ),
]


def _assumed(name: str, what: str) -> Any:
    return _option(f"--assume-{name}", panel="Another machine", env=False, metavar="X", help=what)


AssumeRam = Annotated[str | None, _assumed("ram", "Memory of the machine: 64GiB.")]
AssumeBandwidth = Annotated[str | None, _assumed("bandwidth", "Of its memory: 90GB/s.")]
AssumeDisk = Annotated[str | None, _assumed("disk", "Random reads of its disk: 7GB/s.")]
AssumeCores = Annotated[
    int | None,
    _option(
        "--assume-cores",
        panel="Another machine",
        env=False,
        metavar="N",
        min=1,
        max=1024,
        help="Its physical performance cores.",
    ),
]

Prompt = Annotated[
    str | None, typer.Argument(metavar="PROMPT", help="What to ask.", show_default=False)
]
PromptOption = Annotated[
    str | None,
    _option(
        "-p", "--prompt", panel="Prompt", env=False, metavar="TEXT", help="The same as PROMPT."
    ),
]
PromptFile = Annotated[
    Path | None,
    _option("-f", "--file", panel="Prompt", env=False, help="Add the text of a file."),
]
Tools = Annotated[
    Path | None,
    _option(
        "--tools",
        panel="Prompt",
        env=False,
        help="JSON list of tools that the model may call; it calls none itself.",
    ),
]
Raw = Annotated[
    bool, _flag("--raw", panel="Prompt", help="Continue the text itself: no chat format.")
]
System = Annotated[
    str | None, _option("-s", "--system", panel="Prompt", metavar="TEXT", help="System prompt.")
]


def _session_name(value: str | None) -> str | None:
    """Judge the name of a session long before a model is loaded."""
    if value is None:
        return None
    from localv4.engine.saved_sessions import checked_name

    return checked_name(value)


SessionName = Annotated[
    str | None,
    _option(
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
    _flag(
        "--continue",
        panel="Prompt",
        env=False,
        help="Go on with the last conversation that was held with this model.",
    ),
]

MaxTokens = Annotated[
    int | None,
    _option(
        "-n",
        "--max-tokens",
        panel="Sampling",
        metavar="N",
        help="Stop after N new tokens. Default: when the context is full.",
    ),
]
Temperature = Annotated[
    float | None,
    _option(
        "--temp",
        panel="Sampling",
        metavar="X",
        help="Temperature; 0 always takes the likeliest token. Default: the model's own.",
    ),
]
TopP = Annotated[
    float | None,
    _option(
        "--top-p",
        panel="Sampling",
        metavar="X",
        help="Keep the likeliest tokens that together have probability X.",
    ),
]
TopK = Annotated[
    int | None,
    _option("--top-k", panel="Sampling", metavar="N", help="Keep the N likeliest tokens; 0: all."),
]
MinP = Annotated[
    float | None,
    _option(
        "--min-p",
        panel="Sampling",
        metavar="X",
        help="Drop tokens less likely than X times the likeliest.",
    ),
]
RepeatPenalty = Annotated[
    float | None,
    _option(
        "--repeat-penalty",
        panel="Sampling",
        metavar="X",
        help="Make recent tokens less likely; 1: off.",
    ),
]
Seed = Annotated[
    int | None,
    _option("--seed", panel="Sampling", metavar="N", help="Same seed, same answer."),
]
Greedy = Annotated[bool, _flag("--greedy", panel="Sampling", help="The same as --temp 0.")]
Stop = Annotated[
    list[str] | None,
    _option(
        "--stop",
        panel="Sampling",
        env=False,
        metavar="TEXT",
        help="End the answer before TEXT; may be given several times.",
    ),
]

Think = Annotated[
    bool | None,
    _flag("--think/--no-think", panel="Thinking", help="Think before answering. Default: no."),
]
ThinkEffort = Annotated[
    Effort | None,
    _option(
        "--think-effort",
        panel="Thinking",
        metavar="LEVEL",
        help="low, medium, high or max; implies --think.",
    ),
]
HideThinking = Annotated[
    bool,
    _flag("--hide-thinking", panel="Thinking", help="Show only how long the model thought."),
]

Format = Annotated[
    OutputFormat,
    _option("--format", panel="Output", help="auto and human: text; json: one JSON document."),
]
Json = Annotated[bool, _flag("--json", panel="Output", help="The same as --format json.")]
NoStream = Annotated[
    bool, _flag("--no-stream", panel="Output", help="Print the answer when it is complete.")
]
Stats = Annotated[
    bool, _flag("--stats", panel="Output", help="Print speed and memory to stderr at the end.")
]
Quiet = Annotated[
    bool, _flag("-q", "--quiet", panel="Output", help="No notes and no progress on stderr.")
]
NoColor = Annotated[
    bool, _flag("--no-color", panel="Output", help="No colours (NO_COLOR does the same).")
]


def wants_json(output_format: OutputFormat, as_json: bool) -> bool:
    """Say whether `--format json` or its short form was given."""
    return as_json or output_format is OutputFormat.JSON


def memory_options(
    ram: str | None,
    reserve: str | None,
    io: IoWay,
    policy: Caching,
    readers: int | None,
    prefetch: bool,
    kv: Kv | None = None,
) -> "MemoryOptions":
    """Return what was said about memory. Raises UsageError for what is no size."""
    from localv4.cli.sizes import parse_bytes
    from localv4.engine.memory import MemoryOptions

    return MemoryOptions(
        ram=parse_bytes(ram, "--ram") if ram is not None else None,
        reserve=parse_bytes(reserve, "--reserve") if reserve is not None else None,
        io=io.value,
        policy=policy.value,
        readers=readers,
        prefetch=prefetch,
        kv=kv.value if kv is not None else None,
    )


def one_of(argument: str | None, option: str | None, name: str) -> str | None:
    """Return what was given as an argument or by the option `name`; UsageError for both."""
    if argument is not None and option is not None:
        raise UsageError(f"given twice, as an argument and by {name}")
    return argument if argument is not None else option


def sampling_values(
    temp: float | None,
    greedy: bool,
    top_p: float | None,
    top_k: int | None,
    min_p: float | None,
    repeat_penalty: float | None,
    seed: int | None,
    max_tokens: int | None,
) -> dict[str, float | None]:
    """Return the settings that were asked for by name, None where the model's own holds.

    Raises UsageError for a value out of range, long before a model is loaded.
    """
    from localv4.cli.settings import Settings

    values = {
        "temp": 0.0 if greedy else temp,
        "top_p": top_p,
        "top_k": top_k,
        "min_p": min_p,
        "repeat_penalty": repeat_penalty,
        "seed": seed,
        "max_tokens": max_tokens,
    }
    Settings().with_values(values)
    return values


def thinking_mode(think: bool | None, effort: Effort | None) -> tuple[bool, str | None]:
    """Return whether to think and with which effort. Raises UsageError for a contradiction."""
    if think is False and effort is not None:
        raise UsageError("--no-think contradicts --think-effort")
    return bool(think) or effort is not None, effort.value if effort is not None else None
