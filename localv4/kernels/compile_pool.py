"""Helper processes that compile kernels at the same time, as many as there are cores."""

import queue
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Iterable, Iterator
from contextlib import suppress
from types import TracebackType
from typing import Self

DONE, FAILED = "done", "failed"

MOST_HELPERS = 8
"""Each takes some 200 MB while it works."""

SILENCE_S = 300.0
"""Seconds without a sign of any helper after which they are given up."""

WAIT_S = 0.1
"""Seconds between two looks: Python on Windows sees Ctrl-C only between waits."""

# The helper must find the same modules as this process, whatever that did to its path.
_CODE = """
import sys
sys.path[:] = sys.argv[1:]
from localv4.kernels.compile_worker import work
work()
"""


class _Work:
    """Names in groups whose members have code in common, so that a helper should stay with one."""

    def __init__(self, groups: Iterable[Iterable[str]]) -> None:
        self._lock = threading.Lock()
        self._fresh = deque(filter(None, map(deque, groups)))
        self._begun: list[deque[str]] = []

    def take(self, own: deque[str]) -> tuple[str, deque[str]] | None:
        """Return a name and its group: the helper's own as long as it lasts, a fresh one, any."""
        with self._lock:
            group = own
            if not group and self._fresh:
                group = self._fresh.popleft()
                self._begun.append(group)
            elif not group:
                group = max(self._begun, key=len, default=own)
            return (group.popleft(), group) if group else None


class CompilePool:
    """Up to `count` helpers; those that do not answer with `greeting` first are left alone.

    To be used in a `with` statement, whose end kills them.
    """

    def __init__(self, count: int, greeting: str) -> None:
        self._greeting = greeting
        self._results: queue.SimpleQueue[str | None] = queue.SimpleQueue()
        self._threads: list[threading.Thread] = []
        self._processes = [p for p in (_start() for _ in range(min(count, MOST_HELPERS))) if p]

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for process in self._processes:
            process.kill()
        for thread in self._threads:
            thread.join()
        for process in self._processes:
            with suppress(OSError), process:
                pass  # closes its pipes and waits for its end

    def compile(self, groups: Iterable[Iterable[str]]) -> Iterator[str]:
        """Hand out groups of units; yield the names of those that are in the cache by now.

        The first ones are begun first. A helper that has nothing left to do helps with a group of
        another. What helpers fail at, or what they have when they die, is left out.
        """
        work = _Work(groups)
        for process in self._processes:
            thread = threading.Thread(target=self._serve, args=(process, work), daemon=True)
            self._threads.append(thread)
            thread.start()
        busy, silent_since = len(self._processes), time.monotonic()
        while busy > 0 and time.monotonic() - silent_since < SILENCE_S:
            try:
                name = self._results.get(timeout=WAIT_S)
            except queue.Empty:
                continue
            silent_since = time.monotonic()
            if name is None:
                busy -= 1
            else:
                yield name

    def _serve(self, process: "subprocess.Popen[str]", work: _Work) -> None:
        """Give work to one helper until there is none left or it does not answer."""
        assert process.stdin is not None and process.stdout is not None
        try:
            known = process.stdout.readline().strip() == self._greeting
            group: deque[str] = deque()
            while known and (task := work.take(group)):
                name, group = task
                print(name, file=process.stdin, flush=True)
                answer = process.stdout.readline().strip()
                if answer == DONE:
                    self._results.put(name)
                known = answer in (DONE, FAILED)
        except (OSError, ValueError):
            pass  # it died
        finally:
            self._results.put(None)


def _start() -> "subprocess.Popen[str] | None":
    """Start a helper; return None where Python cannot be started a second time."""
    if not sys.executable or getattr(sys, "frozen", False):
        return None
    command = [sys.executable, "-c", _CODE, *(p for p in sys.path if isinstance(p, str))]
    try:
        return subprocess.Popen(  # noqa: S603 - this very Python
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            encoding="utf-8",
            errors="replace",
            creationflags=getattr(subprocess, "CREATE_NO_WINDOW", 0),
        )
    except OSError:
        return None
