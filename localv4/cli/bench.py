"""`localv4 bench`: how fast a model reads and generates here, and how fast it could be at best."""

import threading
from contextlib import ExitStack
from enum import StrEnum
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from localv4.cancellation import Cancellation
from localv4.cli import options
from localv4.cli.engine_options import EngineOptions
from localv4.cli.option_groups import option, with_groups
from localv4.errors import Cancelled, UsageError

if TYPE_CHECKING:
    from localv4.cli.bench_report import Report
    from localv4.engine.benchmark import Benchmark, Plan

INTERRUPTED = 130
MAX_SIZES = 64
MAX_TOKENS = 1 << 24
MAX_PAUSE_S = 600.0
MAX_UBATCH = 1 << 16


class BenchFormat(StrEnum):
    """How results are written to stdout."""

    MD = "md"
    CSV = "csv"
    JSON = "json"


class Rival(StrEnum):
    """Another engine to compare with."""

    LLAMA_CPP = "llama.cpp"


class FlashAttention(StrEnum):
    """Whether llama.cpp uses its flash attention."""

    AUTO = "auto"
    ON = "on"
    OFF = "off"


_option = partial(option, panel="Test", env=False)

PromptTokens = Annotated[
    str, _option("-p", "--prompt-tokens", metavar="N,...", help="Tokens to read; 0: none.")
]
GenTokens = Annotated[
    str, _option("-n", "--gen-tokens", metavar="N,...", help="Tokens to generate; 0: none.")
]
Depth = Annotated[
    str, _option("-d", "--depth", metavar="N,...", help="Tokens in the context before each test.")
]
Repeat = Annotated[
    int, _option("-r", "--repeat", metavar="N", min=1, max=1000, help="Times each test is timed.")
]
Pause = Annotated[
    float,
    _option(
        "--pause",
        metavar="SECONDS",
        min=0.0,
        max=MAX_PAUSE_S,
        help="Rest before each repeat, for machines that are slowed down when busy for long.",
    ),
]
Compare = Annotated[
    Rival | None,
    _option(
        "--compare",
        panel="Comparison",
        help="Run the same tests on llama.cpp, in turns with ours; needs a GGUF file.",
    ),
]
PeerPython = Annotated[
    Path | None,
    _option(
        "--peer-python",
        panel="Comparison",
        metavar="PATH",
        help="Python of another environment, in which llama-cpp-python is. Default: this one.",
    ),
]
PeerUbatch = Annotated[
    int,
    _option(
        "--peer-ubatch",
        panel="Comparison",
        metavar="N",
        min=1,
        max=MAX_UBATCH,
        help="Tokens of a prompt that llama.cpp takes at a time.",
    ),
]
PeerFlash = Annotated[
    FlashAttention,
    _option("--peer-flash-attn", panel="Comparison", help="Flash attention of llama.cpp."),
]
PeerRepack = Annotated[
    bool,
    _option(
        "--peer-repack/--no-peer-repack",
        panel="Comparison",
        metavar="",
        help="Whether llama.cpp keeps weights in the layouts of its fastest kernels.",
    ),
]
Plot = Annotated[
    Path | None,
    _option(
        "--plot",
        panel="Output",
        metavar="FILE",
        help="Draw tokens per second against depth, as .png or .svg; needs the extra `plot`.",
    ),
]
Output = Annotated[
    BenchFormat,
    _option(
        "-o",
        "--output",
        panel="Output",
        help="md: tables; csv: one line per test; json: everything, with all samples.",
    ),
]


