#!/usr/bin/env python3
"""Measure a model that pages its experts: speed against its bound, memory against its budget.

    measure_paging.py MODEL --ram 14GiB,20GiB --io direct,map --tokens 200 --prompt 1920

Each way runs in a process of its own, in turns. Tokens are random, so that routing does not fall
into a loop; a synthetic model made with `--skew 0.3` prefers some experts as trained ones do. The
bound of decoding is the larger of two times: all bytes that a token reads at the read bandwidth of
memory, and the bytes that it lacks at the speed of random reads of the disk, both measured here.
"""

import argparse
import json
import statistics
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np

from localv4.engine.setup import Setup
from localv4.paging.look_ahead import TURN_TOKENS, TURNS

SAMPLE_S = 0.01
SETTLING = len(TURNS) * TURN_TOKENS + 1
"""Tokens after memory is full in which it is decided whether guesses pay, which are not timed."""

MOST_WARM_UP = 400
"""Tokens that fill the memory before any is timed: its first touch costs the system much."""


def main() -> None:
    """Measure all ways, or one of them in a child process."""
    options = _parser().parse_args()
    if options.child:
        sys.stdout.write(json.dumps(_measure(options)))
        return
    rows: list[dict[str, Any]] = []
    for turn in range(options.rounds):
        for ram in options.ram.split(","):
            for io in options.io.split(","):
                row = _in_child(options, ram, io)
                rows.append(row)
                sys.stderr.write(f"{turn + 1}: {_line(row)}\n")
    sys.stdout.write(f"{_table(rows)}\n")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", type=Path)
    parser.add_argument("--ram", default="14GiB", help="budgets, with commas between them")
    parser.add_argument("--io", default="direct", help="direct, buffered, map, with commas")
    parser.add_argument("--tokens", type=int, default=200, help="decoded and timed")
    parser.add_argument("--prompt", type=int, default=0, help="tokens of a prompt, timed apart")
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--threads", type=int)
    parser.add_argument("--policy", default="decay")
    parser.add_argument("--no-prefetch", action="store_true")
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    return parser


def _in_child(options: argparse.Namespace, ram: str, io: str) -> dict[str, Any]:
    command = [sys.executable, __file__, str(options.model), "--child", "--ram", ram, "--io", io]
    command += ["--tokens", str(options.tokens), "--prompt", str(options.prompt)]
    command += ["--policy", options.policy]
    command += ["--threads", str(options.threads)] if options.threads else []
    command += ["--no-prefetch"] if options.no_prefetch else []
    done = subprocess.run(command, stdout=subprocess.PIPE, check=True)  # noqa: S603
    row: dict[str, Any] = json.loads(done.stdout)
    return row


class _Memory:
    """The most memory that this process has held, looked at every SAMPLE_S."""

    def __init__(self) -> None:
        self.peak = 0
        self._stop = threading.Event()
        threading.Thread(target=self._look, daemon=True).start()

    def _look(self) -> None:
        page = 4096
        while not self._stop.wait(SAMPLE_S):
            held = int(Path("/proc/self/statm").read_text().split()[1]) * page
            self.peak = max(self.peak, held)


