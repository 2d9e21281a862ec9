"""`localv4 bench`: how fast a model reads and generates here, and how fast it could be at best."""

import threading
from enum import StrEnum
from typing import TYPE_CHECKING, Annotated, Any

import typer

from localv4.cli import options
from localv4.errors import Cancelled, UsageError

if TYPE_CHECKING:
    from localv4.cli.bench_report import Report
    from localv4.engine.benchmark import Benchmark, Plan

INTERRUPTED = 130
MAX_SIZES = 64
MAX_TOKENS = 1 << 24
MAX_PAUSE_S = 600.0


class BenchFormat(StrEnum):
    """How results are written to stdout."""

    MD = "md"
    CSV = "csv"
    JSON = "json"


def _option(*names: str, **rest: Any) -> Any:
    return typer.Option(*names, rich_help_panel="Test", **rest)


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
Output = Annotated[
    BenchFormat,
    typer.Option(
        "-o",
        "--output",
        rich_help_panel="Output",
        help="md: tables; csv: one line per test; json: everything, with all samples.",
    ),
]


def bench(
    model_argument: options.ModelArgument = None,
    model: options.Model = None,
    prompt_tokens: PromptTokens = "512",
    gen_tokens: GenTokens = "128",
    depth: Depth = "0,4096",
    repeat: Repeat = 5,
    pause: Pause = 0.0,
    threads: options.Threads = None,
    numerics: options.Numerics = options.Arithmetic.EXACT,
    output: Output = BenchFormat.MD,
    quiet: options.Quiet = False,
    no_color: options.NoColor = False,
) -> None:
    """Measure tokens per second, and the share of what memory and processor can do at best.

    Names are llama-bench's: pp512 reads 512 tokens, tg128 generates 128, @ d4096 after 4096 others.
    """
    prompts = parse_sizes(prompt_tokens, "--prompt-tokens")
    generated = parse_sizes(gen_tokens, "--gen-tokens")
    depths = parse_sizes(depth, "--depth")
    if not any((*prompts, *generated)):
        raise UsageError("nothing to measure", hint="give -p or -n a number above 0")

    # imported before the model is loaded: the probes are kernels, compiled with the others
    from localv4.cli import loading, worker
    from localv4.cli.bench_report import Report, write
    from localv4.cli.generation import peak_memory_bytes
    from localv4.cli.progress import Progress
    from localv4.engine.benchmark import Benchmark, plan

    loaded = loading.load_engine(
        options.one_of(model_argument, model, "--model"),
        ctx_size=None,
        threads=threads,
        numerics=numerics.value,
        quiet=quiet,
        no_color=no_color,
    )
    cases = plan(prompts, generated, depths, loaded.engine.ctx_size)
    if cases.skipped and not quiet:
        names = ", ".join(case.name for case in cases.skipped)
        loading.note(f"the context holds {loaded.engine.ctx_size} tokens, skipped: {names}")
    cancelled = threading.Event()
    peak_bytes = peak_memory_bytes()
    with Progress(quiet=quiet, no_color=no_color) as progress:
        benchmark = worker.call(
            lambda: Benchmark(
                loaded.engine, repeats=repeat, pause_s=pause, on_step=progress, cancelled=cancelled
            )
        )
        report = Report(loaded.name, benchmark, cases.skipped, peak_bytes)
        _run(report, benchmark, cases, cancelled)
    write(report, output.value)
    if not report.is_complete:
        raise typer.Exit(INTERRUPTED)


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
                    report.add(measurement)
    except (Cancelled, KeyboardInterrupt):
        return
    report.is_complete = True


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
