"""One background thread for the engine, so that Ctrl-C is seen at once on the main one.

A compiled kernel and the compiler cannot be interrupted; the main thread only ever waits here, and
a wait ends as soon as a signal arrives.
"""

import queue
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar

T = TypeVar("T")

# Seconds. Python on Windows sees Ctrl-C only between waits.
WAIT_S = 0.1


@dataclass(slots=True)
class _Task(Generic[T]):
    """An iterator to run on the thread, and where its values go."""

    items: Callable[[], Iterator[T]]
    out: "queue.SimpleQueue[tuple[str, Any]]" = field(default_factory=queue.SimpleQueue)


_tasks: "queue.SimpleQueue[_Task[Any]]" = queue.SimpleQueue()
_thread: threading.Thread | None = None
_idle = threading.Event()
_idle.set()


def is_busy() -> bool:
    """Say whether the thread still works, for instance on something that was interrupted."""
    return not _idle.is_set()


def call(function: Callable[[], T]) -> T:
    """Run `function` on the thread and return its result, or raise what it raised."""
    results = [item for item in stream(lambda: iter([(function(),)])) if item is not None]
    return results[0][0]


def stream(items: Callable[[], Iterator[T]]) -> Iterator[T | None]:
    """Run an iterator on the thread; yield its values as they come, and None every WAIT_S without.

    Its values themselves are never None.
    """
    task = _Task(items)
    _start()
    _idle.clear()
    _tasks.put(task)
    while True:
        try:
            kind, value = task.out.get(timeout=WAIT_S)
        except queue.Empty:
            yield None
            continue
        if kind == "done":
            return
        if kind == "error":
            raise value
        yield value


def _start() -> None:
    global _thread
    if _thread is None:
        # a daemon: an interrupted process must not wait for a compilation to end
        _thread = threading.Thread(target=_work, name="localv4-engine", daemon=True)
        _thread.start()


def _work() -> None:
    while True:
        task = _tasks.get()
        try:
            for item in task.items():
                task.out.put(("item", item))
        except BaseException as error:
            _idle.set()
            task.out.put(("error", error))
        else:
            _idle.set()
            task.out.put(("done", None))
