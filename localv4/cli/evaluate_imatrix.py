"""`localv4 eval imatrix`: which columns of each matrix matter, for quantization."""

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from localv4.cli import engine_options, evaluation, options
from localv4.cli.generation import format_bytes
from localv4.cli.sizes import parse_bytes
from localv4.errors import DoesNotFitError, UsageError

if TYPE_CHECKING:
    from localv4.engine.engine import Engine
    from localv4.engine.imatrix import Collector
    from localv4.engine.second_moments import MomentCollector
    from localv4.kernels.team import Team
    from localv4.model.weights import Weights
    from localv4.storage.imatrix_file import ImatrixFile

Out = Annotated[
    Path, typer.Option("-o", "--out", metavar="FILE", help="GGUF file to write, as llama-imatrix.")
]
SecondMoments = Annotated[
    Path | None,
    typer.Option(
        "--second-moments",
        metavar="FILE",
        help="Also write which columns are active together: a .safetensors file for quantize.",
    ),
]
MomentsLimit = Annotated[
    str,
    typer.Option(
        "--moments-limit",
        metavar="SIZE",
        help="Second moments that take more than this, for one kind of input in a layer, are left"
        " out.",
    ),
]


def imatrix(
    out: Out,
    second_moments: SecondMoments = None,
    moments_limit: MomentsLimit = "128M",
    model: options.Model = None,
    file: evaluation.TextFile = None,
    context: evaluation.OptionalSize = None,
    windows: evaluation.MostWindows = None,
    bos: evaluation.Bos = True,
    threads: engine_options.Threads = None,
    pin: engine_options.Pin = False,
    quiet: options.Quiet = False,
    no_color: options.NoColor = False,
) -> None:
    """Collect an importance matrix over a text: mean squares of inputs, uses of each expert.

    Works in exact arithmetic, on unpacked models. `localv4 quantize --imatrix` and llama.cpp's
    quantizer read the file. Choose a text like those that the model is for, and another one than
    that on which its quality is measured.
    """
    _check_name(out, "--out", ".gguf")
    if second_moments is not None:
        _check_name(second_moments, "--second-moments", ".safetensors")
    limit = parse_bytes(moments_limit, "--moments-limit")
    text = evaluation.read_text(file)

    from localv4.cli import loading, worker
    from localv4.cli.progress import Progress
    from localv4.engine import imatrix as collecting
    from localv4.storage.imatrix_file import write_imatrix

    exact = engine_options.Arithmetic.EXACT
    computing = engine_options.MeasuringOptions(threads, pin, exact, device="cpu")
    engine = evaluation.load(model, computing, quiet, no_color).engine
    tokens = evaluation.tokenize(engine, text, file)
    part = evaluation.cut_text(engine, tokens, context or evaluation.WINDOW, windows, bos)
    make = collecting.Collector if second_moments is None else _moments_within(engine, limit)
    with Progress(quiet=quiet, no_color=no_color) as progress:

        def report(done: int, total: int) -> None:
            progress("collecting", done, total)

        found, seen = worker.call(
            lambda: collecting.collect(engine, part, tokens.name, report, make)
        )
    write_imatrix(out, found)
    notes = [_summary(out, found)]
    if second_moments is not None:
        notes += _written_moments(second_moments, seen, tokens.name)
    if not quiet:
        for line in notes:
            loading.note(line)


def _check_name(path: Path, option: str, suffix: str) -> None:
    """Raise a LocalV4Error for a file that cannot be written, or under a misleading name."""
    if path.suffix.lower() != suffix:
        raise UsageError(f"{option} is {path.name!r}, expected a name ending in {suffix}")
    evaluation.check_folder(path)


def _moments_within(engine: "Engine", limit: int) -> "Callable[[Team, Weights], MomentCollector]":
    """Return what makes the collector of second moments, if memory has room for them."""
    import psutil

    from localv4.engine.second_moments import MomentCollector

    def make(team: "Team", weights: "Weights") -> "MomentCollector":
        collector = MomentCollector(team, weights, engine.config.o_groups, limit)
        available = psutil.virtual_memory().available
        if collector.nbytes > available:
            raise DoesNotFitError(
                f"second moments take {format_bytes(collector.nbytes)} of memory, "
                f"{format_bytes(available)} are available",
                hint="give a smaller --moments-limit",
            )
        return collector

    return make


def _written_moments(path: Path, collector: "Collector", dataset: str) -> list[str]:
    """Write the second moments; return what to tell about them."""
    from localv4.engine.second_moments import MomentCollector
    from localv4.storage.moments_file import write_moments

    assert isinstance(collector, MomentCollector)
    found = collector.moments()
    if not found:
        raise UsageError("no second moments are small enough", hint="give a larger --moments-limit")
    write_moments(path, found, dataset)
    nbytes = sum(moments.products.nbytes for moments in found.values())
    lines = [f"{path}: {len(found)} inputs, {format_bytes(nbytes)}"]
    lines += [
        f"left out: {kind}, {format_bytes(skipped.nbytes)} in each of {skipped.layers} layers "
        "(see --moments-limit)"
        for kind, skipped in collector.skipped.items()
    ]
    return lines


def _summary(out: Path, found: "ImatrixFile") -> str:
    fused = [stats for name, stats in found.tensors.items() if name.endswith("gate_exps.weight")]
    experts = sum(len(stats.counts) for stats in fused)
    idle = sum(int((stats.counts == 0).sum()) for stats in fused)
    tokens = found.chunk_count * (found.chunk_size - 1)
    line = f"{out}: {len(found.tensors)} matrices, {tokens} tokens"
    return f"{line}; {idle} of {experts} experts were never chosen" if idle else line
