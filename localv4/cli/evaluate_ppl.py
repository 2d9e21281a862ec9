"""`localv4 eval ppl`: perplexity over a text, at several lengths of context."""

import sys
from typing import TYPE_CHECKING, Annotated, Any

from localv4.cli import evaluation, options, terminal
from localv4.cli.engine_options import MeasuringOptions
from localv4.cli.evaluation import figure, finite, pair, percent
from localv4.cli.option_groups import option, with_groups

if TYPE_CHECKING:
    from localv4.cli.loading import Loaded
    from localv4.cli.progress import Progress
    from localv4.engine.engine import Engine
    from localv4.engine.perplexity import Bucket, Perplexity
    from localv4.engine.windows import Windows

Stride = Annotated[
    int | None,
    option(
        "--stride",
        panel="Text",
        env=False,
        metavar="N",
        min=1,
        help="Begin a window every N tokens; its last N count. Default: side by side, half counts.",
    ),
]


@with_groups
def ppl(
    model: options.Model = None,
    *,
    file: evaluation.TextFile = None,
    context: evaluation.Sizes = "512,2048",
    stride: Stride = None,
    windows: evaluation.MostWindows = None,
    bos: evaluation.Bos = True,
    floor_windows: evaluation.FloorWindows = 4,
    computing: MeasuringOptions,
    as_json: options.Json = False,
    quiet: options.Quiet = False,
    no_color: options.NoColor = False,
) -> None:
    """Measure perplexity, how it falls with more context, and how much of it is rounding noise.

    Without --stride the figure is that of llama-perplexity: exp of the mean loss over the second
    half of windows that lie side by side.
    """
    sizes = evaluation.parse_sizes(context)
    text = evaluation.read_text(file)

    from localv4.cli.progress import Progress

    loaded = evaluation.load(model, computing, quiet, no_color)
    engine = loaded.engine
    tokens = evaluation.tokenize(engine, text, file)
    cuts = [evaluation.cut_text(engine, tokens, size, windows, bos, stride) for size in sizes]
    with Progress(quiet=quiet, no_color=no_color) as progress:
        found = measure_all(engine, cuts, floor_windows, progress)
    if as_json:
        terminal.print_json(_document(loaded, tokens, stride, found))
    else:
        _print(loaded, tokens, found, no_color)


def measure_all(
    engine: "Engine", cuts: "list[Windows]", floor_windows: int, progress: "Progress"
) -> "list[tuple[Windows, Perplexity]]":
    """Measure windows of several sizes, the largest first: buffers get their size once."""
    found = {
        part.size: _measure(engine, part, floor_windows, progress)
        for part in sorted(cuts, key=lambda part: -part.size)
    }
    return [(part, found[part.size]) for part in cuts]


def _measure(
    engine: "Engine", windows: "Windows", floor_windows: int, progress: "Progress"
) -> "Perplexity":
    """Measure the perplexity in windows of one size, with progress; Ctrl-C is seen at once."""
    from localv4.cli import worker
    from localv4.engine import perplexity

    def report(done: int, total: int) -> None:
        progress(f"reading windows of {windows.size}", done, total)

    return worker.call(lambda: perplexity.measure(engine, windows, floor_windows, report))


def _document(
    loaded: "Loaded",
    text: evaluation.Text,
    stride: int | None,
    found: "list[tuple[Windows, Perplexity]]",
) -> dict[str, Any]:
    return {
        "schema": evaluation.SCHEMA,
        "model": loaded.name,
        "numerics": loaded.engine.network.name,
        "text": text.document,
        "bos": found[0][0].bos is not None,
        "stride": stride,
        "results": [result_document(windows, measured) for windows, measured in found],
    }


def result_document(windows: "Windows", measured: "Perplexity") -> dict[str, Any]:
    """Return all figures of one size of windows for JSON."""
    return {
        "context": windows.size,
        "windows": len(windows),
        "tokens": measured.tokens,
        "perplexity": pair(measured.value),
        "standard_error_between_windows": finite(measured.between_windows),
        "rounding_floor": {
            "windows": len(measured.noisy),
            "relative_change": pair(measured.floor),
        },
        "curve": [
            {
                "tokens_before": [bucket.least, bucket.most],
                "tokens": bucket.tokens,
                "perplexity": pair(bucket.perplexity),
            }
            for bucket in measured.curve()
        ],
    }


def _print(
    loaded: "Loaded",
    text: evaluation.Text,
    found: "list[tuple[Windows, Perplexity]]",
    no_color: bool,
) -> None:
    from localv4.cli.tables import print_table

    console = terminal.make_console(sys.stdout, no_color=no_color)
    name = terminal.sanitize_line(text.name)
    numerics = loaded.engine.network.name
    start = "BOS first" if found[0][0].bos is not None else "no BOS"
    print(f"{loaded.name}, {numerics}; text: {name}, {len(text.ids)} tokens; {start}\n")
    print_table(
        console,
        [
            (
                str(windows.size),
                str(len(windows)),
                str(measured.tokens),
                figure(measured.value),
                f"± {measured.between_windows:.3g}" if len(windows) > 1 else "",
                percent(measured.floor, signed=True) if measured.floor else "",
            )
            for windows, measured in found
        ],
        header=("context", "windows", "tokens", "perplexity", "by windows", "rounding noise"),
        numbers=frozenset(range(6)),
    )
    print()
    curves = [measured.curve() for _, measured in found]
    longest = max(curves, key=len)
    print_table(
        console,
        [
            (f"{row.least} - {row.most}", *(_cell(curve, index) for curve in curves))
            for index, row in enumerate(longest)
        ],
        header=("tokens before", *(f"of {windows.size}" for windows, _ in found)),
        numbers=frozenset(range(1 + len(found))),
    )


def _cell(curve: "list[Bucket]", index: int) -> str:
    return figure(curve[index].perplexity) if index < len(curve) else ""
