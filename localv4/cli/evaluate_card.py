"""`localv4 eval card`: a page about the quality of a model, kept with its weights."""

import importlib.util
import os
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from localv4 import __version__
from localv4.cli import evaluate_kld, evaluate_ppl, evaluation, options
from localv4.cli.engine_options import Arithmetic, MeasuringOptions
from localv4.cli.option_groups import option, with_groups
from localv4.errors import LocalV4Error, NotFoundError, UsageError

if TYPE_CHECKING:
    from localv4.cli.loading import Loaded
    from localv4.cli.progress import Progress
    from localv4.engine.engine import Engine
    from localv4.engine.quality_card import Card
    from localv4.engine.windows import Windows


_option = partial(option, panel="Card", env=False)


BaseModel = Annotated[
    str | None, _option("--base-model", metavar="MODEL", help="Model to measure divergence from.")
]
BaseNumerics = Annotated[Arithmetic | None, evaluation.base_numerics(panel="Card")]
Out = Annotated[
    Path | None,
    _option(
        "-o", "--out", metavar="FOLDER", help="Where to put the card. Default: with the model."
    ),
]
Beside = Annotated[
    list[Path] | None,
    _option(
        "--beside",
        metavar="FOLDER",
        help="Show the card in FOLDER beside, too; cards of models next to this one always are.",
    ),
]


@with_groups
def card(
    model: options.Model = None,
    *,
    base_model: BaseModel = None,
    base_numerics: BaseNumerics = None,
    out: Out = None,
    beside: Beside = None,
    file: evaluation.TextFile = None,
    context: evaluation.Sizes = "512,2048",
    windows: evaluation.MostWindows = None,
    bos: evaluation.Bos = True,
    floor_windows: evaluation.FloorWindows = 4,
    computing: MeasuringOptions,
    base_kv: evaluation.BaseKv = None,
    quiet: options.Quiet = False,
    no_color: options.NoColor = False,
) -> None:
    """Measure a model and write its quality card: card.json, README.md and quality.svg.

    Prints the folder of the card. The divergence is measured in windows of the first size of -c.
    """
    sizes = evaluation.parse_sizes(context)
    text = evaluation.read_text(file)
    if importlib.util.find_spec("matplotlib") is None:
        raise NotFoundError("a card needs matplotlib", hint="pip install 'localv4[plot]'")

    from localv4.cli.progress import Progress
    from localv4.engine import quality_card
    from localv4.library import installed

    found = installed.resolve(model)
    if out is None and found.source in ("embedded", "hub-cache"):
        raise UsageError(
            f"the folder of {found.name} is not ours to write to", hint="choose one with --out"
        )
    folder = out or quality_card.card_folder(found.path)
    _check_target(folder)
    loaded = evaluation.load(model, computing, quiet, no_color)
    tokens = evaluation.tokenize(loaded.engine, text, file)
    cuts = [evaluation.cut_text(loaded.engine, tokens, size, windows, bos) for size in sizes]
    base = None
    if base_model is not None:
        of_base = computing.of_base(base_numerics, base_kv)
        base = evaluation.load(base_model, of_base, quiet, no_color)
        evaluation.check_same_tokens(loaded.engine, base.engine, tokens)
    with Progress(quiet=quiet, no_color=no_color) as progress:
        document = _document(loaded, tokens, cuts, base, floor_windows, progress)
    measured = quality_card.Card.model_validate(document)
    around = [*quality_card.neighbours(folder), *(beside or ())]
    others = list(quality_card.comparable_cards(measured, folder, around))
    _write(folder, measured, others)
    print(folder)


def _check_target(folder: Path) -> None:
    """Raise a LocalV4Error if no card can be put there, long before there is one."""
    if not folder.parent.is_dir():
        raise NotFoundError(f"there is no folder {folder.parent} for the card")
    place = folder if folder.is_dir() else folder.parent
    if (folder.exists() and not folder.is_dir()) or not os.access(place, os.W_OK):
        raise LocalV4Error(f"cannot write to {folder}")


def _document(
    loaded: "Loaded",
    text: evaluation.Text,
    cuts: "list[Windows]",
    base: "Loaded | None",
    floor_windows: int,
    progress: "Progress",
) -> dict[str, Any]:
    """Measure everything; return the card as JSON values."""
    from localv4.engine.quality_card import manifest_digest

    engine = loaded.engine
    results = evaluate_ppl.measure_all(engine, cuts, floor_windows, progress)
    return {
        "schema": evaluation.SCHEMA,
        "tool": f"localv4 {__version__}",
        "model": loaded.name,
        "numerics": engine.network.name,
        "bytes": sum(tensor.nbytes for tensor in engine.checkpoint.tensors.values()),
        "bytes_per_token": _bytes_per_token(engine),
        "manifest": manifest_digest(loaded.model.path),
        "text": text.document,
        "bos": cuts[0].bos is not None,
        "perplexity": [evaluate_ppl.result_document(part, found) for part, found in results],
        "base": base and _base_document(engine, base, cuts[0], floor_windows, progress),
    }


def _base_document(
    engine: "Engine",
    base: "Loaded",
    windows: "Windows",
    floor_windows: int,
    progress: "Progress",
) -> dict[str, Any]:
    from localv4.engine.divergence import LiveBase

    source = LiveBase(base.engine, windows)
    measured = evaluate_kld.measure(engine, source, floor_windows, progress)
    rounding = measured.rounding
    return {
        "name": base.name,
        "numerics": base.engine.network.name,
        "bytes_per_token": _bytes_per_token(base.engine),
        "context": windows.size,
        "windows": len(windows),
        "divergence": evaluate_kld.divergence_document(measured.divergence),
        "floor_windows": min(floor_windows, len(windows)),
        "rounding": rounding and evaluate_kld.divergence_document(rounding),
    }


def _bytes_per_token(engine: "Engine") -> int:
    """Return the bytes of weights that decoding a token reads."""
    from localv4.model.traffic import weight_bytes

    network = engine.network
    packs = network.name == "fast"
    return sum(weight_bytes(network.weights, network.config, packs_experts=packs).values())


def _write(folder: Path, card: "Card", others: "list[Card]") -> None:
    """Write the three files of a card, the one that others read last."""
    from localv4.cli import card_page, card_plot
    from localv4.engine.quality_card import FILE
    from localv4.finished_file import finished_file

    contents = {
        card_page.PLOT: card_plot.draw(card, others),
        "README.md": card_page.markdown(card, others).encode(),
        FILE: (card.model_dump_json(by_alias=True, indent=2) + "\n").encode(),
    }
    folder.mkdir(exist_ok=True)
    for name, data in contents.items():
        with finished_file(folder / name, len(data)) as file:
            file.write(data)
