"""`localv4 list`: the models on this computer, and those that are known."""

import sys
from typing import TYPE_CHECKING, Annotated, Any

import typer

from localv4.cli import options, terminal

if TYPE_CHECKING:
    from localv4.library.installed import InstalledModel
    from localv4.library.registry import ModelSpec

PLACES = {"embedded": "built in", "hub-cache": "Hugging Face cache"}


def list_models(
    show_all: Annotated[
        bool,
        typer.Option("--all", "-a", metavar="", help="Also list known models that are not here."),
    ] = False,
    output_format: options.Format = options.OutputFormat.AUTO,
    as_json: options.Json = False,
    no_color: options.NoColor = False,
) -> None:
    """List the models on this computer."""
    from localv4.library import installed
    from localv4.library.registry import load_registry

    models = [*installed.list_installed(), *installed.list_incomplete()]
    known = load_registry().models if show_all else {}
    here = {model.spec.repo for model in models if model.spec is not None}
    missing = {name: spec for name, spec in known.items() if spec.repo not in here}
    if options.wants_json(output_format, as_json):
        rows = [_document(model) for model in models]
        rows += [_known_document(name, spec) for name, spec in missing.items()]
        terminal.print_json(rows)
        return
    _print(models, missing, no_color)
    _mention_leftovers()


def _print(models: "list[InstalledModel]", missing: "dict[str, ModelSpec]", no_color: bool) -> None:
    from localv4.cli.generation import format_bytes
    from localv4.cli.tables import print_table

    rows = [
        (model.name, model.format, format_bytes(model.nbytes), _place(model)) for model in models
    ]
    rows += [
        (name, spec.format, size_text(spec), _known_place(spec)) for name, spec in missing.items()
    ]
    console = terminal.make_console(sys.stdout, no_color=no_color)
    print_table(console, rows, header=("NAME", "FORMAT", "SIZE", "WHERE"), numbers=frozenset({2}))


def _known_place(spec: "ModelSpec") -> str:
    also = f"; also called {', '.join(spec.aliases)}" if spec.aliases else ""
    return f"not here: {spec.repo}{also}"


def _mention_leftovers() -> None:
    """Tell on stderr what interrupted downloads have left."""
    from localv4.cli.generation import format_bytes
    from localv4.library.removal import find_leftovers

    nbytes = sum(item.nbytes for item in find_leftovers())
    if nbytes:
        sys.stderr.write(
            f"unfinished downloads: {format_bytes(nbytes)}; pull goes on, prune removes them\n"
        )


def _place(model: "InstalledModel") -> str:
    place = PLACES.get(model.source, str(model.path))
    return f"incomplete: {model.problem} ({place})" if model.problem else place


def size_text(spec: "ModelSpec") -> str:
    """Write the size of a published model, as exactly as it is known."""
    from localv4.cli.generation import format_bytes

    if spec.tensor_bytes is not None:
        return format_bytes(spec.tensor_bytes)
    if spec.approx_gb is not None:
        return f"~{format_bytes(int(spec.approx_gb * 1e9))}"
    if not spec.quants:
        return "unknown"
    return f"{len(spec.quants)} sizes" if len(spec.quants) > 1 else "1 size"


def _document(model: "InstalledModel") -> dict[str, Any]:
    return {
        "name": model.name,
        "installed": True,
        "problem": model.problem,
        "format": model.format,
        "bytes": model.nbytes,
        "source": model.source,
        "path": str(model.path),
        "repo": model.spec.repo if model.spec is not None else None,
        "aliases": list(model.spec.aliases) if model.spec is not None else [],
    }


def _known_document(name: str, spec: "ModelSpec") -> dict[str, Any]:
    return {
        "name": name,
        "installed": False,
        "problem": None,
        "format": spec.format,
        "bytes": spec.tensor_bytes,
        "source": None,
        "path": None,
        "repo": spec.repo,
        "aliases": list(spec.aliases),
    }