def _measure(options: argparse.Namespace) -> dict[str, Any]:
    """Measure one way in this process."""
    from localv4.cli.sizes import parse_bytes
    from localv4.engine.engine import Engine
    from localv4.engine.memory import MemoryOptions
    from localv4.engine.paging_stats import PagingMeter
    from localv4.paging.probe import measure_disk
    from localv4.planning.roofs import RoofProbe

    budget = parse_bytes(options.ram, "--ram")
    record = 13_369_344
    disk = measure_disk(options.model, record, 8, 4.0)
    roof_probe = RoofProbe(options.threads or _threads(), 1 << 30)
    roof = roof_probe.measure()
    del roof_probe
    memory = _Memory()
    wishes = MemoryOptions(
        ram=budget,
        io=options.io,
        policy=options.policy,
        prefetch=not options.no_prefetch,
    )
    start = time.perf_counter()
    engine = Engine.load(options.model, Setup(threads=options.threads, memory=wishes))
    load_s = time.perf_counter() - start
    session, vocab = engine.new_session(), engine.config.vocab_size
    tokens = np.random.default_rng(11).integers(
        0, vocab, options.prompt + options.tokens + MOST_WARM_UP
    )
    result: dict[str, Any] = {"ram": options.ram, "io": options.io, "load_s": load_s}
    if options.prompt:
        start = time.perf_counter()
        session.extend(tokens[: options.prompt].tolist())
        result["prompt_tok_s"] = options.prompt / (time.perf_counter() - start)
    rest = tokens[options.prompt :].tolist()
    warm_up = 0
    settled = 0  # tokens since memory was full
    while warm_up < MOST_WARM_UP and settled < SETTLING:
        session.extend([rest[warm_up]])
        warm_up += 1
        settled += settled > 0 or _is_full(engine)
    meter, times = PagingMeter(engine.network), []
    for token in rest[warm_up : warm_up + options.tokens]:
        start = time.perf_counter()
        session.extend([token])
        times.append(time.perf_counter() - start)
    result |= {"tok_s": len(times) / sum(times), "median_ms": 1e3 * statistics.median(times)}
    after = measure_disk(options.model, record, 8, 4.0)
    result |= {"peak": memory.peak, "budget": budget, "read_gb_s": roof.read_bytes_s / 1e9}
    result["disk_gb_s"] = max(disk.bytes_s, after.bytes_s) / 1e9
    paging, facts = meter.stats(), engine.facts
    assert facts is not None
    memory_s = facts.weight_bytes_per_token / roof.read_bytes_s
    result["memory_ms"] = 1e3 * memory_s
    if paging is not None:
        result |= _of_bound(paging, result, memory_s, len(times))
    return result


def _of_bound(
    paging: Any, result: dict[str, Any], memory_s: float, tokens: int
) -> dict[str, float]:
    """Return what paging did, and the share of the bound that was reached.

    Wrong guesses are read beyond what a token lacks, so they do not raise the bound.
    """
    counts = paging.counts
    read = sum(counts.bytes.values()) / tokens
    wrong = counts.bytes["guess"] * (1 - counts.guesses_used / max(1, counts.guesses)) / tokens
    disk_s = (read - wrong) / (result["disk_gb_s"] * 1e9)
    return {
        "disk_ms": 1e3 * disk_s,
        "hits": paging.hit_rate,
        "mb_per_token": read / 1e6,
        "bound_share": max(memory_s, disk_s) * result["tok_s"],
        "reader_gb_s": paging.reads.bytes_s / 1e9,
        "core_s_per_gb": paging.reads.core_s_per_gb,
        "wait_ms": 1e3 * counts.wait_s / tokens,
    }


def _is_full(engine: Any) -> bool:
    """Say whether an arena has no free place left and nothing is on its way, or there is none."""
    store = engine.network.store
    if not hasattr(store, "arena"):
        return True
    return store.arena.used > 0.98 * store.arena.capacity and store.readers.is_idle


def _threads() -> int:
    from localv4.kernels.threads import default_threads

    return default_threads()


COLUMNS = (
    ("ram", "RAM", "{}"),
    ("io", "io", "{}"),
    ("tok_s", "tok/s", "{:.2f}"),
    ("prompt_tok_s", "prompt tok/s", "{:.1f}"),
    ("hits", "hits", "{:.1%}"),
    ("mb_per_token", "MB read/token", "{:.0f}"),
    ("memory_ms", "memory bound ms", "{:.0f}"),
    ("disk_ms", "disk bound ms", "{:.0f}"),
    ("bound_share", "of the bound", "{:.0%}"),
    ("reader_gb_s", "reads GB/s", "{:.2f}"),
    ("disk_gb_s", "disk GB/s", "{:.2f}"),
    ("core_s_per_gb", "core-s/GB", "{:.3f}"),
    ("wait_ms", "waited ms", "{:.0f}"),
    ("peak", "peak RSS of the budget", "{:.1%}"),
)


def _cells(row: dict[str, Any]) -> list[str]:
    shown = dict(row, peak=row["peak"] / row["budget"])
    return [form.format(shown[key]) if key in shown else "" for key, _, form in COLUMNS]


def _line(row: dict[str, Any]) -> str:
    named = zip(COLUMNS, _cells(row), strict=True)
    return ", ".join(f"{title} {cell}" for (_, title, _), cell in named if cell)


def _table(rows: list[dict[str, Any]]) -> str:
    lines = ["| " + " | ".join(title for _, title, _ in COLUMNS) + " |"]
    lines.append("|" + "---|" * len(COLUMNS))
    lines += ["| " + " | ".join(_cells(row)) + " |" for row in rows]
    return "\n".join(lines)


if __name__ == "__main__":
    main()
