"""Kill a batch at one moment after the other, let it go on each time, and look at every row.

    python batch_crash_loop.py SCRATCH KILLS [SEED]

The built-in model answers ROWS prompts. Moments are: before a step of the batcher, before a write
to the output (one of a few bytes: most cut a row) and before its fsync. With a SEED the moments are
random, and every third kill comes from outside at a random time, while the model loads, too; else
KILLS moments are spread over a run. A run that was killed is followed by the next, killed again if
any are left, until one ends by itself: before its moment came there was nothing left to do. That is
a round. After each kill the output must hold whole rows that an undisturbed run has
written, each once, and at most one that is cut; after a round all of them. Prints how many kills
and rounds there were, and where they hit.

Each run is a fork of this process, which has the compiled code in memory and no other threads.
"""

import json
import os
import random
import signal
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from localv4.cli.main import main as run_command
from localv4.engine import batch_results
from localv4.engine.batching import Batcher
from localv4.kernels.compiler import compile_kernels
from localv4.library.installed import embedded_model_path
from localv4.model.loading import read_model_config, read_names, read_weights
from localv4.model.packing import families
from localv4.planning.model_facts import DEFAULT_ROWS
from localv4.storage import open_checkpoint

WRITTEN_BYTES = 300
"""Bytes of one write: a row takes two or three."""

QUESTIONS = (
    "What is the capital of France?",
    "What is 148 + 276?",
    "My name is Anna. What is my name?",
    "What is the opposite of hot?",
    "What is the capital of Spain?",
    "Count from one to five.",
)
ROWS = [
    {"custom_id": f"row-{index}", "prompt": question, "max_tokens": 24}
    for index, question in enumerate(QUESTIONS)
] + [{"custom_id": "long", "prompt": "Once upon a time", "max_tokens": 60}, {"custom_id": "bad"}]

ROWS_FAILED = 3

Moment = Callable[[str], None]


class CutFile:
    """A file that takes a few bytes at a time, and tells before each of them."""

    def __init__(self, file: Any, before: Moment) -> None:
        self._file, self._before = file, before

    def write(self, data: memoryview) -> int:
        """Write the beginning of the data."""
        self._before("write")
        written: int = self._file.write(data[:WRITTEN_BYTES])
        return written

    def __getattr__(self, name: str) -> Any:
        return getattr(self._file, name)


def watch(before: Moment) -> None:
    """Call `before` ahead of every moment of the batch that this process runs."""
    step, begin, sync = Batcher.step, batch_results.ResultFile.__init__, os.fsync

    def watched_step(batcher: Batcher) -> Any:
        before("step")
        return step(batcher)

    def watched_begin(self: Any, *arguments: Any, **options: Any) -> None:
        begin(self, *arguments, **options)
        self._file = CutFile(self._file, before)

    def watched_sync(handle: int) -> None:
        before("fsync")
        sync(handle)

    Batcher.step = watched_step  # type: ignore[method-assign]
    batch_results.ResultFile.__init__ = watched_begin  # type: ignore[method-assign]
    os.fsync = watched_sync


def run(folder: Path, before: Moment, patience_s: float | None) -> int | None:
    """Run the batch in a fork; return its exit code, None if it was killed.

    After `patience_s` seconds it is killed from outside.
    """
    child = os.fork()
    if child == 0:
        silence = os.open(os.devnull, os.O_RDWR)
        for stream in range(3):
            os.dup2(silence, stream)
        watch(before)
        paths = ("-i", str(folder / "in.jsonl"), "-o", str(folder / "out.jsonl"))
        sys.argv = ["localv4", "batch", "-m", "tiny-v4", "--greedy", "-t", "1", *paths]
        try:
            run_command()
        except SystemExit as ended:
            os._exit(ended.code if isinstance(ended.code, int) else 1)
        os._exit(1)
    if patience_s is not None:
        time.sleep(patience_s)
        os.kill(child, signal.SIGKILL)
    _, status = os.waitpid(child, 0)
    return None if os.WIFSIGNALED(status) else os.waitstatus_to_exitcode(status)


