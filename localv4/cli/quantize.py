"""`localv4 quantize`: a model into one that takes fewer bytes, by a recipe."""

from collections.abc import Iterator
from contextlib import contextmanager
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from localv4.cli import options, terminal

if TYPE_CHECKING:
    from quant.gguf_conversion import GgufConversion
    from quant.moments import SecondMoments
    from quant.packer import Packer
    from quant.source import Source
    from quant.task import Task


class OutputForm(StrEnum):
    """What is written."""

    PACKED = "packed"
    GGUF = "gguf"


SourceArgument = Annotated[
    str, typer.Argument(metavar="SRC", help="Name of an installed model, or a path.")
]
Output = Annotated[
    Path | None,
    typer.Option(
        "-o",
        "--output",
        metavar="PATH",
        help="Folder (or .gguf file) to write. Default: in the folder of models, as NAME:RECIPE.",
    ),
]
RecipeName = Annotated[
    str,
    typer.Option(
        "--recipe",
        metavar="NAME",
        help="lossless, q8, q4, q3, q2, mixed, or a TOML file of your own.",
    ),
]
Form = Annotated[
    OutputForm,
    typer.Option("--format", help="packed: a folder for localv4; gguf: a file for llama.cpp, too."),
]
ImatrixFile = Annotated[
    Path | None,
    typer.Option(
        "--imatrix",
        metavar="FILE",
        help="Importance matrix, by localv4 eval imatrix or llama.cpp.",
    ),
]
MomentsFile = Annotated[
    Path | None,
    typer.Option(
        "--second-moments",
        metavar="FILE",
        help="Of localv4 eval imatrix --second-moments: errors of columns make each other good.",
    ),
]
SplitSize = Annotated[
    str,
    typer.Option(
        "--split-size", metavar="SIZE", help="Largest part of a GGUF model, as 40G; 0: one file."
    ),
]
SourceStreaming = Annotated[
    bool,
    typer.Option(
        "--source-streaming",
        metavar="",
        help="SRC is on the hub: pull each file when it is needed, and remove it after that.",
    ),
]
DryRun = Annotated[
    bool, typer.Option("--dry-run", metavar="", help="Only show what would be written.")
]
Threads = Annotated[
    int | None, typer.Option("-t", "--threads", min=1, metavar="N", help="CPU threads. All.")
]


def quantize(
    source: SourceArgument,
    output: Output = None,
    recipe: RecipeName = "q4",
    form: Form = OutputForm.PACKED,
    imatrix: ImatrixFile = None,
    second_moments: MomentsFile = None,
    split_size: SplitSize = "40G",
    source_streaming: SourceStreaming = False,
    dry_run: DryRun = False,
    threads: Threads = None,
    as_json: options.Json = False,
    quiet: options.Quiet = False,
    no_color: options.NoColor = False,
) -> None:
    """Convert a model to a smaller one, or to one that opens at once.

    A conversion that was stopped goes on where it was when the same command is given again.
    """
    from localv4.cli.quantize_forecast import forecast_line
    from localv4.cli.quantize_progress import QuantizeProgress
    from localv4.cli.quantize_report import plan_document, print_plan
    from localv4.cli.sizes import parse_bytes
    from localv4.kernels.threads import usable_processors
    from quant.recipe import load_recipe
    from quant.task import Task

    split_bytes = 0 if split_size == "0" else parse_bytes(split_size, "--split-size")
    chosen = load_recipe(recipe)
    statistics, mark = None, ""
    if imatrix is not None:
        from localv4.storage.imatrix_file import read_imatrix

        statistics = read_imatrix(imatrix)
        mark = _digest(imatrix)
    with (
        _moments(second_moments) as (moments, moments_mark),
        _opened(source, source_streaming, output, quiet) as (opened, base_name),
    ):
        workers = threads or usable_processors()
        task = Task(opened, chosen, workers, statistics, mark, moments, moments_mark)
        is_gguf = form is OutputForm.GGUF
        work, target = _work(task, output, base_name, is_gguf, split_bytes)
        if not dry_run:
            work.check(target)
        plan = work.plan(target)
        document = plan_document(plan, chosen, base_name, target)
        if not is_gguf:
            document["forecast"] = forecast_line(plan, opened.config, base_name, chosen.name)
        if not as_json and not (quiet and not dry_run):
            print_plan(plan, document, is_result=dry_run, no_color=no_color)
        if not dry_run:
            _compile(quiet, no_color)
            with QuantizeProgress(quiet=quiet, no_color=no_color) as progress:
                work.run(target, progress)
            document["error"] = error = work.converter.errors.relative()
            if not quiet:
                changed = f"rounding moved weights by {100 * error:.1f} %" if error else "all kept"
                terminal.say(f"wrote {target}: {changed}")
    if as_json:
        terminal.print_json(document)


def _digest(path: Path) -> str:
    import hashlib

    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@contextmanager
def _moments(path: Path | None) -> "Iterator[tuple[SecondMoments | None, str]]":
    """Open second moments; give them with what tells them from others."""
    if path is None:
        yield None, ""
        return
    from localv4.storage.moments_file import open_moments
    from quant.moments import SecondMoments

    with open_moments(path) as opened:
        yield SecondMoments(opened), _digest(path)


def _compile(quiet: bool, no_color: bool) -> None:
    """Compile what rounds weights, with progress; later runs find it in the cache."""
    import quant.quantizers  # noqa: F401 - declares the kernels
    from localv4.cli.progress import Progress
    from localv4.kernels.compiler import compile_kernels

    with Progress(quiet=quiet, no_color=no_color) as progress:
        compile_kernels({"quantize"}, lambda done, total: progress("compiling", done, total))


def _work(
    task: "Task", output: Path | None, base_name: str, is_gguf: bool, split_bytes: int
) -> "tuple[Packer | GgufConversion, Path]":
    """Return the conversion, and where its result goes."""
    from localv4 import paths

    name = task.recipe.name
    folder = paths.models_dir() / base_name
    if not is_gguf:
        from quant.packer import Packer

        return Packer(task), output or folder / name
    from quant.gguf_conversion import GgufConversion

    return GgufConversion(
        task, split_bytes, base_name
    ), output or folder / f"{base_name}-{name}.gguf"


@contextmanager
def _opened(
    reference: str, is_streamed: bool, output: Path | None, quiet: bool
) -> "Iterator[tuple[Source, str]]":
    """Open what is converted; give it with the name that its forms have in the folder of models."""
    from quant.source import open_source

    if is_streamed:
        from localv4.cli.quantize_streaming import opened_on_hub

        scratch = output.absolute().parent if output is not None else None
        with opened_on_hub(reference, scratch, quiet) as found:
            yield found
        return
    from localv4.library.installed import resolve
    from localv4.storage import open_checkpoint

    model = resolve(reference)
    with open_checkpoint(model.path) as checkpoint:
        yield open_source(checkpoint), model.base_name.rpartition("/")[2]
