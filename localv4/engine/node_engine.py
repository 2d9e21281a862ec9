"""An engine that answers rows which come from many threads: one of these runs on each node.

A single thread works, on all rows that have come by then; each caller waits for its own result.
"""

import queue
import threading
from concurrent.futures import Future
from dataclasses import dataclass, replace

from localv4.engine.batch_input import Row, parse_row
from localv4.engine.batch_memory import plan_batch
from localv4.engine.batch_request import BatchSettings
from localv4.engine.batch_results import Document, Results
from localv4.engine.batch_run import BatchRun, make_run
from localv4.engine.engine import Engine
from localv4.engine.fingerprint import weights_fingerprint
from localv4.engine.setup import Setup
from localv4.errors import LocalV4Error, UsageError
from localv4.library import installed
from localv4.storage import open_checkpoint


@dataclass(frozen=True, slots=True)
class EngineOrder:
    """What a node needs to know to make its engine.

    `reference` names the model there, `weights` is the fingerprint that it must have.
    """

    reference: str
    weights: str
    identity: str
    settings: BatchSettings
    parallel: int | None
    rows: int
    setup: Setup

    def load(self) -> BatchRun:
        """Load the model of this machine. Raises what `Engine.load` raises, and UsageError."""
        model = installed.resolve(self.reference)
        checkpoint = open_checkpoint(model.path)
        if weights_fingerprint(checkpoint) != self.weights:
            raise UsageError(f"{model.path} has other weights than where the batch was started")
        plan = plan_batch(
            model.path,
            self.setup.memory,
            parallel=self.parallel,
            rows=self.rows,
            ctx_size=self.setup.ctx_size,
            threads=self.setup.threads,
            exact=self.setup.numerics == "exact",
        )
        gpu = replace(self.setup.gpu, state_bytes=plan.room)
        engine = Engine.load(model.path, replace(self.setup, memory=plan.memory, gpu=gpu))
        plan = plan.within(engine.gpu_plan)
        results = Results(self.identity, self.settings.model)
        return make_run(
            engine, self.settings, results, rows=plan.rows, room=plan.room, cancelled=None
        )


class NodeFailure(Exception):
    """The engine of a node cannot go on; the rows that it had can be answered by another."""


class NodeEngine:
    """Answers rows from any thread, once `load` has returned."""

    def __init__(self, order: EngineOrder) -> None:
        self._order = order
        self._inbox: queue.SimpleQueue[tuple[Row, Future[Document]]] = queue.SimpleQueue()
        self._callers: dict[str, Future[Document]] = {}

    def load(self) -> int:
        """Load the model and begin to work; return the rows that run at a time.

        Raises NodeFailure.
        """
        try:
            run = self._order.load()
        except (LocalV4Error, OSError, MemoryError) as error:
            raise NodeFailure(str(error)) from None
        threading.Thread(target=self._work, args=(run,), daemon=True, name="rows").start()
        return run.batcher.most_rows

    def answer(self, line: int, data: bytes, is_text: bool, digest: bytes) -> Document:
        """Return the result of a line of the input. Raises NodeFailure."""
        caller: Future[Document] = Future()
        self._inbox.put((parse_row(line, data, is_text, digest), caller))
        return caller.result()

    def _work(self, run: BatchRun) -> None:
        """Answer what comes until something fails for good; from then on refuse everything."""
        try:
            while True:
                while run.is_idle or not self._inbox.empty():
                    row, caller = self._inbox.get()
                    self._callers[row.custom_id] = caller
                    run.add(row)
                for document in run.step():
                    self._callers.pop(document["custom_id"]).set_result(document)
        except Exception as error:
            failure = NodeFailure(str(error))
        for caller in self._callers.values():
            caller.set_exception(failure)
        while True:
            self._inbox.get()[1].set_exception(failure)
