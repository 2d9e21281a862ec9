"""What the commands of `localv4 eval` share: the text, the windows, how figures are written."""

import hashlib
import math
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from localv4.cli import engine_options
from localv4.cli.option_groups import option
from localv4.errors import DoesNotFitError, NotFoundError, UsageError

if TYPE_CHECKING:
    from localv4.cli.loading import Loaded
    from localv4.engine.engine import Engine
    from localv4.engine.scoring import Estimate
    from localv4.engine.windows import Windows

SCHEMA = 1
WINDOW = 512
MAX_WINDOWS = 1 << 20
BUILT_IN_TEXT = Path(__file__).parents[1] / "embedded" / "heldout.txt"
"""Passages of three novels in the public domain; the built-in model was not trained on them."""


_option = partial(option, panel="Text", env=False)
base_numerics = partial(
    option,
    "--base-numerics",
    env=False,
    help="Arithmetic of --base-model. Default: that of the model.",
)
"""Declare --base-numerics in a `panel`."""

TextFile = Annotated[
    Path | None,
    _option("-f", "--file", metavar="FILE", help="Text to read. Default: 190 kB of old novels."),
]
Sizes = Annotated[
    str, _option("-c", "--ctx-size", metavar="N,...", help="Tokens of a window, or several sizes.")
]
OptionalSize = Annotated[
    int | None,
    _option(
        "-c",
        "--ctx-size",
        metavar="N",
        min=3,
        max=1 << 24,
        help="Tokens of a window. Default: 512.",
    ),
]
MostWindows = Annotated[
    int | None,
    _option(
        "-w",
        "--windows",
        metavar="N",
        min=1,
        max=MAX_WINDOWS,
        help="Stop after N windows. Default: the whole text.",
    ),
]
_BOS = _option(
    "--bos/--no-bos",
    metavar="",
    help="Begin each window with the BOS token (default); llama.cpp does as the file says.",
)
Bos = Annotated[bool, _BOS]
OptionalBos = Annotated[bool | None, _BOS]
FloorWindows = Annotated[
    int,
    _option(
        "--floor-windows",
        metavar="N",
        min=0,
        max=MAX_WINDOWS,
        help="Measure the noise floor on the first N windows; 0: not at all.",
    ),
]

BaseKv = Annotated[
    engine_options.Kv | None,
    _option(
        "--base-kv",
        panel="Base",
        help="How the base stores its context. Default: as the model, f32 with exact.",
    ),
]


@dataclass(frozen=True, slots=True)
class Text:
    """The tokens of a text, and what to call it."""

    name: str
    sha256: str
    ids: list[int]

    @property
    def document(self) -> dict[str, Any]:
        """What JSON output says of it."""
        return {"name": self.name, "sha256": self.sha256, "tokens": len(self.ids)}


def read_text(path: Path | None) -> str:
    """Return the text of a file, or the built-in one. Raises a LocalV4Error."""
    from localv4.cli import inputs, loading

    source = path or BUILT_IN_TEXT
    data = inputs.read_limited(source, inputs.MAX_PROMPT_BYTES)
    text = inputs.decode_text(data, str(source), loading.warn)
    if not text.strip():
        raise UsageError(f"{source} is empty")
    return text


def check_folder(path: Path) -> None:
    """Raise NotFoundError where there is no folder for a file, long before it is written."""
    if not path.parent.is_dir():
        raise NotFoundError(f"there is no folder {path.parent}")


def tokenize(engine: "Engine", text: str, path: Path | None) -> Text:
    """Return the tokens of a text; marks in it have no power, as in llama.cpp."""
    name = "built-in" if path is None else path.name
    digest = hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()
    return Text(name, digest, engine.tokenizer.encode(text))


def parse_sizes(text: str) -> list[int]:
    """Read sizes of windows, separated by commas. Raises UsageError."""
    from localv4.cli.bench import parse_sizes as parse

    sizes = list(dict.fromkeys(parse(text, "-c")))
    small = next((size for size in sizes if size < 3), None)
    if small is not None:
        raise UsageError(f"-c is {small}, expected windows of 3 tokens or more")
    return sizes


def check_size(engine: "Engine", size: int) -> None:
    """Raise DoesNotFitError for windows that the model cannot read."""
    if size > engine.ctx_size:
        raise DoesNotFitError(
            f"windows of {size} tokens do not fit into a context of {engine.ctx_size}",
            hint=f"use -c {engine.ctx_size} or less",
        )


def cut_text(
    engine: "Engine",
    text: Text,
    size: int,
    most: int | None,
    bos: bool,
    stride: int | None = None,
) -> "Windows":
    """Cut a text into windows that the model can read. Raises a LocalV4Error."""
    from localv4.engine.windows import cut

    check_size(engine, size)
    first = engine.tokenizer.bos_id if bos else None
    return cut(text.ids, size, bos=first, stride=stride, most=most)


def check_same_tokens(engine: "Engine", other: "Engine", text: Text) -> None:
    """Raise UsageError for two models that split a text into different tokens."""
    again = other.tokenizer.encode(engine.tokenizer.decode(text.ids))
    if other.config.vocab_size != engine.config.vocab_size or again != text.ids:
        raise UsageError("the two models split this text into different tokens")


def figure(estimate: "Estimate", digits: int = 3) -> str:
    """Write an estimate with its error: as many digits as the error has a meaning for."""
    if not math.isfinite(estimate.error):
        return f"{estimate.value:.{digits}f}"
    if estimate.error > 0:
        digits = min(max(1 - math.floor(math.log10(estimate.error)), 0), 9)
    return f"{estimate.value:.{digits}f} ± {estimate.error:.{digits}f}"


def percent(estimate: "Estimate", *, signed: bool = False) -> str:
    """Write a share and its error in percent."""
    from localv4.engine.scoring import Estimate

    text = figure(Estimate(100 * estimate.value, 100 * estimate.error))
    sign = "+" if signed and estimate.value >= 0 else ""
    return f"{sign}{text} %"


def pair(estimate: "Estimate | None") -> dict[str, float | None] | None:
    """Return an estimate for JSON, which has no NaN."""
    if estimate is None:
        return None
    return {"value": finite(estimate.value), "standard_error": finite(estimate.error)}


def finite(value: float) -> float | None:
    """Return a number for JSON: None stands for what is not finite."""
    return value if math.isfinite(value) else None


def load(
    model: str | None, computing: engine_options.MeasuringOptions, quiet: bool, no_color: bool
) -> "Loaded":
    """Load a model with the whole context that it allows."""
    from localv4.cli import loading

    return loading.load_engine(model, computing.setup(), quiet=quiet, no_color=no_color)
