#!/usr/bin/env python3
"""Predict the speed of a model with several budgets of memory, measure it, and print the errors.

  measure_forecast.py -o table.md            # resident in two ways, and five shares of the experts
  measure_forecast.py MODEL --shares 100,60,30 --threads 1 --io buffered -o table.md

MODEL is any folder or file that localv4 opens, for instance one of make_synthetic_model.py. Without
it two layers of Flash's shape (7 GB) are made in --scratch, and removed in the end; all takes about
seven minutes on two cores. This machine is measured anew first (roofs, disk, kernels); it has to be
idle all the while. Which experts tokens choose is counted in a run of its own, as `usage` of
earlier sessions would tell it. Each configuration then decodes tokens until its cache has settled,
and is timed over the next ones.
"""

import argparse
import math
import os
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
import synthetic_packed
from numpy.typing import NDArray
from synthetic_network import NETWORKS

from localv4.engine.benchmark import trace
from localv4.engine.engine import Engine
from localv4.engine.memory import MemoryOptions
from localv4.engine.setup import Setup
from localv4.model.fast import FastTransformer
from localv4.planning.forecast import PROMPT_TOKENS, Forecast, make_forecast
from localv4.planning.header_facts import facts_of_checkpoint
from localv4.planning.hit_rate import CountedRouting
from localv4.planning.machine import Machine
from localv4.planning.measuring import Wanted, measured_machine
from localv4.planning.model_facts import ModelFacts
from localv4.planning.plan import Io, Plan, fixed_memory
from localv4.planning.recipes import load_recipes
from localv4.storage import open_checkpoint

CTX_SIZE = 4096
LIMITS = {"resident": 0.15, "paged": 0.25}
"""Largest errors that are promised."""


@dataclass(frozen=True, slots=True)
class Case:
    """One configuration: `share` of the experts may be in memory."""

    share: float
    io: Io


@dataclass(frozen=True, slots=True)
class Row:
    """What was predicted and achieved for a configuration, in tokens per second."""

    case: Case
    plan: Plan
    forecast: Forecast
    achieved: float
    missed_bytes: float
    prompt: float

    @property
    def error(self) -> float:
        """Of the prediction, as a part of what was achieved."""
        return self.forecast.decode.likely / self.achieved - 1

    @property
    def holds(self) -> bool:
        """Whether the error is within its limit."""
        return abs(self.error) <= LIMITS["resident" if self.plan.fits else "paged"]


def main() -> None:
    """Read the command line, measure, print a Markdown table."""
    options = _parser().parse_args()
    with ExitStack() as stack:
        if options.model is None:
            options.model = _make_model(stack, options.scratch)
        holds = _measure_all(options)
    sys.exit(0 if holds else 1)


def _make_model(stack: ExitStack, scratch: Path) -> Path:
    """Write two layers of Flash's shape to a folder that ends with the stack."""
    folder = stack.enter_context(TemporaryDirectory(prefix="forecast-", dir=scratch))
    types = synthetic_packed.DEFAULT_TYPES | dict.fromkeys(
        ("attention", "indexer", "shared", "head"), "Q8"
    )
    network = replace(NETWORKS["flash"], ratios=(4, 128), hashed=0, vocab=8192, skew=0.3)
    path = Path(folder) / "slice"
    jobs = os.cpu_count() or 1
    _say("making a model of 7 GB")
    synthetic_packed.write_packed(network, types, path, 1, jobs, lambda name, nbytes: None)
    return path


def _measure_all(options: argparse.Namespace) -> bool:
    """Measure all configurations and print the table; say whether all errors are within limits."""
    with open_checkpoint(options.model) as checkpoint:
        facts = facts_of_checkpoint(options.model.name, "", checkpoint)
    _say("measuring the machine")
    recipes = load_recipes().by_name
    wanted = Wanted(
        options.model,
        facts.largest_expert_bytes,
        (facts.config, recipes.get(facts.quant, recipes["lossless"])),
        anew=not options.keep_profile,
    )
    machine = measured_machine(wanted, _say)
    _say("counting which experts are chosen")
    routing = CountedRouting(_count_uses(options.model, options.warm, options.threads))
    rows = []
    for case in _cases(options.shares, options.io):
        rows.append(_measure(case, facts, machine, routing, options))
        _say(_line(rows[-1]))
    text = _table(rows, machine)
    sys.stdout.write(f"{text}\n")
    if options.out is not None:
        options.out.write_text(text + "\n", encoding="utf-8")
    return all(row.holds for row in rows)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", type=Path, nargs="?")
    parser.add_argument("--scratch", type=Path, default=Path(), help="where a model is made")
    parser.add_argument("--shares", default="100,75,50,34,20,12", help="percent of the experts")
    parser.add_argument("--io", default="direct", choices=["direct", "buffered"])
    parser.add_argument("--warm", type=int, default=200, help="tokens before the timed ones")
    parser.add_argument("--tokens", type=int, default=100, help="timed tokens")
    parser.add_argument("--threads", type=int, help="default: all performance cores")
    parser.add_argument("--keep-profile", action="store_true", help="do not measure anew")
    parser.add_argument("-o", "--out", type=Path, help="also write the table to a file")
    return parser


