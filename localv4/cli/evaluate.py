"""`localv4 eval`: numbers by which an engine is compared with another."""

import contextlib
import os
import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, BinaryIO

import typer

from localv4.cli import options
from localv4.errors import BadFileError, DoesNotFitError, LocalV4Error

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

app = typer.Typer(help="Numbers by which an engine is compared with another.", no_args_is_help=True)


@app.callback()
def _group() -> None:
    # without a callback, typer would merge the only command into the group
    pass


@app.command("logits")
def logits(
    tokens: Annotated[Path, typer.Option("--tokens", help="JSON list of token ids.")],
    out: Annotated[Path, typer.Option("--out", help="NumPy file (.npy) to write.")],
    model: options.Model = None,
    chunk: Annotated[
        int | None,
        typer.Option("--chunk", min=1, metavar="N", help="Tokens at a time; 1: token by token."),
    ] = None,
    ctx_size: options.ContextSize = None,
    threads: options.Threads = None,
    pin: options.Pin = False,
    numerics: options.Numerics = options.Arithmetic.FAST,
    quiet: options.Quiet = False,
    no_color: options.NoColor = False,
) -> None:
    """Write the float32 logits after every token: an array of positions x vocabulary."""
    from localv4.cli import loading, worker
    from localv4.cli.progress import Progress

    ids = _read_tokens(tokens)
    engine = loading.load_engine(
        model,
        ctx_size=ctx_size,
        threads=threads,
        pin=pin,
        numerics=numerics.value,
        quiet=quiet,
        no_color=no_color,
    ).engine
    vocab = engine.config.vocab_size
    foreign = next((i for i in ids if i >= vocab), None)
    if foreign is not None:
        raise BadFileError(tokens, f"token id {foreign} is outside the vocabulary of {vocab}")
    if len(ids) > engine.ctx_size:
        raise DoesNotFitError(
            f"{len(ids)} tokens do not fit into a context of {engine.ctx_size}",
            hint="give fewer tokens or a larger --ctx-size",
        )
    with Progress(quiet=quiet, no_color=no_color) as progress:

        def report(done: int, total: int) -> None:
            progress("computing logits", done, total)

        rows = worker.stream(lambda: engine.logits(ids, chunk, report))
        write_npy(out, (row for row in rows if row is not None), (len(ids), vocab))


def _read_tokens(path: Path) -> list[int]:
    """Read a JSON list of at least one token id. Raises BadFileError."""
    from localv4.cli.inputs import read_json

    ids = read_json(path)
    if not isinstance(ids, list) or not ids:
        raise BadFileError(path, "not a JSON list of token ids")
    for position, token in enumerate(ids):
        if type(token) is not int or token < 0:
            raise BadFileError(path, f"item {position} is not a token id")
    return ids


def write_npy(path: Path, parts: "Iterable[NDArray[np.float32]]", shape: tuple[int, int]) -> None:
    """Write float32 rows as they come; the file appears only when all are on disk.

    `parts` are arrays (some rows, columns) that together have `shape`.
    """
    from numpy.lib import format as npy

    header = {"descr": "<f4", "fortran_order": False, "shape": shape}
    try:
        _check_space(path.parent, 4 * shape[0] * shape[1])
        with _finished_file(path) as file:
            npy.write_array_header_1_0(file, header)
            for part in parts:
                file.write(part.astype("<f4", copy=False).tobytes())
    except OSError as error:
        raise LocalV4Error(f"cannot write {path}: {error.strerror}") from error


def _check_space(folder: Path, need_bytes: int) -> None:
    from localv4.cli.generation import format_bytes

    have_bytes = shutil.disk_usage(folder).free
    if have_bytes < need_bytes:
        raise DoesNotFitError(
            f"the result needs {format_bytes(need_bytes)}, "
            f"{folder} has {format_bytes(have_bytes)} free",
            hint="choose another folder with --out, or give fewer tokens",
        )


@contextlib.contextmanager
def _finished_file(path: Path) -> Iterator[BinaryIO]:
    """Open a file under another name; it gets its own name when all of it is on disk."""
    unfinished = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        with unfinished.open("wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        unfinished.replace(path)
    finally:
        unfinished.unlink(missing_ok=True)
