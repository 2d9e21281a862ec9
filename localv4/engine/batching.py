"""Many answers at once: rows decode together, so that weights are read once for all of them.

A row joins as soon as its prompt is read and leaves with its last token; nobody waits for the
longest. Between two tokens of the running rows a slice of the next prompts is read: short ones
share it, so that each expert is read once for all of them. What a row says does not depend on its
company: the network promises equal bits, and each row has its own sampler.

The batcher has no thread of its own: whoever owns it submits jobs and calls `step`.
"""

import threading
import time
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice

import numpy as np

from localv4.engine.batch_prefixes import Ids, Prefixes
from localv4.engine.batch_rows import Answer, Job, RunningRow
from localv4.engine.engine import Engine
from localv4.engine.session import Session, extend_together, remedy
from localv4.errors import DoesNotFitError, LocalV4Error, NumericsError
from localv4.kernels.threads import use_threads
from localv4.model.matrix import Floats
from localv4.planning.model_facts import RowLimits, held_state_bytes

COMPARED = 64
"""Prompts that wait behind the next one and are compared with it for a common beginning."""

EXPECTED_TOKENS = 4096
"""Answer tokens that a row is given memory for when it joins; most have fewer."""

LEAST_READING = 0.5
"""Share of the time that prompts may be read in while one more row fits; the rest is decoding."""

_ENDED = object()

MEASURED_STEPS = 32
"""Steps between two looks at the memory that rows hold: it grows by some kilobytes a token."""


@dataclass(frozen=True, slots=True)
class Outcome:
    """The end of a job: its answer, or why there is none."""

    job: Job
    answer: Answer | None
    error: LocalV4Error | None = None


@dataclass(slots=True)
class BatchStats:
    """Counts and wall-clock seconds so far; `reused_tokens` of prompts cost nothing.

    `rows` are running, `decoded_tokens` came in `steps`; `paused` counts rows that had to give
    their memory back for a while.
    """

    rows: int = 0
    steps: int = 0
    decoded_tokens: int = 0
    decode_s: float = 0.0
    read_tokens: int = 0
    read_s: float = 0.0
    reused_tokens: int = 0
    paused: int = 0

    @property
    def decode_tok_s(self) -> float:
        """Tokens per second of all rows together, while they decode."""
        return self.decoded_tokens / self.decode_s if self.decode_s else 0.0

    @property
    def rows_per_step(self) -> float:
        """How many rows shared the reading of weights, on average."""
        return self.decoded_tokens / self.steps if self.steps else 0.0


