"""`localv4 eval imatrix`: which columns of each matrix matter, for quantization."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from localv4.cli import evaluation, options
from localv4.errors import NotFoundError, UsageError

if TYPE_CHECKING:
    from localv4.storage.imatrix_file import ImatrixFile

Out = Annotated[
    Path, typer.Option("-o", "--out", metavar="FILE", help="GGUF file to write, as llama-imatrix.")
]


def imatrix(
    out: Out,
    model: options.Model = None,
    file: evaluation.TextFile = None,
    context: evaluation.OptionalSize = None,
    windows: evaluation.MostWindows = None,
    bos: evaluation.Bos = True,
    threads: options.Threads = None,
    pin: options.Pin = False,
    quiet: options.Quiet = False,
    no_color: options.NoColor = False,
) -> None:
    """Collect an importance matrix over a text: mean squares of inputs, uses of each expert.

    Works in exact arithmetic, on unpacked models. `localv4 quantize --imatrix` and llama.cpp's
    quantizer read the file. Choose a text like those that the model is for, and another one than
    that on which its quality is measured.
    """
    if out.suffix.lower() != ".gguf":
        raise UsageError(f"--out is {out.name!r}, expected a name ending in .gguf")
    if not out.parent.is_dir():
        raise NotFoundError(f"there is no folder {out.parent}")
    text = evaluation.read_text(file)

    from localv4.cli import loading, worker
    from localv4.cli.progress import Progress
    from localv4.engine import imatrix as collecting
    from localv4.storage.imatrix_file import write_imatrix

    exact = options.Arithmetic.EXACT
    engine = evaluation.load(model, threads, pin, exact, quiet, no_color).engine
    tokens = evaluation.tokenize(engine, text, file)
    part = evaluation.cut_text(engine, tokens, context or evaluation.WINDOW, windows, bos)
    with Progress(quiet=quiet, no_color=no_color) as progress:

        def report(done: int, total: int) -> None:
            progress("collecting", done, total)

        found = worker.call(lambda: collecting.collect(engine, part, tokens.name, report))
    write_imatrix(out, found)
    if not quiet:
        loading.note(_summary(out, found))


def _summary(out: Path, found: "ImatrixFile") -> str:
    fused = [stats for name, stats in found.tensors.items() if name.endswith("gate_exps.weight")]
    experts = sum(len(stats.counts) for stats in fused)
    idle = sum(int((stats.counts == 0).sum()) for stats in fused)
    tokens = found.chunk_count * (found.chunk_size - 1)
    line = f"{out}: {len(found.tensors)} matrices, {tokens} tokens"
    return f"{line}; {idle} of {experts} experts were never chosen" if idle else line
