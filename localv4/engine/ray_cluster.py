"""A batch on a Ray cluster: one engine on each node, rows wherever there is room.

Ray places the engines, carries rows and results, and tells when a node has died; its rows then go
to the others. A node that joins later gets an engine as well. Which node answers a row makes no
difference to its result.
"""

import os
import socket
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

from localv4.engine.batch_input import Place
from localv4.engine.batch_results import Document, Results
from localv4.engine.node_engine import EngineOrder, NodeEngine, NodeFailure
from localv4.errors import Cancelled, LocalV4Error, UsageError

ROWS_AHEAD = 16
"""Rows that a node has beside those that run: to go on at once, and to find common beginnings."""

MOST_CALLS = 128
"""Calls that an actor takes at a time, each a thread that waits: no fewer than rows are given."""

MOST_TRIES = 3
"""Nodes that may die with a row before it is suspected to be the reason."""

LOOK_EVERY_S = 5.0
"""Seconds between two looks at which nodes there are."""

WAIT_S = 0.1
CONNECT_S = 5.0

Tell = Callable[[str], None]
Line = tuple[Place, bytes]


@dataclass(slots=True, eq=False)
class _Node:
    """A node, the actor on it, and the rows that it has, by the reference of their results."""

    name: str
    actor: Any
    loading: Any
    rows: dict[Any, Line] = field(default_factory=dict)
    places: int = 0  # rows that it takes, once its model is loaded


def import_ray() -> Any:
    """Return the library. Raises UsageError when it is not installed."""
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # nothing of ours reports to anybody
    try:
        import ray
    except ImportError:
        raise UsageError(
            "--ray needs the library ray", hint="pip install 'localv4[ray]', on every node"
        ) from None
    return ray


