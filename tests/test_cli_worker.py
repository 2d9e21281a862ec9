"""The engine's thread: values and errors come back, waiting does not block signals."""

import threading
import time
from collections.abc import Iterator

import pytest

from localv4.cli import worker
from localv4.errors import UsageError


def test_call() -> None:
    assert worker.call(threading.current_thread) is not threading.current_thread()
    assert worker.call(lambda: None) is None
    assert not worker.is_busy()


def test_stream() -> None:
    assert [item for item in worker.stream(lambda: iter(range(5))) if item is not None] == [
        0,
        1,
        2,
        3,
        4,
    ]


def test_errors_come_back() -> None:
    def fail() -> Iterator[int]:
        yield 1
        raise UsageError("broken")

    got = []
    with pytest.raises(UsageError, match="broken"):
        for item in worker.stream(fail):
            got.append(item)
    assert got == [1]
    assert worker.call(lambda: 7) == 7


def test_ticks_while_nothing_comes() -> None:
    release = threading.Event()

    def slow() -> Iterator[int]:
        release.wait(10)
        yield 1

    items = worker.stream(slow)
    assert next(items) is None
    assert worker.is_busy()
    release.set()
    assert [item for item in items if item is not None] == [1]


def test_busy_after_the_reader_left() -> None:
    release = threading.Event()

    def endless() -> Iterator[int]:
        yield 1
        release.wait(10)

    for item in worker.stream(endless):
        if item is not None:
            break
    assert worker.is_busy()
    release.set()
    deadline = time.monotonic() + 10
    while worker.is_busy() and time.monotonic() < deadline:
        time.sleep(0.01)
    assert not worker.is_busy()
