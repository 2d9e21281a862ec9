"""A batch on this machine: rows in, rows of results out, in the order in which they end."""

import threading
from collections.abc import Iterable, Iterator

from localv4.engine.batch_input import Row
from localv4.engine.batch_request import BatchSettings, Request, RequestMaker
from localv4.engine.batch_results import Document, Results
from localv4.engine.batch_rows import Job
from localv4.engine.batching import COMPARED, Batcher, Outcome
from localv4.engine.engine import Engine
from localv4.errors import LocalV4Error


class BatchRun:
    """Answers rows with one engine. `step` works on those that were given by `add`."""

    def __init__(
        self, engine: Engine, settings: BatchSettings, results: Results, batcher: Batcher
    ) -> None:
        self.batcher = batcher
        self._maker = RequestMaker(engine.tokenizer, settings)
        self._results = results
        self._requests: dict[Job, Request] = {}
        self._failed: list[Document] = []

    @property
    def is_idle(self) -> bool:
        """Whether every row that was added has its result."""
        return self.batcher.is_idle and not self._failed

    @property
    def wants_more(self) -> bool:
        """Whether rows should be added, so that common beginnings are seen in time."""
        return self.batcher.waiting < COMPARED

    def add(self, row: Row) -> None:
        """Let a row wait for its turn; a bad one has its result at the next step."""
        try:
            request = self._maker.make(row)
        except LocalV4Error as error:
            self._failed.append(self._results.failed(row.custom_id, row.digest, error))
            return
        self._requests[request.job] = request
        self.batcher.submit(request.job)

    def step(self) -> list[Document]:
        """Work for a moment; return the results that are known now. Raises as `Batcher.step`."""
        failed, self._failed = self._failed, []
        if self.batcher.is_idle:
            return failed
        return failed + [self._result(outcome) for outcome in self.batcher.step()]

    def _result(self, outcome: Outcome) -> Document:
        request = self._requests.pop(outcome.job)
        if outcome.answer is not None:
            return self._results.answered(request, outcome.answer)
        assert outcome.error is not None
        return self._results.failed(request.custom_id, request.digest, outcome.error)


def answer_rows(run: BatchRun, rows: Iterable[Row]) -> Iterator[Document]:
    """Yield the result of every row as soon as it is known."""
    source = iter(rows)
    more = True
    while more or not run.is_idle:
        while more and run.wants_more:
            row = next(source, None)
            more = row is not None
            if row is not None:
                run.add(row)
        yield from run.step()


def make_run(
    engine: Engine,
    settings: BatchSettings,
    results: Results,
    *,
    rows: int,
    room: int | None,
    cancelled: threading.Event | None,
) -> BatchRun:
    """Return a run of up to `rows` rows at a time, whose states take up to `room` bytes."""
    return BatchRun(engine, settings, results, Batcher(engine, rows, room, cancelled))