def _cases(shares: str, io: Io) -> Iterator[Case]:
    """Yield the configurations: what fits is read both mapped and into memory."""
    for text in shares.split(","):
        share = float(text) / 100
        if share >= 1:
            yield Case(1.0, "auto")
        yield Case(min(share, 1.0), io)


class Decoder:
    """A loaded model that decodes the tokens of the trace, one after the other."""

    def __init__(self, path: Path, memory: MemoryOptions, threads: int | None) -> None:
        self.engine = Engine.load(path, Setup(ctx_size=CTX_SIZE, threads=threads, memory=memory))
        network = self.engine.network
        if not isinstance(network, FastTransformer):
            sys.exit(f"error: {path} has dimensions that the fast kernels do not know")
        self.network = network
        self._session = self.engine.new_session()
        self._done = 0

    def decode(self, count: int) -> float:
        """Decode the next tokens; return the seconds."""
        ids = trace(self.engine.config.vocab_size, self._done + count)[self._done :]
        start = time.perf_counter()
        for token in ids:
            self._session.extend([token])
        self._done += count
        return time.perf_counter() - start

    def read_prompt(self, count: int) -> float:
        """Read a prompt of `count` tokens twice; return the seconds of the second time."""
        ids = trace(self.engine.config.vocab_size, count)
        seconds = 0.0
        for _ in range(2):
            session = self.engine.new_session()
            start = time.perf_counter()
            session.extend(ids)
            seconds = time.perf_counter() - start
        return seconds

    @property
    def bytes_read(self) -> int:
        """What tokens lacked so far, in bytes of experts."""
        counts = getattr(self.network.store, "counts", None)  # mapped ones count nothing
        if counts is None:
            return 0
        right = counts.guesses_used / max(1, counts.guesses)
        return counts.bytes["demand"] + round(right * counts.bytes["guess"])


def _count_uses(path: Path, tokens: int, threads: int | None) -> NDArray[np.float32]:
    """Return how often each expert (layers, experts) is chosen for the tokens of the trace."""
    decoder = Decoder(path, MemoryOptions(), threads)
    uses = decoder.network.store.uses
    uses.half_life = math.inf
    decoder.decode(tokens)
    counts: NDArray[np.float32] = uses.scores().copy()
    decoder.network.close()
    return counts


def _measure(
    case: Case,
    facts: ModelFacts,
    machine: Machine,
    routing: CountedRouting,
    options: argparse.Namespace,
) -> Row:
    threads = options.threads or machine.cores
    fixed = sum(fixed_memory(facts, CTX_SIZE, threads).values())
    ram = fixed + math.ceil(case.share * facts.all_expert_bytes)
    decoder = Decoder(options.model, MemoryOptions(ram=ram, io=case.io), options.threads)
    plan = decoder.engine.plan
    assert plan is not None
    forecast = make_forecast(facts, plan, machine, routing=routing, position=options.warm)
    decoder.decode(options.warm)
    before = decoder.bytes_read
    seconds = decoder.decode(options.tokens)
    missed = (decoder.bytes_read - before) / options.tokens
    prompt_s = decoder.read_prompt(PROMPT_TOKENS)
    decoder.network.close()
    return Row(case, plan, forecast, options.tokens / seconds, missed, PROMPT_TOKENS / prompt_s)


def _line(row: Row) -> str:
    return (
        f"{100 * row.case.share:.0f} % {row.case.io}: predicted {row.forecast.decode.likely:.2f}, "
        f"achieved {row.achieved:.2f} tokens/s, error {100 * row.error:+.0f} %"
    )


def _table(rows: Sequence[Row], machine: Machine) -> str:
    """Return the results as Markdown."""
    assert machine.read_bytes_s is not None
    disk = f"{machine.disk.bytes_s / 1e9:.2f} GB/s" if machine.disk is not None else "none"
    lines = [
        f"Read roof {machine.read_bytes_s / 1e9:.1f} GB/s, disk {disk}, {machine.cores} cores.",
        "",
        "| experts in memory | mode | tok/s predicted | achieved | error | MB missed, predicted "
        "| achieved | prompt tok/s predicted | achieved | error |",
        "|--:|---|--:|--:|--:|--:|--:|--:|--:|--:|",
    ]
    for row in rows:
        lines.append(
            f"| {100 * row.plan.resident_share:.0f} % | {row.plan.mode} "
            f"| {row.forecast.decode.likely:.2f} | {row.achieved:.2f} | {100 * row.error:+.0f} % "
            f"| {row.forecast.missed_bytes / 1e6:.1f} | {row.missed_bytes / 1e6:.1f} "
            f"| {row.forecast.prefill.likely:.0f} | {row.prompt:.0f} "
            f"| {100 * (row.forecast.prefill.likely / row.prompt - 1):+.0f} % |"
        )
    return "\n".join(lines)


def _say(text: str) -> None:
    sys.stderr.write(f"{text}\n")


if __name__ == "__main__":
    main()