@with_groups
def bench(
    model_argument: options.ModelArgument = None,
    *,
    model: options.Model = None,
    prompt_tokens: PromptTokens = "512",
    gen_tokens: GenTokens = "128",
    depth: Depth = "0,4096",
    repeat: Repeat = 5,
    pause: Pause = 0.0,
    engine: EngineOptions,
    compare: Compare = None,
    peer_python: PeerPython = None,
    peer_ubatch: PeerUbatch = 512,
    peer_flash_attn: PeerFlash = FlashAttention.AUTO,
    peer_repack: PeerRepack = True,
    output: Output = BenchFormat.MD,
    plot: Plot = None,
    quiet: options.Quiet = False,
    no_color: options.NoColor = False,
) -> None:
    """Measure tokens per second, and the share of what memory and processor can do at best.

    Names are llama-bench's: pp512 reads 512 tokens, tg128 generates 128, @ d4096 after 4096 others.
    """
    sizes = _parse_all(prompt_tokens, gen_tokens, depth)
    _check_plot(plot)
    reference = options.one_of(model_argument, model, "--model")
    cancelled = Cancellation()

    # imported before the model is loaded: the probes are kernels, compiled with the others
    from localv4.cli import bench_peer, loading, worker
    from localv4.cli.bench_report import Report, write
    from localv4.cli.progress import Progress
    from localv4.engine.benchmark import Benchmark, plan
    from localv4.engine.engine import Engine
    from localv4.engine.peer import PeerSettings

    setup = engine.setup()
    settings = PeerSettings(peer_ubatch, peer_flash_attn.value, peer_repack)
    with ExitStack() as stack:
        rival = None
        if compare is not None:
            rival = bench_peer.start_rival(reference, peer_python, settings, cancelled, quiet)
            stack.callback(rival.close)
            setup = bench_peer.on_equal_terms(setup, quiet)
        loaded = loading.load_engine(reference, setup, quiet=quiet, no_color=no_color)
        cases = plan(*sizes, loaded.engine.ctx_size)
        _tell_skipped(cases, loaded.engine.ctx_size, quiet)
        progress = stack.enter_context(Progress(quiet=quiet, no_color=no_color))
        make = partial(Benchmark, repeats=repeat, pause_s=pause, on_step=progress)
        if rival is not None:
            make = partial(make, peer=rival.peer)
            if not rival.fits_together:
                make = partial(make, reload=partial(Engine.load, loaded.model.path, setup))
        benchmark = worker.call(partial(make, loaded.engine, cancelled=cancelled))
        report = Report(loaded.name, benchmark, cases.skipped, rival)
        del loaded  # the benchmark may have to forget the engine: it must be the last to hold it
        _run(report, benchmark, cases, cancelled)
    write(report, output.value)
    if plot is not None:
        from localv4.cli.bench_plot import draw

        draw(report, plot)
    if not report.is_complete:
        raise typer.Exit(INTERRUPTED)


def _check_plot(plot: Path | None) -> None:
    if plot is not None:
        from localv4.cli.picture import check_target

        check_target(plot)


def _tell_skipped(cases: "Plan", ctx_size: int, quiet: bool) -> None:
    from localv4.cli import loading

    if cases.skipped and not quiet:
        names = ", ".join(case.name for case in cases.skipped)
        loading.note(f"the context holds {ctx_size} tokens, skipped: {names}")


def _run(
    report: "Report", benchmark: "Benchmark", cases: "Plan", cancelled: threading.Event
) -> None:
    """Fill the report; Ctrl-C ends the test at hand and leaves those that are finished."""
    from localv4.cli import worker
    from localv4.cli.signals import interrupt_sets

    try:
        with interrupt_sets(cancelled):
            for measurement in worker.stream(lambda: benchmark.run(cases.fitting)):
                if measurement is not None:
                    report.measurements.append(measurement)
    except (Cancelled, KeyboardInterrupt):
        return
    report.is_complete = True


def _parse_all(prompts: str, generated: str, depths: str) -> tuple[list[int], list[int], list[int]]:
    sizes = (
        parse_sizes(prompts, "--prompt-tokens"),
        parse_sizes(generated, "--gen-tokens"),
        parse_sizes(depths, "--depth"),
    )
    if not any((*sizes[0], *sizes[1])):
        raise UsageError("nothing to measure", hint="give -p or -n a number above 0")
    return sizes


def parse_sizes(text: str, name: str) -> list[int]:
    """Read numbers of tokens, separated by commas. Raises UsageError naming the option."""
    parts = text.split(",")
    digits = all(part.strip().isascii() and part.strip().isdigit() for part in parts)
    if not digits or len(parts) > MAX_SIZES or any(len(part) > 20 for part in parts):
        raise UsageError(
            f"{name} is {text[:80]!r}, expected whole numbers", hint=f"{name} 512, or 512,2048"
        )
    sizes = [int(part) for part in parts]
    if max(sizes) > MAX_TOKENS:
        raise UsageError(f"{name} is {max(sizes)}, expected at most {MAX_TOKENS}")
    return sizes
