"""`localv4 eval logits`: what a model predicts, as a file for others to compare with."""

import threading
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from localv4.cli import evaluation, options
from localv4.cli.engine_options import MeasuringOptions
from localv4.cli.option_groups import option, with_groups
from localv4.errors import BadFileError, DoesNotFitError, UsageError
from localv4.finished_file import finished_file

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from localv4.engine.engine import Engine
    from localv4.engine.windows import Windows

Report = Callable[[int, int], None]

ROWS_WAITING = 256
"""Rows on their way to the disk: 66 MB for a vocabulary of 129,280."""


_option = partial(option, env=False)
_LIST, _BASE = "All logits of a list of tokens", "A base for `eval kld`"
Tokens = Annotated[
    Path | None,
    _option("--tokens", panel=_LIST, metavar="FILE", help="JSON list of token ids to read."),
]
Out = Annotated[
    Path | None,
    _option(
        "-o",
        "--out",
        panel=_LIST,
        metavar="FILE",
        help="NumPy file (.npy) to write: positions x vocabulary.",
    ),
]
Chunk = Annotated[
    int | None,
    _option(
        "--chunk", panel=_LIST, min=1, metavar="N", help="Tokens at a time; 1: token by token."
    ),
]
SaveBase = Annotated[
    Path | None,
    _option(
        "--save-base",
        panel=_BASE,
        metavar="FILE",
        help="File to write, in the format of llama-perplexity --kl-divergence-base.",
    ),
]


@with_groups
def logits(
    *,
    tokens: Tokens = None,
    out: Out = None,
    chunk: Chunk = None,
    save_base: SaveBase = None,
    file: evaluation.TextFile = None,
    context: evaluation.OptionalSize = None,
    windows: evaluation.MostWindows = None,
    bos: evaluation.OptionalBos = None,
    model: options.Model = None,
    computing: MeasuringOptions,
    quiet: options.Quiet = False,
    no_color: options.NoColor = False,
) -> None:
    """Write logits: float32 for every token of a list, or the compact base of a text.

    Either --tokens IDS.json --out FILE.npy, or --save-base FILE and the options of the text.
    """
    of_text = (file, context, windows, bos)
    if save_base is not None and (tokens, out, chunk) != (None, None, None):
        raise UsageError("--save-base is of a text: leave --tokens, --out and --chunk out")
    if save_base is None and (tokens is None or out is None):
        raise UsageError("give --tokens and --out, or --save-base")
    if save_base is None and of_text != (None, None, None, None):
        raise UsageError("-f, -c, -w and --bos belong to --save-base")
    for target in filter(None, (out, save_base)):
        evaluation.check_folder(target)
    ids = read_tokens(tokens) if tokens is not None else []
    text = evaluation.read_text(file) if save_base is not None else ""

    from localv4.cli.progress import Progress

    engine = evaluation.load(model, computing, quiet, no_color).engine
    with Progress(quiet=quiet, no_color=no_color) as progress:

        def report(done: int, total: int) -> None:
            progress("computing logits", done, total)

        if out is not None:
            _write_all(engine, ids, chunk, out, report)
        elif save_base is not None:
            found = evaluation.tokenize(engine, text, file)
            size = context or evaluation.WINDOW
            part = evaluation.cut_text(engine, found, size, windows, bos is not False)
            _write_base(engine, part, save_base, report)


def read_tokens(path: Path) -> list[int]:
    """Read a JSON list of at least one token id. Raises BadFileError."""
    from localv4.cli.inputs import read_json

    ids = read_json(path)
    if not isinstance(ids, list) or not ids:
        raise BadFileError(path, "not a JSON list of token ids")
    for position, token in enumerate(ids):
        if type(token) is not int or token < 0:
            raise BadFileError(path, f"item {position} is not a token id")
    return ids


def _write_all(
    engine: "Engine", ids: list[int], chunk: int | None, out: Path, report: Report
) -> None:
    from localv4.cli import worker

    vocab = engine.config.vocab_size
    foreign = next((i for i in ids if i >= vocab), None)
    if foreign is not None:
        raise UsageError(f"token id {foreign} is outside the vocabulary of {vocab}")
    if len(ids) > engine.ctx_size:
        raise DoesNotFitError(
            f"{len(ids)} tokens do not fit into a context of {engine.ctx_size}",
            hint="give fewer tokens",
        )
    rows = worker.stream(lambda: engine.logits(ids, chunk, report))
    write_npy(out, (row for row in rows if row is not None), (len(ids), vocab))


def write_npy(path: Path, parts: "Iterable[NDArray[np.float32]]", shape: tuple[int, int]) -> None:
    """Write float32 rows as they come; the file appears only when all are on disk.

    `parts` are arrays (some rows, columns) that together have `shape`.
    """
    from numpy.lib import format as npy

    header = {"descr": "<f4", "fortran_order": False, "shape": shape}
    hint = "choose another folder with --out, or give fewer tokens"
    with finished_file(path, 4 * shape[0] * shape[1], hint) as file:
        npy.write_array_header_1_0(file, header)
        for part in parts:
            file.write(part.astype("<f4", copy=False).tobytes())


def _write_base(engine: "Engine", windows: "Windows", path: Path, report: Report) -> None:
    from localv4.cli import worker
    from localv4.engine import logits_file
    from localv4.engine.scoring import logits_rows

    vocab = engine.config.vocab_size
    room = threading.Semaphore(ROWS_WAITING)  # the disk may be slower than the model

    def rows() -> "Iterator[NDArray[np.uint16]]":
        for index in range(len(windows)):
            for row in logits_rows(engine, windows.inputs(index), windows.first):
                room.acquire()
                yield logits_file.encode(row)
            report(index + 1, len(windows))

    hint = "choose another folder, or fewer windows with -w"
    with finished_file(path, logits_file.file_bytes(windows, vocab), hint) as file:
        file.write(logits_file.header(windows, vocab))
        for row in worker.stream(rows):
            if row is not None:
                file.write(row.tobytes())
                room.release()