class RayCluster:
    """The engines of a cluster, for one batch.

    `tell` is called with notes about nodes. Raises UsageError when there is no cluster at the
    address, LocalV4Error when no node is left, Cancelled when the event is set.
    """

    def __init__(
        self,
        address: str,
        order: EngineOrder,
        is_text: bool,
        tell: Tell,
        cancelled: threading.Event,
    ) -> None:
        self._ray = import_ray()
        self._address, self._order, self._is_text = address, order, is_text
        self._tell, self._cancelled = tell, cancelled
        self._results = Results(order.identity, order.settings.model)
        self._nodes: dict[str, _Node] = {}
        self._refused: set[str] = set()
        self._again: deque[Line] = deque()
        self._tries: dict[str, int] = {}
        self._look_at = 0.0

    def answer(self, lines: Iterable[Line]) -> Iterator[Document]:
        """Yield the results of lines of the input in the order in which they come."""
        self._connect()
        try:
            yield from self._answer(iter(lines))
        finally:
            for node in self._nodes.values():
                self._ray.kill(node.actor)
            self._ray.shutdown()

    def _connect(self) -> None:
        try:
            _check_reachable(self._address)
            self._ray.init(address=self._address, log_to_driver=False, logging_level="error")
        except (RuntimeError, ValueError, OverflowError, OSError) as error:
            detail = " ".join(str(error).split())[:300]
            raise UsageError(f"no Ray cluster at {self._address}: {detail}") from error

    def _answer(self, lines: Iterator[Line]) -> Iterator[Document]:
        more = True
        while True:
            if self._cancelled.is_set():
                raise Cancelled("stopped")
            self._look_around()
            more = self._give_out(lines) and more
            if not more and not self._again and not any(n.rows for n in self._nodes.values()):
                return
            yield from self._take_in()

    # --- nodes ---

    def _look_around(self) -> None:
        """Start an engine on every node that has none."""
        if time.monotonic() < self._look_at:
            return
        self._look_at = time.monotonic() + LOOK_EVERY_S
        alive = [node for node in self._ray.nodes() if node["Alive"] and _can_work(node)]
        for node in alive:
            name = node["NodeID"]
            if name not in self._nodes and name not in self._refused:
                self._nodes[name] = self._start(name, node["NodeManagerAddress"])
        if not self._nodes:
            raise LocalV4Error(f"the Ray cluster at {self._address} has no node that can work")

    def _start(self, name: str, address: str) -> _Node:
        from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

        actor = (
            self._ray.remote(NodeEngine)
            .options(
                num_cpus=1,  # so that clusters admit it; the engine finds its threads itself
                max_concurrency=MOST_CALLS,
                scheduling_strategy=NodeAffinitySchedulingStrategy(name, soft=False),
            )
            .remote(self._order)
        )
        return _Node(address, actor, actor.load.remote())

    def _lose(self, key: str, why: str) -> Iterator[Document]:
        """Forget a node; its rows are answered by others, or fail when they were tried enough."""
        node = self._nodes.pop(key)
        self._refused.add(key)
        self._look_at = 0.0
        self._tell(f"lost {node.name} with {len(node.rows)} rows: {why}")
        for line in reversed(node.rows.values()):
            place = line[0]
            self._tries[place.custom_id] = self._tries.get(place.custom_id, 0) + 1
            if self._tries[place.custom_id] < MOST_TRIES:
                self._again.appendleft(line)
            else:
                error = LocalV4Error(f"{MOST_TRIES} nodes died while they had this row")
                yield self._results.failed(place.custom_id, place.digest, error)
        if not self._nodes:
            self._look_around()

    # --- rows ---

    def _give_out(self, lines: Iterator[Line]) -> bool:
        """Fill up the nodes that are ready, the emptiest first; say whether there are more rows."""
        while True:
            free = [node for node in self._nodes.values() if len(node.rows) < node.places]
            if not free:
                return True
            node = min(free, key=lambda node: len(node.rows))
            line = self._again.popleft() if self._again else next(lines, None)
            if line is None:
                return False
            place, data = line
            result = node.actor.answer.remote(place.line, data, self._is_text, place.digest)
            node.rows[result] = line

    def _take_in(self) -> Iterator[Document]:
        """Yield the results that have come, and those of rows that were given up."""
        waited = [result for node in self._nodes.values() for result in node.rows]
        waited += [node.loading for node in self._nodes.values() if not node.places]
        came, _ = self._ray.wait(waited, num_returns=1, timeout=WAIT_S)
        came, _ = self._ray.wait(waited, num_returns=len(waited), timeout=0) if came else ([], [])
        arrived = set(came)
        for key, node in list(self._nodes.items()):
            try:
                if node.loading in arrived and not node.places:
                    self._note_loaded(node)
                for result in [result for result in node.rows if result in arrived]:
                    document: Document = self._ray.get(result)
                    del node.rows[result]
                    yield document
            except (NodeFailure, self._ray.exceptions.RayError) as error:
                yield from self._lose(key, _first_line(error))

    def _note_loaded(self, node: _Node) -> None:
        """Let a node have rows, now that its model is loaded."""
        node.places = self._ray.get(node.loading) + ROWS_AHEAD
        self._tell(f"{node.name} is ready")


def _check_reachable(address: str) -> None:
    """Raise OSError when nothing listens at host:port; Ray itself would try for many minutes."""
    host, _, port = address.removeprefix("ray://").rpartition(":")
    if host and port.isdecimal():
        socket.create_connection((host.strip("[]"), int(port)), CONNECT_S).close()


def _can_work(node: dict[str, Any]) -> bool:
    """Say whether a node takes work: the head of a cluster often has no processors to give."""
    return bool(node["Resources"].get("CPU", 0) >= 1)


def _first_line(error: Exception) -> str:
    """Return what went wrong in one line: Ray's errors have a page of text."""
    cause = getattr(error, "cause", None)
    text = str(cause if cause is not None else error).strip()
    return text.splitlines()[0][:200] if text else type(error).__name__
