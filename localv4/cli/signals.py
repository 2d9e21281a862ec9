"""Ctrl-C and the wish of the system that the process ends."""

import contextlib
import signal
import threading
from collections.abc import Callable, Iterator
from types import FrameType
from typing import NoReturn


class Terminated(BaseException):
    """SIGTERM arrived: unwind, restore the terminal, leave with exit code 143."""


def unwind_on_termination() -> None:
    """Make SIGTERM raise Terminated in the main thread, so that everything is cleaned up."""

    def terminate(_signal: int, _frame: FrameType | None) -> NoReturn:
        raise Terminated

    signal.signal(signal.SIGTERM, terminate)


@contextlib.contextmanager
def termination_calls(leave: Callable[[], None]) -> Iterator[None]:
    """Call `leave` on SIGTERM, where an exception out of nowhere would be caught by others."""

    def terminate(_signal: int, _frame: FrameType | None) -> None:
        leave()

    before = signal.signal(signal.SIGTERM, terminate)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


@contextlib.contextmanager
def interrupt_sets(cancelled: threading.Event) -> Iterator[None]:
    """Let the first Ctrl-C set `cancelled` and a second one raise KeyboardInterrupt."""

    def interrupt(_signal: int, _frame: FrameType | None) -> None:
        if cancelled.is_set():
            raise KeyboardInterrupt
        cancelled.set()

    before = signal.signal(signal.SIGINT, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
