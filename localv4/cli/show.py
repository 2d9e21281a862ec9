"""`localv4 show`: what a model is, read from the headers of its files alone."""

import sys
from typing import TYPE_CHECKING, Annotated

import typer

from localv4.cli import options, terminal
from localv4.errors import NotFoundError

if TYPE_CHECKING:
    from localv4.cli.description import Description
    from localv4.library.registry import ModelSpec

MAX_FILES_SHOWN = 12


def show(
    model_argument: options.ModelArgument = None,
    model: options.Model = None,
    tensors: Annotated[
        bool, typer.Option("--tensors", metavar="", help="Also list every tensor.")
    ] = False,
    output_format: options.Format = options.OutputFormat.AUTO,
    as_json: options.Json = False,
    no_color: options.NoColor = False,
) -> None:
    """Show what a model is made of; for one that is not here, what is known of it."""
    from localv4.library import installed
    from localv4.library.registry import load_registry

    reference = options.one_of(model_argument, model, "--model")
    wants_json = options.wants_json(output_format, as_json)
    try:
        found = installed.resolve(reference)
    except NotFoundError as error:
        registry = load_registry()
        name = registry.find((reference or "").partition(":")[0])
        if name is None:
            raise
        _show_known(name, registry.models[name], error.hint, wants_json, no_color)
        return

    from localv4.cli import card_page
    from localv4.cli.description import describe

    description = describe(found)
    if wants_json:
        quality = card_page.document(found.path)
        terminal.print_json({**description.document(tensors=tensors), "quality": quality})
    else:
        _print_description(description, tensors, no_color)


def _print_description(description: "Description", tensors: bool, no_color: bool) -> None:
    from localv4.cli import card_page
    from localv4.cli.generation import format_bytes
    from localv4.cli.tables import print_section, print_table

    console = terminal.make_console(sys.stdout, no_color=no_color)
    for title, rows in description.sections():
        print_section(console, title, rows)
    if quality := card_page.section(description.model.path):
        print_section(console, "Quality", quality)
    shown = description.files[:MAX_FILES_SHOWN]
    rows = [(file.name, format_bytes(file.nbytes)) for file in shown]
    if len(description.files) > len(shown):
        rows.append((f"and {len(description.files) - len(shown)} more files", ""))
    print_section(console, "Files", rows)
    print_section(console, "License", [("license", description.license)])
    if tensors:
        print_table(
            console,
            [
                (tensor.name, tensor.dtype.name, shape_text(tensor.shape), str(tensor.nbytes))
                for tensor in description.tensors
            ],
            header=("TENSOR", "TYPE", "SHAPE", "BYTES"),
            numbers=frozenset({3}),
        )


def shape_text(shape: tuple[int, ...]) -> str:
    """Write a tensor's shape, outermost dimension first."""
    return " x ".join(map(str, shape)) or "scalar"


def _show_known(
    name: str, spec: "ModelSpec", hint: str | None, wants_json: bool, no_color: bool
) -> None:
    """Print what the registry knows of a model that is not here."""
    facts = spec.model_dump(mode="json", exclude_none=True, exclude_defaults=True)
    if wants_json:
        terminal.print_json({"name": name, "installed": False, **facts})
        return
    from rich.text import Text

    from localv4.cli.models import size_text
    from localv4.cli.tables import print_section, print_table

    console = terminal.make_console(sys.stdout, no_color=no_color)
    rows = [
        ("name", ", ".join([name, *spec.aliases])),
        ("installed", "no"),
        ("repository", spec.repo),
        ("revision", spec.revision or "unknown"),
        ("format", spec.format),
        ("size", size_text(spec)),
        ("parameters", f"{spec.params:,}" if spec.params else "unknown"),
        ("context", f"{spec.context:,} tokens" if spec.context else "unknown"),
        ("chat", "yes" if spec.chat else "no: a base model, for --raw"),
    ]
    print_section(console, "Model", rows)
    if spec.quants:
        print_section(
            console,
            "Quantizations",
            [(f"{name}:{label}", _quant_text(spec, label)) for label in spec.quants],
        )
    if spec.api_price is not None:
        price = spec.api_price
        print_section(
            console,
            f"Price of the maker's API ({price.as_of}, US dollars per million tokens)",
            [
                ("input, cached", f"{price.input_cache_hit:g}"),
                ("input", f"{price.input_cache_miss:g}"),
                ("output", f"{price.output:g}"),
            ],
        )
    print_section(console, "License", [("license", spec.license or "unknown")])
    if hint:
        console.print(Text("To get it", style="bold"))
        print_table(console, [(f"  {hint}",)])


def _quant_text(spec: "ModelSpec", label: str) -> str:
    from localv4.cli.generation import format_bytes

    quant = spec.quants[label]
    if quant.bytes is not None:
        return f"{format_bytes(quant.bytes)}  {quant.files}"
    size = f"~{format_bytes(int(quant.approx_gb * 1e9))}" if quant.approx_gb else "size unknown"
    return f"{size}  {quant.files}"
