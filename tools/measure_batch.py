#!/usr/bin/env python3
"""Measure how many tokens a second several rows decode together: one row against 4, 16, 64.

Examples:
  measure_batch.py MODEL                               a packed folder, a checkpoint or a GGUF file
  measure_batch.py slice.gguf --peer venv/bin/python   and llama.cpp, with the same file and tokens
  measure_batch.py MODEL --rows 1,2,4,8 --depth 1024 --steps 16

Each row begins with --depth tokens of its own and then takes random tokens, so that rows choose
experts as different texts do; the logits of every row are computed. llama.cpp decodes the same
tokens, one of each sequence in one llama_decode. Rounds are interleaved; the table has medians of
tokens a second of all rows together, and what they are against one row. It also checks that a row
has the same logits in company as alone. A synthetic slice with the dimensions of Flash comes from
tools/make_synthetic_model.py.
"""

import argparse
import json
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import IO

import numpy as np
from numpy.typing import NDArray

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from localv4.engine.engine import Engine
from localv4.engine.session import Session
from localv4.engine.setup import Setup

PEER = Path(__file__).with_name("batch_peer.py")
FIRST_FREE_ID = 16
Steps = NDArray[np.int64]


def main() -> None:
    """Read the command line, measure, print a table."""
    options = _parser().parse_args()
    counts = [int(count) for count in options.rows.split(",")]
    engine = Engine.load(options.model, Setup(threads=options.threads))
    bench = Bench(engine, options.depth, max(counts))
    peer = Peer(options, engine.network.threads) if options.peer else None
    ours: dict[int, list[float]] = {count: [] for count in counts}
    theirs: dict[int, list[float]] = {count: [] for count in counts}
    for turn in range(options.rounds):
        for count in counts:
            steps = _random_steps(engine, count, options.steps + 1, turn)
            ours[count].append(_rate(steps, bench.time(steps)))
            if peer is not None:
                theirs[count].append(_rate(steps, peer.time(steps)))
            sys.stderr.write(f"round {turn + 1}, {count} rows: {ours[count][-1]:.2f} tok/s\n")
    bench.check(min(4, max(counts)))
    _print(ours, theirs if peer is not None else None)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", type=Path)
    parser.add_argument("--rows", default="1,4,16,64", help="numbers of rows")
    parser.add_argument("--steps", type=int, default=12, help="tokens of each row that are timed")
    parser.add_argument("--depth", type=int, default=64, help="tokens of each row before them")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int)
    parser.add_argument("--peer", help="an interpreter that has llama-cpp-python")
    parser.add_argument("--gguf", type=Path, help="what llama.cpp loads; default: the model")
    return parser


def _random_steps(engine: Engine, rows: int, steps: int, seed: int) -> Steps:
    """Return token ids (steps, rows)."""
    random, vocab = np.random.default_rng(seed), engine.config.vocab_size
    return random.integers(FIRST_FREE_ID, vocab, (steps, rows), np.int64)


def _rate(steps: Steps, seconds: float) -> float:
    """Return tokens per second; the first step is not timed."""
    return float((len(steps) - 1) * steps.shape[1] / seconds)


class Bench:
    """Sequences of one engine at a depth, from which every measurement starts anew."""

    def __init__(self, engine: Engine, depth: int, rows: int) -> None:
        self._engine = engine
        self._starts = [engine.new_session() for _ in range(rows)]
        for row, session in enumerate(self._starts):
            session.extend([FIRST_FREE_ID + row] * depth)

    def time(self, steps: Steps) -> float:
        """Decode a token of each row per step; return the seconds of all steps but the first."""
        sessions = [session.fork() for session in self._starts[: steps.shape[1]]]
        start = 0.0
        for step, tokens in enumerate(steps):
            if step == 1:
                start = time.perf_counter()
            self._logits(sessions, tokens)
        return time.perf_counter() - start

    def check(self, rows: int) -> None:
        """Compare the logits of rows in company with those that each has alone."""
        (tokens,) = _random_steps(self._engine, rows, 1, 99)
        together = self._logits([session.fork() for session in self._starts[:rows]], tokens)
        for row, token in enumerate(tokens):
            alone = self._starts[row].fork().extend([int(token)])
            if not np.array_equal(alone, together[row]):
                raise SystemExit(f"row {row} has other logits in company than alone")

    def _logits(self, sessions: list[Session], tokens: NDArray[np.int64]) -> NDArray[np.float32]:
        network = self._engine.network
        vectors = network.decode_rows(tokens, [session.state for session in sessions])
        return network.logits(vectors)


class Peer:
    """llama.cpp in a process of its own."""

    def __init__(self, options: argparse.Namespace, threads: int) -> None:
        path = str(options.gguf or options.model)
        self._process = subprocess.Popen(  # noqa: S603 - the interpreter that the user named
            [options.peer, str(PEER), path, str(threads), str(options.depth)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )

    def time(self, steps: Steps) -> float:
        """Return the seconds that llama.cpp needs for the steps after the first."""
        _pipe(self._process.stdin).write(json.dumps({"tokens": steps.tolist()}) + "\n")
        _pipe(self._process.stdin).flush()
        line = _pipe(self._process.stdout).readline()
        if not line:
            raise SystemExit(f"llama.cpp ended with exit code {self._process.wait()}")
        return float(json.loads(line)["seconds"])


def _pipe(stream: IO[str] | None) -> IO[str]:
    assert stream is not None
    return stream


def _print(ours: dict[int, list[float]], theirs: dict[int, list[float]] | None) -> None:
    """Print medians as a table in Markdown."""
    peer_head = " llama.cpp tok/s | against it |" if theirs is not None else ""
    print(f"| rows | tok/s | against one row |{peer_head}")  # noqa: T201
    print("|---|---|---|" + ("---|---|" if theirs is not None else ""))  # noqa: T201
    first = statistics.median(next(iter(ours.values())))
    for count, rates in ours.items():
        rate = statistics.median(rates)
        line = f"| {count} | {rate:.2f} | {rate / first:.2f} x |"
        if theirs is not None:
            peer = statistics.median(theirs[count])
            line += f" {peer:.2f} | {rate / peer:.2f} x |"
        print(line)  # noqa: T201


if __name__ == "__main__":
    main()
