"""Measure sessions that rewind and persist: tokens computed again, bytes on disk, speed of loading.

    python tests/measure_sessions.py [--tokens 100000] [--rows 65536] [--kv compact]

First a conversation of random tokens on the small network `wide` of the tests, in `fast`: turns of
a long document, questions and answers. One word is changed at different places, and the tokens that
have to be processed again are counted; after the last change the logits are compared with those of
a timeline that never saw anything else. Then rows of the shape of V4-Flash, filled with random
bytes, are saved and loaded through the page cache and past it. The files go to FOLDER and are
removed again.
"""

import argparse
import os
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
from networks import wide_network
from test_fast import make_fast

from localv4.engine.session import Session
from localv4.engine.session_folder import SessionFolder
from localv4.engine.session_store import SessionStore
from localv4.kernels.row_operations import FORMATS, RowFormat
from localv4.model.snapshot import restore, take_snapshot
from localv4.model.state import State
from localv4.planning.model_facts import DEFAULT_ROWS
from localv4.planning.subject import flash_network

ROUNDS = 5
"""The best of them counts: other programs only ever make it slower."""

SLACK = 256
"""Tokens beyond its window that a decoder state keeps, to go back without a snapshot."""

DOCUMENT = 20_000
QUESTION, ANSWER = 300, 60
"""Tokens of a synthetic conversation: a document first, then questions with their answers."""


def measure_rewinding(tokens: int, folder: Path) -> None:
    """Print how many tokens are computed again after a word was changed."""
    network = make_fast(wide_network(folder / "model"))
    ids = np.random.default_rng(0).integers(2, 500, tokens).tolist()
    session, start = Session(network, tokens + 1000), time.monotonic()
    for part in turns(ids):
        if len(part) == ANSWER:
            for token in part:
                session.extend([token])
        else:
            session.extend(part)
    print(f"{tokens} tokens in {time.monotonic() - start:.0f} s", end="; ")
    rungs, state = session.ladder.positions, session.state
    print(f"{len(rungs)} rungs, {session.ladder.nbytes / state.nbytes:.1%} of the state's bytes")
    store = SessionStore(SessionFolder(folder / "small", 1 << 40), "measured", print)
    store.save(session)
    whole = session.fork()
    for back in (10, 100, 400, 1_000, 5_000, 20_000, tokens - DOCUMENT // 2):
        edited = ids.copy()
        edited[tokens - back] ^= 1
        session = whole.fork()
        again = tokens - session.reuse(edited) - back
        print(f"a word changed {back} tokens before the end: {again} before it computed again")
    edited = [*ids[: tokens - 50], 7, 8, 9]
    clean = Session(network, tokens + 1000).extend(edited)
    fresh = Session(network, tokens + 1000)
    fresh.store = store
    for where, session in (("in memory", whole), ("from the disk", fresh)):
        reused = session.reuse(edited)
        logits = session.extend(edited[reused:])
        print(
            f"last words changed, {where}: {len(edited) - reused} computed, 3 of them new", end="; "
        )
        print(f"the bits of a clean run: {logits.tobytes() == clean.tobytes()}")


def turns(ids: Sequence[int]) -> Iterator[Sequence[int]]:
    """Cut ids into a document, questions and answers."""
    yield ids[:DOCUMENT]
    place = DOCUMENT
    while place < len(ids):
        for length in (QUESTION, ANSWER):
            part = ids[place : place + length]
            if part:
                yield part
            place += length


def flash_session(tokens: int, rows: RowFormat) -> Session:
    """Return a timeline with rows of the shape of V4-Flash that nobody computed."""
    rng = np.random.default_rng(0)
    state = State(flash_network(), SLACK, rows)
    session = Session(SimpleNamespace(new_state=lambda: state), tokens)  # type: ignore[arg-type]
    state.open_rows(0, tokens)
    for layer in state.layers:
        for entries in layer.entries:
            raw = entries.values.view(np.uint8)
            raw[:] = rng.integers(0, 256, raw.shape, np.uint8)
        for ring in layer.rings:
            rng.random(out=ring.values, dtype=np.float32)
    state.begin(0)
    state.position = tokens
    session.tokens = rng.integers(0, 129_000, tokens).tolist()
    session.ladder.add(take_snapshot(state, tokens))
    return session


def measure_disk(tokens: int, rows: RowFormat, folder: Path) -> None:
    """Print bytes and speed of saving and loading rows of the shape of V4-Flash."""
    session = flash_session(tokens, rows)
    folders = SessionFolder(folder / "flash", 1 << 40)
    store = SessionStore(folders, "flash", print)
    start = time.monotonic()
    store.save(session)
    seconds = time.monotonic() - start
    nbytes = sum(file.nbytes for file in folders.files())
    mark = session.ladder.landmarks[0].nbytes
    print(f"{tokens} tokens of V4-Flash, {rows.name} rows: {nbytes / 1e6:.1f} MB on disk", end=", ")
    print(f"{(nbytes - mark) / tokens:,.0f} B a token and {mark / 1e6:.1f} MB for a snapshot")
    print(f"saved and synced at {nbytes / seconds / 1e9:.2f} GB/s")
    for place in ("past the page cache", "from the page cache"):
        best = {"plain reading": 0.0, "loading": 0.0}
        for _ in range(ROUNDS):  # in turns, so that both have the same machine
            for kind in best:
                if place.startswith("past"):
                    forget(folders)
                state = State(session.state.config, SLACK, rows)
                start = time.monotonic()
                if kind == "loading":
                    assert store.load(state, session.tokens, 0) is not None
                else:
                    assert sum(len(file.path.read_bytes()) for file in folders.files()) == nbytes
                best[kind] = max(best[kind], nbytes / (time.monotonic() - start) / 1e9)
        print(f"{place}: " + ", ".join(f"{kind} {rate:.2f} GB/s" for kind, rate in best.items()))
    start = time.monotonic()
    restore(session.state, session.ladder.landmarks[0])
    print(f"restoring a rung takes {(time.monotonic() - start) * 1e3:.1f} ms")
    start = time.monotonic()
    session.fork()
    print(f"a fork takes {(time.monotonic() - start) * 1e3:.1f} ms")


def forget(folder: SessionFolder) -> None:
    """Drop the files from the page cache, where the system can do that."""
    advise: Any = getattr(os, "posix_fadvise", None)
    if advise is None:
        return
    for file in folder.files():
        with file.path.open("rb") as stream:
            advise(stream.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def main() -> None:
    """Measure everything."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tokens", type=int, default=100_000)
    parser.add_argument("--rows", type=int, default=65_536)
    parser.add_argument("--kv", choices=list(FORMATS), default=DEFAULT_ROWS.name)
    parser.add_argument("--folder", type=Path)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
        (Path(folder) / "model").mkdir()
        measure_disk(arguments.rows, FORMATS[arguments.kv], Path(folder))
        if arguments.tokens:
            measure_rewinding(arguments.tokens, Path(folder))


if __name__ == "__main__":
    main()