def killing(number: int, hits: Path) -> Moment:
    """Return what kills this process before its moment `number`, noting which kind it is."""
    left = number

    def before(kind: str) -> None:
        nonlocal left
        left -= 1
        if left == 0:
            hits.write_text(kind, "ascii")
            os.kill(os.getpid(), signal.SIGKILL)

    return before


def counting(folder: Path) -> Moment:
    """Return what counts the moments of a run in a file."""
    counts = folder / "moments"

    def before(kind: str) -> None:
        with counts.open("a", encoding="ascii") as file:
            file.write(f"{kind}\n")

    return before


def look(folder: Path, expected: frozenset[bytes], *, is_whole: bool) -> None:
    """Compare the output with the rows of a run that nothing stopped; leave if it differs."""
    output = folder / "out.jsonl"
    data = output.read_bytes() if output.exists() else b""
    *rows, cut = data.split(b"\n")
    ids = [json.loads(row)["custom_id"] for row in rows]
    if len(set(ids)) < len(ids) or not expected.issuperset(rows):
        sys.exit(f"other rows than without a stop: {sorted(ids)}")
    if cut and not any(row.startswith(cut) for row in expected):
        sys.exit(f"the end is no beginning of a row: {cut[:80]!r}")
    if is_whole and (cut or len(ids) < len(expected)):
        sys.exit(f"rows are missing: there are {sorted(ids)}")


def chosen_moments(kills: int, moments: int, seed: int | None) -> Iterator[tuple[int, bool]]:
    """Yield the number of the moment of each kill, and whether it is one from outside."""
    if seed is None:
        for index in range(kills):
            yield 1 + index * (moments - 1) // max(1, kills - 1), False
        return
    rng = random.Random(seed)
    for index in range(kills):
        yield rng.randint(1, moments), index % 3 == 2


def prepare(folder: Path) -> tuple[frozenset[bytes], int, float]:
    """Answer all rows without a stop; return them, the moments and the seconds that took."""
    with open_checkpoint(embedded_model_path()) as checkpoint:
        table = read_names(checkpoint)
        config = read_model_config(checkpoint, table)
        weights = read_weights(checkpoint, table, config, lambda *_: None)
        compile_kernels(families(weights) | {DEFAULT_ROWS.family}, None)
    folder.mkdir(parents=True)
    (folder / "in.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in ROWS), "utf-8")
    start = time.monotonic()
    if run(folder, counting(folder), None) != ROWS_FAILED:
        sys.exit("the batch does not end as it should")
    seconds = time.monotonic() - start
    rows = (folder / "out.jsonl").read_bytes().splitlines()
    if len(rows) != len(ROWS):
        sys.exit("an undisturbed run lacks rows")
    (folder / "out.jsonl").unlink()
    return frozenset(rows), len((folder / "moments").read_text("ascii").split()), seconds


def main() -> None:
    """Make all kills."""
    folder, kills = Path(sys.argv[1]) / "batch", int(sys.argv[2])
    os.environ["LOCALV4_HOME"] = str(folder / "home")
    seed = int(sys.argv[3]) if len(sys.argv) > 3 else None
    expected, moments, seconds = prepare(folder)
    hits: Counter[str] = Counter()
    rng, rounds, hit = random.Random(seed), 0, folder / "hit"
    for number, is_outside in chosen_moments(kills, moments, seed):
        hit.write_text("outside", "ascii")
        patience = rng.uniform(0.0, seconds) if is_outside else None
        never = len(expected) * moments
        ended = run(folder, killing(never if is_outside else number, hit), patience)
        if ended not in (None, ROWS_FAILED):
            sys.exit(f"the batch ended with {ended}")
        look(folder, expected, is_whole=ended is not None)
        if ended is None:
            hits[hit.read_text("ascii")] += 1
        else:  # less was left to do than there are moments
            rounds += 1
            (folder / "out.jsonl").unlink()
    if run(folder, lambda _: None, None) != ROWS_FAILED:
        sys.exit("the last run does not end as it should")
    look(folder, expected, is_whole=True)
    print(f"{hits.total()} kills, {rounds + 1} rounds of {moments} moments: {dict(hits)}")


if __name__ == "__main__":
    main()
