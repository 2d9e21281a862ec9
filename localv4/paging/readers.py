"""A few threads that read records: urgent ones first, guesses when there is nothing else to do."""

import threading
import time
from collections import OrderedDict, deque
from collections.abc import Callable, Collection, Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass

from localv4.errors import LocalV4Error
from localv4.paging.read_statistics import ReadMeter, ReadStatistics

Key = tuple[int, int]
"""A layer, and an expert of it."""

Load = Callable[[Key, int], int]
"""Reads a record to an address, in a thread of its own; returns how many bytes that were."""

Split = Callable[[Key, int, int], Sequence[Callable[[], int]]]
"""Cuts the reading of a record to an address into about so many parts, one or more."""


class ReadError(LocalV4Error):
    """A record cannot be read: one line says which expert, where it lies, and why."""


@dataclass(frozen=True, slots=True)
class Finished:
    """A record that was read, or, with an `error`, was not: its place holds nothing then."""

    key: Key
    address: int
    nbytes: int
    seconds: float
    error: BaseException | None


@dataclass(slots=True)
class _Job:
    """A record that is wanted, and what is known of it while threads read its parts."""

    key: Key
    address: int
    is_urgent: bool
    begun: float = 0.0
    parts_left: int = 1
    nbytes: int = 0
    error: BaseException | None = None


class Readers:
    """`count` threads that call `load` for one record after the other.

    With `split`, an urgent record that few others wait behind is read by the idle threads together.
    Guesses have the disk only while nothing urgent is being read, and half of the threads at most:
    what is urgent next finds the others free. Results are collected by one thread, with `finished`
    or `wait`. A key may be under way once.
    """

    def __init__(self, load: Load, count: int, split: Split | None = None) -> None:
        self._load, self._split = load, split
        self._urgent: OrderedDict[Key, _Job] = OrderedDict()
        self._guesses: OrderedDict[Key, _Job] = OrderedDict()
        self._parts: deque[tuple[_Job, Callable[[], int]]] = deque()
        self._finished: deque[Finished] = deque()
        self._lock = threading.Lock()
        self._work = threading.Condition(self._lock)
        self._news = threading.Condition(self._lock)
        self._idle = 0
        self._under_way = {True: 0, False: 0}  # urgent records and guesses that are being read
        self._most_guesses = max(1, count // 2)
        self._closing = False
        self._meter = ReadMeter()
        self._threads = [
            threading.Thread(target=self._serve, name=f"reader-{i}", daemon=True)
            for i in range(count)
        ]
        for thread in self._threads:
            thread.start()

    def submit(self, key: Key, address: int, *, urgent: bool = True) -> None:
        """Ask for a record at an address; guesses wait until no urgent one does."""
        self.submit_all([(key, address)], urgent=urgent)

    def submit_all(self, places: Collection[tuple[Key, int]], *, urgent: bool = True) -> None:
        """Ask for several records at once, each at its address."""
        with self._lock:
            self._check_open()
            queue = self._urgent if urgent else self._guesses
            for key, address in places:
                queue[key] = _Job(key, address, urgent)
            self._work.notify(len(places))

    def make_urgent(self, keys: Iterable[Key]) -> None:
        """Put guesses that turned out right behind the urgent ones; others are left alone."""
        with self._lock:
            for key in keys:
                job = self._guesses.pop(key, None)
                if job is not None:
                    job.is_urgent = True
                    self._urgent[key] = job
                    self._work.notify()

    def finished(self) -> list[Finished]:
        """Return what was finished since the last time, without waiting."""
        with self._lock:
            return self._collect()

    def wait(self, timeout: float | None = None) -> list[Finished]:
        """Return what was finished, at least one; none at the time-out or if nothing is wanted."""
        with self._lock:
            self._news.wait_for(lambda: self._finished or not self._wanted(), timeout)
            return self._collect()

    @property
    def pending(self) -> int:
        """How many records are wanted or being read, or were and have not been collected."""
        with self._lock:
            return self._wanted() + len(self._finished)

    @property
    def is_idle(self) -> bool:
        """Whether nothing is being read and nothing waits to be."""
        with self._lock:
            return not self._wanted()

    @property
    def statistics(self) -> ReadStatistics:
        """What was read since the start."""
        with self._lock:
            return self._meter.statistics()

    def close(self) -> None:
        """End the threads; what has not begun is dropped. Nothing is written after that.

        An interrupt (Ctrl-C) waits until the reads under way have ended, and is raised then.
        """
        with self._lock:
            self._closing = True
            self._urgent.clear()
            self._guesses.clear()
            self._work.notify_all()
        interrupt = None
        for thread in self._threads:
            while thread.is_alive():
                try:
                    thread.join()
                except KeyboardInterrupt as error:
                    interrupt = error
        if interrupt is not None:
            raise interrupt

    def _wanted(self) -> int:
        return len(self._urgent) + len(self._guesses) + sum(self._under_way.values())

    def _check_open(self) -> None:
        if self._closing:
            raise ValueError("the readers are closed")

    def _collect(self) -> list[Finished]:
        found = list(self._finished)
        self._finished.clear()
        return found

    def _serve(self) -> None:
        """Do parts of records until the end."""
        while True:
            with self._lock:
                taken = self._take()
                if taken is None:
                    return
            job, part = taken
            nbytes, error = 0, None
            try:
                nbytes = part()
            except BaseException as failure:
                error = failure
            with self._lock:
                self._end_part(job, nbytes, error)

    def _take(self) -> tuple[_Job, Callable[[], int]] | None:
        """Wait for a part of a record, None when the readers close; the lock is held."""
        while True:
            if self._parts:
                return self._parts.popleft()
            queue = self._urgent or (self._guesses if self._may_guess() else None)
            if queue:
                self._begin(queue.popitem(last=False)[1])
                continue
            if self._closing:
                return None
            self._idle += 1
            self._work.wait()
            self._idle -= 1

    def _begin(self, job: _Job) -> None:
        """Put a record's parts in line: one, or more if there are idle threads for them."""
        job.begun = time.perf_counter()
        self._under_way[job.is_urgent] += 1
        self._meter.begin(job.begun)
        parts = self._cut(job, (self._idle + 1) // (len(self._urgent) + 1))
        job.parts_left = len(parts)
        self._parts.extend((job, part) for part in parts)
        self._work.notify(len(parts) - 1)

    def _may_guess(self) -> bool:
        return not self._under_way[True] and self._under_way[False] < self._most_guesses

    def _cut(self, job: _Job, threads: int) -> Sequence[Callable[[], int]]:
        if self._split is not None and threads > 1 and job.is_urgent:
            with suppress(Exception):  # `load` then meets what is wrong, and its error is kept
                return self._split(job.key, job.address, threads)
        return (lambda: self._load(job.key, job.address),)

    def _end_part(self, job: _Job, nbytes: int, error: BaseException | None) -> None:
        """Note the end of a part; the last one of a record makes it finished."""
        job.nbytes += nbytes
        job.error = job.error or error
        job.parts_left -= 1
        self._meter.add_cpu()
        if job.parts_left:
            return
        now = time.perf_counter()
        self._under_way[job.is_urgent] -= 1
        if self._may_guess():
            self._work.notify(min(len(self._guesses), self._most_guesses))
        self._meter.end(job.begun, now, job.nbytes)
        done = Finished(job.key, job.address, job.nbytes, now - job.begun, job.error)
        self._finished.append(done)
        self._news.notify_all()
