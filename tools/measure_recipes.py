#!/usr/bin/env python3
"""Quantize a model by several recipes and measure each against the source: a table, JSON, a plot.

Examples:
  measure_recipes.py tiny-v4 --imatrix tiny.gguf --out recipes.json --plot recipes.svg
  measure_recipes.py tiny-v4 --recipes q4,q2,mine.toml --windows 20
  measure_recipes.py tiny-v4 --imatrix tiny.gguf --second-moments tiny.safetensors

Perplexity and divergence are those of `localv4 eval kld` on its own text. With --imatrix each
recipe is also measured without it, unless it needs it; with --second-moments it is measured once
more with both.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
Files = dict[str, Path]
RECIPES = "lossless,q8,q4,q3,q2,mixed"


def main() -> None:
    """Read the command line, measure, and print the table."""
    options = _parser().parse_args()
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory(dir=options.scratch) as scratch:
        for recipe in options.recipes.split(","):
            for files in _statistics(recipe, options.imatrix, options.second_moments):
                rows.append(_measure(recipe, files, options, Path(scratch) / str(len(rows))))
                sys.stderr.write(_line(rows[-1]) + "\n")
    sys.stdout.write(table(rows))
    if options.out is not None:
        options.out.write_text(json.dumps(rows, indent=1) + "\n", "utf-8")
    if options.plot is not None:
        _plot(rows, options.plot)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", help="what is quantized, and the base of the divergence")
    parser.add_argument("--recipes", default=RECIPES, help="names or TOML files, with commas")
    parser.add_argument("--imatrix", type=Path, help="of localv4 eval imatrix")
    parser.add_argument("--second-moments", type=Path, help="of the same command")
    parser.add_argument("--windows", type=int, default=40, help="of 512 tokens")
    parser.add_argument("--out", type=Path, help="JSON file to write")
    parser.add_argument("--plot", type=Path, help="picture to write (needs matplotlib)")
    parser.add_argument("--scratch", type=Path, help="folder for the models, which are removed")
    return parser


def _statistics(recipe: str, imatrix: Path | None, moments: Path | None) -> list[Files]:
    """Return with which files a recipe is measured: the options of `localv4 quantize`."""
    own = {"--imatrix": imatrix} if imatrix is not None else {}
    both = [own | {"--second-moments": moments}] if moments is not None else []
    if recipe == "mixed":
        return [own, *both] if own else []
    if recipe in ("lossless", "q8"):
        return [{}]
    return [{}, *([own] if own else []), *both]


def _measure(
    recipe: str, files: Files, options: argparse.Namespace, folder: Path
) -> dict[str, Any]:
    """Quantize by a recipe, measure the result, and remove it."""
    arguments = ["quantize", options.model, "-o", str(folder), "--recipe", recipe, "--json", "-q"]
    plan = _localv4(*arguments, *(str(part) for pair in files.items() for part in pair))
    found = _localv4(
        *("eval", "kld", "-m", str(folder), "--base-model", options.model, "-c", "512"),
        *("-w", str(options.windows), "--floor-windows", "0", "--json", "-q"),
    )
    for file in folder.iterdir():
        file.unlink()
    divergence = found["divergence"]
    return {
        "recipe": Path(recipe).stem,
        "imatrix": "--imatrix" in files,
        "feedback": "--second-moments" in files,
        "bytes": plan["bytes"],
        "bytes_per_token": plan["bytes_per_token"],
        "weight_error": plan["error"],
        "perplexity": divergence["perplexity"],
        "base_perplexity": divergence["base_perplexity"]["value"],
        "perplexity_ratio": divergence["perplexity_ratio"],
        "divergence": divergence["mean"],
        "same_top": divergence["same_top"],
        "tokens": divergence["tokens"],
    }


def _localv4(*arguments: str) -> dict[str, Any]:
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    }
    done = subprocess.run(  # noqa: S603 - our own program
        [sys.executable, "-m", "localv4", *arguments],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        sys.exit(f"localv4 {' '.join(arguments)}\n{done.stderr}")
    document: dict[str, Any] = json.loads(done.stdout)
    return document


def table(rows: list[dict[str, Any]]) -> str:
    """Return the results as a table in Markdown."""
    lines = [
        "| recipe | imatrix | feedback | size | per token | weight error | perplexity "
        "| against source | KL divergence | same token |",
        "|---|---|---|---|---|---|---|---|---|---|",
        *(_line(row) for row in rows),
    ]
    return "\n".join(lines) + "\n"


def _line(row: dict[str, Any]) -> str:
    ratio, divergence = row["perplexity_ratio"], row["divergence"]
    cells = (
        row["recipe"],
        "yes" if row["imatrix"] else "",
        "yes" if row["feedback"] else "",
        f"{row['bytes'] / 1e6:.1f} MB",
        f"{row['bytes_per_token'] / 1e6:.2f} MB",
        f"{100 * row['weight_error']:.1f} %",
        f"{row['perplexity']['value']:.2f}",
        f"{100 * (ratio['value'] - 1):+.2f} ± {100 * ratio['standard_error']:.2f} %",
        f"{divergence['value']:.4f} ± {divergence['standard_error']:.4f}",
        f"{100 * row['same_top']['value']:.1f} %",
    )
    return "| " + " | ".join(cells) + " |"


_STYLES = {
    (False, False): ("o", "no statistics"),
    (True, False): ("s", "importance matrix"),
    (False, True): ("v", "second moments"),
    (True, True): ("^", "importance matrix and second moments"),
}


def _plot(rows: list[dict[str, Any]], path: Path) -> None:
    """Draw divergence against bytes per token."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.subplots()
    for kind, style in _STYLES.items():
        own = [row for row in rows if (row["imatrix"], row["feedback"]) == kind]
        if own:
            axes.errorbar(
                *zip(*map(_place, own), strict=True),
                yerr=[row["divergence"]["standard_error"] for row in own],
                fmt=style[0],
                label=style[1],
            )
    # statistics move a recipe by little: the uppermost of its points bears the name
    for row in {row["recipe"]: row for row in sorted(rows, key=_place)}.values():
        axes.annotate(row["recipe"], _place(row), (6, 4), textcoords="offset points")
    least = min(row["divergence"]["value"] for row in rows if row["divergence"]["value"] > 0)
    axes.set_yscale("symlog", linthresh=least)
    axes.margins(x=0.1)
    axes.set(xlabel="MB read per token", ylabel="mean KL divergence, nats")
    axes.grid(visible=True, alpha=0.3)
    axes.legend()
    figure.savefig(path)


def _place(row: dict[str, Any]) -> tuple[float, float]:
    """Return where a row stands in the picture."""
    return row["bytes_per_token"] / 1e6, row["divergence"]["value"]


if __name__ == "__main__":
    main()