class Batcher:
    """Answers jobs with one engine, `most_rows` at a time; not for use by two threads at once.

    `room` bounds the bytes that decoder states may take, None leaves them unbounded; one row runs
    in any case. Setting `cancelled` makes `step` raise Cancelled.
    """

    def __init__(
        self,
        engine: Engine,
        most_rows: int,
        room: int | None = None,
        cancelled: threading.Event | None = None,
    ) -> None:
        self.stats = BatchStats()
        self._engine, self._network = engine, engine.network
        self.most_rows = max(1, min(most_rows, self._network.most_rows))
        self._room = room
        self._limits = RowLimits()
        if engine.facts is not None and engine.gpu_plan is None:  # a GPU has all rows
            self._limits = engine.facts.limits
        self._cancelled = cancelled
        self._jobs: deque[Job] = deque()
        self._paused: deque[RunningRow] = deque()
        self._reading: Iterator[None] | None = None
        self._joining: list[RunningRow] = []
        self._running: list[RunningRow] = []
        self._outcomes: list[Outcome] = []
        self._prefixes = Prefixes(engine.new_session)
        self._decoding_owed_s = 0.0

    @property
    def waiting(self) -> int:
        """How many jobs have not begun."""
        return len(self._jobs)

    @property
    def is_idle(self) -> bool:
        """Whether there is nothing to do."""
        return not (self._jobs or self._paused or self._reading or self._running)

    def submit(self, job: Job) -> None:
        """Let a job wait for its turn; they begin in this order."""
        self._jobs.append(job)

    def step(self) -> list[Outcome]:
        """Read a slice of a prompt where that is due, decode a token of every running row.

        Returns the jobs that ended. Raises Cancelled, BadFileError when the model's files changed,
        and DoesNotFitError when memory ran out; then no more can be done with this batcher.
        """
        self._engine.checkpoint.check_unchanged()  # of changed weights no token may come
        use_threads(self._network.threads)
        self._read()
        if self._running:
            self._decode()
        self.stats.rows = len(self._running)
        ended, self._outcomes = self._outcomes, []
        return ended

    def _read(self) -> None:
        """Read slices of prompts until decoding is due or no further row can join."""
        while not self._running or self._decoding_owed_s <= 0:
            if self._reading is None:
                self._reading = self._next_reading()
            if self._reading is None:
                return
            start = time.perf_counter()
            if next(self._reading, _ENDED) is _ENDED:
                self._reading = None
            self._charge(time.perf_counter() - start)

    def _charge(self, seconds: float) -> None:
        """Note the time of a slice, and how much decoding it makes due.

        The more places are free the less: few rows that decode use the machine badly.
        """
        self.stats.read_s += seconds
        share = 1 - (1 - LEAST_READING) * len(self._running) / self.most_rows
        self._decoding_owed_s += seconds * (1 - share) / share

    def _next_reading(self) -> Iterator[None] | None:
        """Begin with the next rows if one has a place and memory."""
        row = self._next_row()
        return self._bring_in(row) if row is not None else None

    def _next_row(self) -> RunningRow | None:
        """Take the next row that has a place and memory; those that paused come first."""
        while self._places and (self._paused or self._jobs):
            try:
                row = self._paused[0] if self._paused else self._new_row(self._jobs[0])
            except LocalV4Error as error:
                self._outcomes.append(Outcome(self._jobs.popleft(), None, error))
                continue
            if not self._has_room_for(row):
                return None
            (self._paused if self._paused else self._jobs).popleft()
            return row
        return None

    @property
    def _places(self) -> int:
        """How many more rows may join."""
        return self.most_rows - len(self._running) - len(self._joining)

    def _new_row(self, job: Job) -> RunningRow:
        return RunningRow(job, self._engine.tokenizer, self._engine.ctx_size)

    def _bring_in(self, first: RunningRow) -> Iterator[None]:
        """Process what comes before the next tokens of some rows, slice by slice; then they run.

        They are as many as fill a chunk together.
        """
        row: RunningRow | None = first
        while row is not None:
            yield from self._seat(row)
            unread = sum(map(_unread, self._joining))
            row = self._next_row() if unread < self._network.chunk_tokens else None
        while self._joining:
            if self._read_together():
                yield None

    def _seat(self, row: RunningRow) -> Iterator[None]:
        """Give a row its session, which has read what the row shares with others."""
        ids = row.ids_before
        upcoming = (job.prompt_ids for job in islice(self._jobs, COMPARED))
        try:
            start = self._prefixes.start(ids, upcoming)
            session = start.session
            self.stats.reused_tokens += session.position
            if start.shared:
                yield from self._extend(session, ids[: start.shared])
                session = session.fork()
        except DoesNotFitError as error:
            self._give_way(row, error)
        else:
            session.keep_no_snapshots()  # rows never go back: snapshots would only take memory
            row.session = session
            self._joining.append(row)

    def _extend(self, session: Session, ids: Ids) -> Iterator[None]:
        """Have the session process the rest of these ids, a chunk at a time."""
        size = self._network.chunk_tokens
        while session.position < len(ids):
            part = ids[session.position : session.position + size].tolist()
            session.read(part, self._cancelled)
            self.stats.read_tokens += len(part)
            yield None

    def _read_together(self) -> bool:
        """Read a chunk of what the joining rows have not read; those that are through run.

        Returns whether there was anything to read, and memory for it.
        """
        sessions, parts, room = [], [], self._network.chunk_tokens
        for row in self._joining:
            session = row.session
            assert session is not None
            part = row.ids_before[session.position :][:room].tolist()
            if part:
                sessions.append(session)
                parts.append(part)
                room -= len(part)
        try:
            if parts:
                extend_together(sessions, parts, self._cancelled)
        except DoesNotFitError as error:
            self._give_way(self._joining.pop(), error)
            return False
        self.stats.read_tokens += sum(map(len, parts))
        for row in [row for row in self._joining if not _unread(row)]:
            self._joining.remove(row)
            self._start(row)
        return bool(parts)

    def _start(self, row: RunningRow) -> None:
        assert row.session is not None
        self._running.append(row)

    def _decode(self) -> None:
        """Process the newest token of every row and choose the next one."""
        start = time.perf_counter()
        logits = self._next_logits()
        if logits is None:
            return
        for row, values in zip(self._running, logits, strict=True):
            try:
                row.take(values)
            except NumericsError as error:
                self._outcomes.append(Outcome(row.job, None, error))
                row.session = None
            else:
                if row.has_ended:
                    self._outcomes.append(Outcome(row.job, row.answer()))
        self.stats.decoded_tokens += len(self._running)
        self.stats.steps += 1
        self._running = [row for row in self._running if row.session and not row.has_ended]
        if self.stats.steps % MEASURED_STEPS == 0:
            self._measure()
        seconds = time.perf_counter() - start
        self.stats.decode_s += seconds
        # what is paid in advance counts for one step only: nobody waits for a burst of prompts
        self._decoding_owed_s = max(self._decoding_owed_s - seconds, -seconds)

    def _next_logits(self) -> Floats | None:
        """Return the logits (rows, vocab) after the newest tokens; None when memory ran out."""
        sessions = [row.session for row in self._running if row.session is not None]
        tokens = np.array([row.newest for row in self._running], np.int64)
        self._network.cancelled = self._cancelled
        try:
            vectors = self._network.decode_rows(tokens, [s.state for s in sessions])
        except MemoryError:
            for session in sessions:  # some may have gone ahead
                session.state.roll_back(len(session.tokens))
            row = self._running.pop()
            message = f"out of memory at token {len(row.ids_before)}"
            self._give_way(row, DoesNotFitError(message, hint=remedy(self._network)))
            return None
        finally:
            self._network.cancelled = None
        for session, token in zip(sessions, tokens.tolist(), strict=True):
            session.tokens.append(token)
        return self._network.logits(vectors)

    # --- memory ---

    def _has_room_for(self, row: RunningRow) -> bool:
        """Say whether the state of another row fits beside those that run; one always does."""
        row.planned_tokens = len(row.ids_before) + min(row.budget, EXPECTED_TOKENS)
        seated = [*self._running, *self._joining]
        if self._room is None or not seated:
            return True
        needed = self._bytes_of([*seated, row])
        if needed + self._prefixes.nbytes > self._room:
            self._prefixes.clear()
        return needed <= self._room

    def _measure(self) -> None:
        """Count the memory that rows really have; the newest pause if that is too much."""
        for row in self._running:
            if row.session is not None:
                row.planned_tokens = max(row.planned_tokens, row.session.state.reserved)
        while self._room is not None and len(self._running) > 1 and self._held > self._room:
            self._pause(self._running.pop())

    @property
    def _held(self) -> int:
        return self._bytes_of([*self._running, *self._joining])

    def _bytes_of(self, rows: Sequence[RunningRow]) -> int:
        """Return the memory of the states of some rows, all together."""
        network, tokens = self._network, sum(row.planned_tokens for row in rows)
        return held_state_bytes(
            *(network.config, tokens, network.rows, network.slack),
            limits=self._limits,
            sequences=len(rows),
        )

    def _give_way(self, row: RunningRow, error: DoesNotFitError) -> None:
        """Let a row that got no memory wait for that of the others; alone, it cannot be answered.

        From now on rows have no more room than those that run.
        """
        self._prefixes.clear()
        if self._running or self._joining:
            self._room = self._held
            self._pause(row)
        else:
            self._outcomes.append(Outcome(row.job, None, error))

    def _pause(self, row: RunningRow) -> None:
        """Give back the memory of a row; later its tokens are processed once more."""
        row.session = None
        self._paused.appendleft(row)
        self.stats.paused += 1


def _unread(row: RunningRow) -> int:
    """Return how many tokens a row has to read before it can run."""
    return len(row.ids_before) - row.session.position if row.session is not None else 0
