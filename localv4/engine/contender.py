"""The engines that a benchmark times, each behind the same few calls."""

import gc
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Protocol

import numpy as np

from localv4.engine.engine import Engine
from localv4.engine.gpu_measurement import GpuWatch, watch_gpu
from localv4.engine.machine import (
    cpu_times,
    foreign_cores,
    peak_resident_bytes,
    resident_bytes,
    resident_file_bytes,
)
from localv4.engine.measurement import Case, Memory, PeerResult, Sample, Series
from localv4.engine.peer import Peer, PeerContext, PeerError
from localv4.engine.session import Session
from localv4.model.matrix import Floats

OnStep = Callable[[str, int, int], None]
"""Called with (phase, done, total) while a test runs."""


class Contender(Protocol):
    """An engine that can run the same test again and again."""

    def open(self, case: Case, tokens: Sequence[int]) -> None:
        """Load the model if need be and run the test once, untimed; `tokens` from the start on."""

    def sample(self) -> None:
        """Run the test once and keep the time."""

    def unload(self) -> None:
        """Give back the memory of the model."""


class OwnEngine:
    """Our engine on one session; only the test's own tokens are timed.

    The session goes back to the depth of a test before each sample. A short way back is free;
    after a long one the tokens before are processed again, which no sample counts.
    """

    def __init__(
        self,
        engine: Engine,
        reload: Callable[[], Engine] | None,
        on_step: OnStep,
        cancelled: threading.Event,
    ) -> None:
        self._engine: Engine | None = engine
        self._session: Session | None = None
        self._reload = reload
        self._on_step = on_step
        self._cancelled = cancelled
        self.samples: list[Sample] = []
        self.logits: Floats | None = None

    def open(self, case: Case, tokens: Sequence[int]) -> None:
        """Load the model if it is not there and run the test once."""
        self._case, self._tokens = case, tokens
        self.samples = []
        if self._engine is None:
            assert self._reload is not None
            self._on_step(f"{case.name}: loading", 0, 1)
            self._engine = self._reload()
        if self._session is None:
            self._session = self._engine.new_session()
        self._on_step(f"{case.name}: warming up", 0, 1)
        # pages come in, experts of this trace are packed
        self._run(self._engine, self._session)

    def sample(self) -> None:
        """Run the test once more."""
        assert self._engine is not None and self._session is not None
        self.samples.append(self._run(self._engine, self._session))

    def watch_gpu(self) -> GpuWatch | None:
        """Count from now on what a GPU does; None where none helps."""
        assert self._engine is not None
        return watch_gpu(self._engine, self._case.depth + self._case.tokens // 2)

    def unload(self) -> None:
        """Forget engine and session; nobody else may hold them."""
        self._engine = self._session = None
        gc.collect()

    def memory(self, before: int, probe_bytes: int) -> Memory:
        """Return what the process holds; `before`: its peak when the probe came."""
        assert self._engine is not None and self._session is not None
        parts = {
            "mapped weights": resident_file_bytes(self._engine.checkpoint.files) or 0,
            **_on_host(held_bytes(self._engine)),
            "state": self._session.state_bytes,
        }
        # the probe holds its buffer from the first test to the last: it is part of the new peak
        rest = resident_bytes() - probe_bytes - sum(parts.values())
        peak = max(before, peak_resident_bytes() - probe_bytes)
        return Memory(peak, {**parts, "rest": max(rest, 0)})

    def _run(self, engine: Engine, session: Session) -> Sample:
        case = self._case
        self._go_to(session, case)
        engine.checkpoint.check_unchanged()
        timed = self._tokens[case.depth : case.depth + case.tokens]
        before = cpu_times()
        start = time.perf_counter()
        if case.kind == "pp":
            self.logits = session.extend(timed, cancelled=self._cancelled)
        else:
            for token in timed:
                self.logits = session.extend([token], cancelled=self._cancelled)
        seconds = time.perf_counter() - start
        after = cpu_times()
        engine.checkpoint.check_unchanged()
        return Sample(seconds, foreign_cores(before, after))

    def _go_to(self, session: Session, case: Case) -> None:
        """Bring the session to the depth of a test."""
        session.rollback(min(case.depth, session.position))
        missing = self._tokens[session.position : case.depth]
        if missing:
            session.extend(
                missing,
                cancelled=self._cancelled,
                on_progress=lambda done, total: self._on_step(
                    f"{case.name}: going to depth {case.depth}", done, total
                ),
            )


class PeerEngine:
    """llama.cpp on the same file; what goes wrong with it ends its part of a test, no more.

    After a crash in a test the next one starts it anew; a model that it cannot load is given up.
    """

    def __init__(self, peer: Peer, path: Path, threads: int, on_step: OnStep) -> None:
        self._peer = peer
        self._path = path
        self._threads = threads
        self._on_step = on_step
        self._is_loaded = False
        self._cannot_load: str | None = None

    def open(self, case: Case, tokens: Sequence[int]) -> None:
        """Load the model if it is not there and run the test once."""
        self._case = case
        self._samples: list[Sample] = []
        self._context: PeerContext | None = None
        self._logits: Floats | None = None
        self._peak_bytes: int | None = None
        self._problem = self._cannot_load
        if self._problem is not None:
            return
        try:
            self._load()
            self._on_step(f"{case.name}: llama.cpp warms up", 0, 1)
            self._warm_up(tokens[: case.depth + case.tokens])
        except PeerError as error:
            self._fail(error)

    def sample(self) -> None:
        """Run the test once more, unless it has failed."""
        if self._problem is not None:
            return
        try:
            self._peer.prepare()
            before = cpu_times(self._peer.pid)
            run = self._peer.run()
            after = cpu_times(self._peer.pid)
        except PeerError as error:
            self._fail(error)
            return
        self._samples.append(Sample(run.seconds, foreign_cores(before, after)))
        self._peak_bytes = run.peak_bytes

    def unload(self) -> None:
        """End the process."""
        self._peer.close()
        self._is_loaded = False

    def result(self, own_logits: Floats | None) -> PeerResult:
        """Return what the last test gave; `own_logits`: ours after its last token."""
        if self._problem is not None:
            return PeerResult(None, self._problem, self._context)
        return PeerResult(
            Series(self._case.tokens, tuple(self._samples)),
            None,
            self._context,
            agreement(own_logits, self._logits),
            self._peak_bytes,
        )

    def _load(self) -> None:
        if self._is_loaded:
            return
        self._on_step(f"{self._case.name}: llama.cpp loads", 0, 1)
        try:
            self._peer.load(self._path, self._threads)
        except PeerError as error:
            self._cannot_load = error.message
            raise
        self._is_loaded = True

    def _warm_up(self, tokens: Sequence[int]) -> None:
        self._context = self._peer.open(self._case.kind, self._case.depth, tokens)
        self._peer.prepare()
        self._logits = self._peer.run(logits=True).logits
        if self._logits is None or not np.isfinite(self._logits).all():
            # such a token takes any experts: its time says nothing
            raise PeerError("llama.cpp: its logits are not finite")

    def _fail(self, error: PeerError) -> None:
        self._problem = error.message
        self._is_loaded = self._is_loaded and self._peer.pid is not None


def agreement(ours: Floats | None, theirs: Floats | None) -> float | None:
    """Return the correlation of two vectors of logits, None where there are no two of one size."""
    if ours is None or theirs is None or ours.shape != theirs.shape:
        return None
    return float(np.corrcoef(ours, theirs)[0, 1])


def _on_host(parts: dict[str, int]) -> dict[str, int]:
    """Return what of an engine's memory is that of the process."""
    return {name: nbytes for name, nbytes in parts.items() if not name.startswith("GPU ")}


def held_bytes(engine: Engine) -> dict[str, int]:
    """Return the memory that an engine holds beside files and sessions, by component."""
    tell = getattr(engine, "memory", None)
    return {} if tell is None else dict(tell())
