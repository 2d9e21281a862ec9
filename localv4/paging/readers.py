"""A few threads that read records: urgent ones first, guesses as soon as no urgent one waits.

Records are read one after the other, each by several threads: so the first one is there early, a
guess that is not wanted any more has seldom begun, and what is urgent soon has all threads.
"""

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
    begun: float = 0.0
    parts_left: int = 1
    nbytes: int = 0
    error: BaseException | None = None


class _Queue:
    """Records to read in this order: parts of those that have begun, and the others."""

    def __init__(self) -> None:
        self.parts: deque[tuple[_Job, Callable[[], int]]] = deque()
        self.waiting: OrderedDict[Key, _Job] = OrderedDict()

    def __bool__(self) -> bool:
        return bool(self.parts or self.waiting)

    def move_to(self, other: "_Queue", key: Key) -> int:
        """Put a record behind those of another queue; return how many pieces of work that is."""
        job = self.waiting.pop(key, None)
        if job is not None:
            other.waiting[key] = job
            return 1
        moved = [part for part in self.parts if part[0].key == key]
        for part in moved:
            self.parts.remove(part)
        other.parts.extend(moved)
        return len(moved)


class Readers:
    """`count` threads that read records: with `split` in parts, else each as a whole, by `load`.

    A guess begins, and goes on part by part, only while nothing urgent waits for a thread, and has
    half of the threads at most: what is urgent next finds the others free. Results are collected by
    one thread, with `finished` or `wait`. A key may be under way once.
    """

    def __init__(self, load: Load, count: int, split: Split | None = None) -> None:
        self._load, self._split = load, split
        self._parts = count
        self._urgent, self._guesses = _Queue(), _Queue()
        self._finished: deque[Finished] = deque()
        self._lock = threading.Lock()
        self._work = threading.Condition(self._lock)
        self._news = threading.Condition(self._lock)
        self._idle = 0  # threads
        self._guessing, self._most_guessing = 0, max(1, count // 2)  # threads that read guesses
        self._under_way = 0  # records that have begun
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
        """Ask for several records at once, each at its address; of guesses, the last come first."""
        jobs = {key: _Job(key, address) for key, address in places}
        with self._lock:
            self._check_open()
            if urgent:
                self._urgent.waiting.update(jobs)
            else:
                self._guesses.waiting = OrderedDict([*jobs.items(), *self._guesses.waiting.items()])
            self._work.notify(len(jobs))

    def make_urgent(self, keys: Iterable[Key]) -> None:
        """Put guesses that turned out right behind the urgent ones; others are left alone."""
        with self._lock:
            for key in keys:
                self._work.notify(self._guesses.move_to(self._urgent, key))

    def cancel(self, keys: Iterable[Key]) -> list[tuple[Key, int]]:
        """Forget guesses that have not begun; return which ones those were, with addresses."""
        with self._lock:
            jobs = [self._guesses.waiting.pop(key, None) for key in keys]
            return [(job.key, job.address) for job in jobs if job is not None]

    @property
    def has_begun_all(self) -> bool:
        """Whether no urgent record waits: a guess would be read now, or soon."""
        with self._lock:
            return not self._urgent.waiting

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
            self._urgent.waiting.clear()
            self._guesses.waiting.clear()
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
        return len(self._urgent.waiting) + len(self._guesses.waiting) + self._under_way

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
                queue = self._wait_for_work()
                if queue is None:
                    return
                job, part = self._take(queue)
                is_guess = queue is self._guesses
                self._guessing += is_guess
            nbytes, error = 0, None
            try:
                nbytes = part()
            except BaseException as failure:
                error = failure
            with self._lock:
                self._guessing -= is_guess
                self._end_part(job, nbytes, error)

    def _wait_for_work(self) -> _Queue | None:
        """Return the queue to take from, None when the readers close; the lock is held."""
        while True:
            if self._urgent:
                return self._urgent
            if self._guesses and self._guessing < self._most_guessing:
                return self._guesses
            if self._closing:
                return None
            self._idle += 1
            self._work.wait()
            self._idle -= 1

    def _take(self, queue: _Queue) -> tuple[_Job, Callable[[], int]]:
        """Return the next part, of a record that begins now if none has begun."""
        if not queue.parts:
            _, job = queue.waiting.popitem(last=False)
            job.begun = time.perf_counter()
            self._under_way += 1
            self._meter.begin(job.begun)
            parts = self._cut(job)
            job.parts_left = len(parts)
            queue.parts.extend((job, part) for part in parts)
            self._work.notify(len(parts) - 1)
        return queue.parts.popleft()

    def _cut(self, job: _Job) -> Sequence[Callable[[], int]]:
        """Cut a record so that all threads can read it: it is there early, and in order."""
        if self._split is not None and self._parts > 1:
            with suppress(Exception):  # `load` then meets what is wrong, and its error is kept
                return self._split(job.key, job.address, self._parts)
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
        self._under_way -= 1
        self._meter.end(job.begun, now, job.nbytes)
        done = Finished(job.key, job.address, job.nbytes, now - job.begun, job.error)
        self._finished.append(done)
        self._news.notify_all()
