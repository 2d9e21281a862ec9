#!/usr/bin/env python3
"""Write a model at true dimensions with random but sane weights, for measurements.

Examples:
  make_synthetic_model.py OUT --model flash
  make_synthetic_model.py OUT --model pro --layers 4 --types experts=Q4,head=Q8
  make_synthetic_model.py OUT --layers 4 --types experts=IQ2+Q2,attention=Q8,indexer=Q8,shared=Q8
  make_synthetic_model.py OUT.gguf --format gguf --layers 4 --types gate_up=IQ2_XXS,down=Q2_K
  make_synthetic_model.py OUT --format official --layers 4

Roles for --types are those of the table DEFAULT_TYPES of the format's module.

A slice of five layers or more has the first layers of the release; a shorter one has one layer of
each kind in turn, the first of them routed by token id. `--ratios 0,4,128` chooses them one by one.
"""

import argparse
import os
import sys
import time
from dataclasses import replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import synthetic_gguf
import synthetic_official
import synthetic_packed
from synthetic_network import NETWORKS, Network, sliced

LEAST_VOCAB = 512


def main() -> None:
    """Read the command line and write the model."""
    options = _parser().parse_args()
    network = _network(options)
    start, total = time.monotonic(), 0

    def progress(name: str, nbytes: int) -> None:
        nonlocal total
        total += nbytes
        seconds = time.monotonic() - start
        sys.stderr.write(f"{name}: {total / 1e9:.1f} GB, {total / 1e9 / seconds:.2f} GB/s\n")

    common = (options.out, options.seed, options.jobs, progress)
    try:
        if options.format == "packed":
            types = _types(options.types, synthetic_packed.DEFAULT_TYPES)
            synthetic_packed.write_packed(network, types, *common)
        elif options.format == "gguf":
            types = _types(options.types, synthetic_gguf.DEFAULT_TYPES)
            synthetic_gguf.write_gguf(network, types, *common)
        else:
            _types(options.types, {})
            synthetic_official.write_official(network, *common)
    except ValueError as error:
        sys.exit(f"error: {error}")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("out", type=Path, help="the folder, or the GGUF file, to write")
    parser.add_argument("--model", choices=NETWORKS, default="flash")
    parser.add_argument("--format", choices=["packed", "gguf", "official"], default="packed")
    parser.add_argument("--layers", type=int, help="default: all")
    parser.add_argument("--ratios", help="instead of --layers: 0, 4 or 128 for each layer")
    parser.add_argument("--hash", type=int, help="how many layers route by token id")
    parser.add_argument("--vocab", type=int, help=f"at least {LEAST_VOCAB}")
    parser.add_argument(
        "--skew",
        type=float,
        default=0.05,
        help="spread of router biases: 0.3 "
        "and more make some experts far likelier than others, as training does",
    )
    parser.add_argument("--types", default="", help="ROLE=TYPE,... for other types of weights")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="threads")
    return parser


def _network(options: argparse.Namespace) -> Network:
    network = NETWORKS[options.model]
    if options.ratios:
        ratios, hashed = tuple(int(ratio) for ratio in options.ratios.split(",")), network.hashed
    else:
        ratios, hashed = sliced(network, options.layers or len(network.ratios))
    if options.hash is not None:
        hashed = options.hash
    vocab = options.vocab or network.vocab
    if set(ratios) - {0, 4, 128} or vocab < LEAST_VOCAB:
        sys.exit(f"error: ratios are 0, 4 and 128, the vocabulary has {LEAST_VOCAB} tokens or more")
    return replace(
        network, ratios=ratios, hashed=min(hashed, len(ratios)), vocab=vocab, skew=options.skew
    )


def _types(text: str, defaults: dict[str, str]) -> dict[str, str]:
    """Return the types by role, changed as in "experts=Q4,head=Q8"."""
    types = dict(defaults)
    for pair in filter(None, text.split(",")):
        role, _, kind = pair.partition("=")
        if role not in defaults or not kind:
            sys.exit(f"error: --types {pair}: the roles are {', '.join(defaults) or 'none'}")
        types[role] = kind
    return types


if __name__ == "__main__":
    main()
