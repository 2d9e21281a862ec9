"""`localv4 eval kld`: how far a model's predictions are from those of its base."""

import sys
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from localv4.cli import evaluation, options, terminal
from localv4.cli.engine_options import Arithmetic, MeasuringOptions
from localv4.cli.evaluation import figure, pair, percent
from localv4.cli.option_groups import option, with_groups
from localv4.errors import BadFileError, LocalV4Error, NotFoundError, UsageError

if TYPE_CHECKING:
    from localv4.cli.loading import Loaded
    from localv4.cli.progress import Progress
    from localv4.engine.divergence import Base, Divergence, Measured
    from localv4.engine.engine import Engine
    from localv4.engine.logits_file import LogitsFile
    from localv4.engine.scoring import Estimate
    from localv4.engine.windows import Windows

PERCENTILES = (50.0, 90.0, 95.0, 99.0, 99.9)


_option = partial(option, panel="Base", env=False)


BaseFile = Annotated[
    Path | None,
    _option("--base", metavar="FILE", help="Log-probabilities of the base, by `eval logits`."),
]
BaseModel = Annotated[
    str | None,
    _option("--base-model", metavar="MODEL", help="Or the base itself: both models are run."),
]
BaseNumerics = Annotated[Arithmetic | None, evaluation.base_numerics(panel="Base")]


@with_groups
def kld(
    model: options.Model = None,
    *,
    base: BaseFile = None,
    base_model: BaseModel = None,
    base_numerics: BaseNumerics = None,
    file: evaluation.TextFile = None,
    context: evaluation.OptionalSize = None,
    windows: evaluation.MostWindows = None,
    bos: evaluation.OptionalBos = None,
    floor_windows: evaluation.FloorWindows = 4,
    computing: MeasuringOptions,
    base_kv: evaluation.BaseKv = None,
    as_json: options.Json = False,
    quiet: options.Quiet = False,
    no_color: options.NoColor = False,
) -> None:
    """Measure the divergence of a model from a base, and how much of it is rounding noise.

    The base is a file that `eval logits --save-base` or llama-perplexity wrote, which holds the
    text as well, or a model that is loaded beside the other.
    """
    if (base is None) == (base_model is None):
        raise UsageError("give the base: either --base FILE or --base-model MODEL")
    if base is not None and {file, context, bos, base_numerics, base_kv} != {None}:
        raise UsageError(
            "--base FILE holds the text, its windows and the base's logits: "
            "leave -f, -c, --bos, --base-numerics and --base-kv out"
        )
    if base is not None and not base.is_file():
        raise NotFoundError(f"no such file: {base}")
    text = evaluation.read_text(file) if base is None else ""

    from localv4.cli.progress import Progress
    from localv4.engine.divergence import LiveBase

    loaded = evaluation.load(model, computing, quiet, no_color)
    engine = loaded.engine
    with ExitStack() as stack:
        about: dict[str, Any]
        source: Base
        if base is not None:
            source = stack.enter_context(_open_file(base, engine, windows))
            about = {"file": base.name}
        else:
            of_base = computing.of_base(base_numerics, base_kv)
            other = evaluation.load(base_model, of_base, quiet, no_color)
            tokens = evaluation.tokenize(engine, text, file)
            evaluation.check_same_tokens(engine, other.engine, tokens)
            size = context or evaluation.WINDOW
            evaluation.check_size(other.engine, size)
            part = evaluation.cut_text(engine, tokens, size, windows, bos is not False)
            source = LiveBase(other.engine, part)
            about = {"model": other.name, "numerics": other.engine.network.name}
            about["text"] = tokens.document
        progress = stack.enter_context(Progress(quiet=quiet, no_color=no_color))
        measured = measure(engine, source, floor_windows, progress)
    floors = min(floor_windows, len(source.windows))
    if as_json:
        terminal.print_json(_document(loaded, about, source.windows, measured, floors))
    else:
        _print(loaded, about, source.windows, measured, no_color)


def measure(engine: "Engine", base: "Base", floor_windows: int, progress: "Progress") -> "Measured":
    """Measure the divergence from a base, with progress; Ctrl-C is seen at once."""
    from localv4.cli import worker
    from localv4.engine import divergence

    def report(done: int, total: int) -> None:
        progress("comparing predictions", done, total)

    return worker.call(lambda: divergence.measure(engine, base, floor_windows, report))


