"""`localv4 verify`: whether every file of a model is what it should be, by its digest."""

import sys
from typing import TYPE_CHECKING, Annotated, Any

import typer

from localv4.cli import options, terminal, worker
from localv4.cli.proof_report import print_proof, proof_document, refuse_disproved
from localv4.errors import NotFoundError

if TYPE_CHECKING:
    from localv4.library.installed import InstalledModel
    from localv4.library.verification import FileReport
    from quant.proof import Proof

MAX_TENSORS_SHOWN = 3

Online = Annotated[
    bool,
    typer.Option(
        "--online", metavar="", help="Ask the hub for the digests instead of trusting the records."
    ),
]


Source = Annotated[
    str | None,
    typer.Option(
        "--source",
        metavar="SRC",
        help="What it was converted from: prove that every value that was kept is the same.",
    ),
]


def verify(
    model_argument: options.ModelArgument = None,
    model: options.Model = None,
    online: Online = False,
    source: Source = None,
    output_format: options.Format = options.OutputFormat.AUTO,
    as_json: options.Json = False,
    quiet: options.Quiet = False,
    no_color: options.NoColor = False,
) -> None:
    """Read every file of a model and compare its digest; exit code 5 when one is wrong."""
    from localv4.library import installed
    from localv4.library.verification import refuse_wrong

    found = installed.resolve(options.one_of(model_argument, model, "--model"))
    reports = _check_digests(found, online, source is not None, quiet, no_color)
    wants_json = options.wants_json(output_format, as_json)
    if not wants_json:
        if reports:
            _print_reports(reports, no_color)
        sys.stdout.flush()
    document = _document(found, reports)
    if source is not None and document["right"]:
        proof = _prove(found, source, quiet, no_color)
        document["proof"] = proof_document(proof)
        if not wants_json:
            print_proof(proof, no_color)
    if wants_json:
        terminal.print_json(document)
    sys.stdout.flush()
    refuse_wrong(found, reports)
    if source is not None:
        refuse_disproved(found.path, proof)
    if not quiet:
        count = f"all {len(reports)} files" if reports else "all values that were kept"
        terminal.say(f"{found.name}: {count} right")


def _prove(found: "InstalledModel", source: str, quiet: bool, no_color: bool) -> "Proof":
    """Compare the values of a model with those of what it was made from."""
    from localv4.cli.transfer import Transfer
    from localv4.library import installed
    from quant.proof import prove

    original = installed.resolve(source)
    with Transfer(f"proving {found.name}", original.nbytes, quiet=quiet, no_color=no_color) as bar:
        return worker.call(lambda: prove(found.path, original.path, bar.advance))


def _check_digests(
    found: "InstalledModel", online: bool, has_source: bool, quiet: bool, no_color: bool
) -> "list[FileReport]":
    from localv4.cli.transfer import Transfer
    from localv4.library.verification import check_files, expected_files

    try:
        files = worker.call(lambda: expected_files(found, online=online))
    except NotFoundError:
        if not has_source:
            raise
        return []  # values are going to be compared: that says more than a digest
    total = sum(file.known.bytes for file in files)
    with Transfer(f"verifying {found.name}", total, quiet=quiet, no_color=no_color) as bar:
        return worker.call(lambda: check_files(files, bar.advance))


def _print_reports(reports: "list[FileReport]", no_color: bool) -> None:
    from localv4.cli.generation import format_bytes
    from localv4.cli.tables import print_table

    rows = [
        (item.name, format_bytes(item.nbytes), item.digest[:16], _result(item)) for item in reports
    ]
    console = terminal.make_console(sys.stdout, no_color=no_color)
    print_table(console, rows, header=("FILE", "SIZE", "DIGEST", "RESULT"), numbers=frozenset({1}))


def _result(item: "FileReport") -> str:
    if item.state == "right":
        return "right"
    shown = ", ".join(item.tensors[:MAX_TENSORS_SHOWN])
    more = len(item.tensors) - MAX_TENSORS_SHOWN
    tensors = f" ({shown}{f' and {more} more' if more > 0 else ''})" if shown else ""
    return f"{item.state}: {item.detail}{tensors}"


def _document(found: "InstalledModel", reports: "list[FileReport]") -> dict[str, Any]:
    return {
        "name": found.name,
        "path": str(found.path),
        "right": all(item.state == "right" for item in reports),
        "files": [
            {
                "name": item.name,
                "bytes": item.nbytes,
                "digest": item.digest,
                "state": item.state,
                "detail": item.detail,
                "tensors": list(item.tensors),
            }
            for item in reports
        ],
    }