def _open_file(path: Path, engine: "Engine", windows: int | None) -> "LogitsFile":
    from localv4.engine.logits_file import LogitsFile

    opened = LogitsFile(path, engine.tokenizer.bos_id, windows)
    try:
        evaluation.check_size(engine, opened.windows.size)
        if opened.vocab != engine.config.vocab_size:
            raise BadFileError(
                path,
                f"is of a vocabulary of {opened.vocab} tokens, "
                f"the model has {engine.config.vocab_size}",
            )
    except LocalV4Error:
        opened.close()
        raise
    return opened


def _document(
    loaded: "Loaded",
    about: dict[str, Any],
    windows: "Windows",
    measured: "Measured",
    floors: int,
) -> dict[str, Any]:
    return {
        "schema": evaluation.SCHEMA,
        "model": loaded.name,
        "numerics": loaded.engine.network.name,
        "base": about,
        "context": windows.size,
        "windows": len(windows),
        "bos": windows.bos is not None,
        "divergence": divergence_document(measured.divergence),
        "floor": {
            "windows": floors,
            "rounding": divergence_document(measured.rounding),
            "storage": divergence_document(measured.storage),
        },
    }


def divergence_document(found: "Divergence | None") -> dict[str, Any] | None:
    """Return all figures of a divergence for JSON; lengths in nats, shares from 0 to 1."""
    if found is None:
        return None
    return {
        "tokens": found.kld.size,
        "mean": pair(found.mean),
        "percentiles": {f"{percent:g}": found.percentile(percent) for percent in PERCENTILES},
        "maximum": found.most,
        "same_top": pair(found.agreement),
        "rms_delta_p": pair(found.rms_delta_p),
        "mean_delta_p": pair(found.mean_delta_p),
        "perplexity": pair(found.perplexity),
        "base_perplexity": pair(found.base_perplexity),
        "perplexity_ratio": pair(found.ratio),
    }


def _print(
    loaded: "Loaded",
    about: dict[str, Any],
    windows: "Windows",
    measured: "Measured",
    no_color: bool,
) -> None:
    from localv4.cli.tables import print_table

    console = terminal.make_console(sys.stdout, no_color=no_color)
    base = about["file"] if "file" in about else f"{about['model']}, {about['numerics']}"
    print(
        f"{loaded.name}, {loaded.engine.network.name}; base: {terminal.sanitize_line(base)}; "
        f"{measured.divergence.kld.size} tokens in {len(windows)} windows of {windows.size}\n"
    )
    columns = [("measured", measured.divergence)]
    columns += [
        (name, floor)
        for name, floor in (("rounding", measured.rounding), ("storage", measured.storage))
        if floor is not None
    ]
    rows = zip(NAMES, *(_cells(found) for _, found in columns), strict=True)
    numbers = frozenset(range(1, 1 + len(columns)))
    print_table(console, list(rows), header=("", *(name for name, _ in columns)), numbers=numbers)
    if len(columns) > 1:
        print(
            "\nrounding: the model against itself with the last bits of its norms moved"
            + ("; storage: against its own row in a file" if measured.storage else "")
        )


NAMES = (
    "mean divergence, nats",
    *(f"{'median' if percent == 50 else f'{percent:g} %'}" for percent in PERCENTILES),
    *("maximum", "same likeliest token", "RMS of Δp", "mean Δp"),
    *("perplexity", "of the base", "ratio"),
)


def _cells(found: "Divergence") -> list[str]:
    return [
        scientific(found.mean),
        *(f"{found.percentile(share):.3g}" for share in PERCENTILES),
        f"{found.most:.3g}",
        percent(found.agreement),
        percent(found.rms_delta_p),
        percent(found.mean_delta_p, signed=True),
        figure(found.perplexity),
        figure(found.base_perplexity),
        figure(found.ratio),
    ]


def scientific(estimate: "Estimate") -> str:
    """Write a small figure and its error with three and two digits."""
    return f"{estimate.value:.3g} ± {estimate.error:.2g}"
