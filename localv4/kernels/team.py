"""A team of threads that runs one compiled program together: start once, spin briefly, then sleep.

`prange` costs 3 to 100 microseconds per loop, by threading layer. Here helpers stay inside one
compiled function and wait for the next program by spinning, so that starting one costs about a
microsecond; after a while without work they leave it and sleep until they are woken.

Who waits offers its core to others every few microseconds: on a machine with fewer free cores than
members, the one that everybody waits for may be lacking one (measured: 3 members on 2 cores need 5
microseconds for an operation so, 100 with an offer every 20 microseconds).
"""

import ctypes
import os
import threading
import time
import weakref
from functools import cache

import numpy as np

from localv4.kernels.compiler import kernel
from localv4.kernels.cores import Cpu, pinning_order, usable_cpus
from localv4.kernels.device import device
from localv4.kernels.memory import (
    atomic_add,
    atomic_load,
    atomic_store,
    call_address,
    call_operation,
    pause,
)
from localv4.kernels.operation import ALONGSIDE, COUNTER, WORDS
from localv4.kernels.pinning import Release, bind, bind_nowhere

_LINE = 64
"""Bytes of a cache line; every control word has a line of its own."""

# control words, as byte offsets
EPOCH, STOPPED, PROGRAM, LENGTH, ARRIVED, TURN, ASLEEP, YIELD, HALT, SPINS = (
    _LINE * i for i in range(10)
)
_CONTROL_BYTES = _LINE * 11

OFFER_NS = 2_000
"""Nanoseconds that a waiting member spins between two offers of its core to others."""

IDLE_NS = 2_000_000
"""Nanoseconds, at least, that a helper waits for work before it sleeps."""

WAKING_S = 20e-6
"""Seconds between two looks at helpers that are waking up."""

POSTING = 1 << 32
"""What ASLEEP, the number of sleepers, has in addition while a program is being posted."""

_TRIAL_SPINS = 2_000


@device
def wait_for_all(control: int, members: int) -> bool:
    """Return when every member has called this for the same time; say whether one halted.

    The last to arrive decides that for all: TURN counts in steps of two, its lowest bit is the
    answer.
    """
    turn = atomic_load(control + TURN)
    if atomic_add(control + ARRIVED, 1) == members - 1:
        halted = bool(atomic_load(control + HALT) != 0)
        atomic_store(control + ARRIVED, 0)
        atomic_store(control + TURN, ((turn >> 1) + 1) * 2 + int(halted))
        return halted
    while not changes(control, TURN, turn):
        pass
    return bool(atomic_load(control + TURN) & 1 == 1)


@device
def changes(control: int, at: int, value: int) -> bool:
    """Spin for OFFER_NS; return True as soon as a control word has another value."""
    for _ in range(atomic_load(control + SPINS)):
        if atomic_load(control + at) != value:
            return True
        pause()
    call_address(atomic_load(control + YIELD))
    return False


@device
def wait_for_program(control: int, epoch: int) -> bool:
    """Spin until a program after `epoch` is posted; return False when it gets quiet."""
    for _ in range(IDLE_NS // OFFER_NS):
        if changes(control, EPOCH, epoch):
            return True
    return False


@device
def post(control: int, program: int, length: int) -> None:
    """Give the helpers a program to run."""
    atomic_store(control + HALT, 0)
    atomic_store(control + PROGRAM, program)
    atomic_store(control + LENGTH, length)
    atomic_add(control + EPOCH, 1)


@kernel("i8(i8, i8, i8, i8, i8, i8)")
def take_part(
    control: int, member: int, members: int, epoch: int, program: int, length: int
) -> int:
    """Member 0 runs a program with all others; they take part in every program after `epoch`.

    Member 0 gets the number of operations that were done, fewer than `length` when one of them
    halted the program; or, having done nothing, minus the number of members that are asleep. The
    others get the epoch of their last program when it gets quiet, -1 when the team was dismissed.
    Posting and running a program are one call, since an exception between them would leave the
    helpers waiting.
    """
    if member == 0:
        asleep: int = atomic_add(control + ASLEEP, POSTING)
        if asleep == 0:
            post(control, program, length)
        atomic_add(control + ASLEEP, -POSTING)
        if asleep > 0:
            return -asleep
    while True:
        if member > 0:
            if not wait_for_program(control, epoch):
                return epoch
            if atomic_load(control + STOPPED) != 0:
                return -1
            epoch += 1
        first = atomic_load(control + PROGRAM)
        count = atomic_load(control + LENGTH)
        done = 0
        while done < count:
            operation = first + 8 * WORDS * done
            call_operation(atomic_load(operation), operation, member, members)
            done += 1
            if done < count and atomic_load(operation + 8 * ALONGSIDE) != 0:
                continue
            if wait_for_all(control, members):
                break
        if member == 0:
            return done


@kernel("i8(i8, i8)")
def fall_asleep(control: int, epoch: int) -> int:
    """Count a sleeper and return 1, unless a program after `epoch` has been or is being posted.

    The leader looks at the count in the same moment in which it marks that it is posting, so
    either it sees the sleeper or the sleeper sees its mark.
    """
    before = atomic_add(control + ASLEEP, 1)
    if before < POSTING and atomic_load(control + EPOCH) == epoch:
        return 1
    atomic_add(control + ASLEEP, -1)
    return 0


@kernel("void(i8)")
def wake_up(control: int) -> None:
    """Count a sleeper out."""
    atomic_add(control + ASLEEP, -1)


@kernel("void(i8)")
def spin(turns: int) -> None:
    """Pause as often as a waiting member does in so many turns."""
    for _ in range(turns):
        pause()


class _Shared:
    """What helpers and team have in common; helpers must not keep the team itself alive."""

    def __init__(self, members: int, cpus: list[Cpu]) -> None:
        self.members = members
        self.wake = threading.Condition()
        self._cpus = cpus
        self._calls = 0
        self._memory = np.zeros(_CONTROL_BYTES // 8 + 8, np.int64)
        self.control = -(-self._memory.ctypes.data // _LINE) * _LINE
        self._word(YIELD)[0] = _yield_address()
        self._word(SPINS)[0] = _spins(OFFER_NS)

    def _word(self, at: int) -> np.ndarray[tuple[int], np.dtype[np.int64]]:
        start = (self.control + at - self._memory.ctypes.data) // 8
        return self._memory[start : start + 1]

    def dismiss(self) -> None:
        """Let all helpers end."""
        self._word(STOPPED)[0] = 1
        self._word(EPOCH)[0] += 1
        self.rouse()

    def rouse(self) -> None:
        """Wake the sleepers."""
        with self.wake:
            self._calls += 1
            self.wake.notify_all()

    def bind(self, member: int) -> Release:
        """Keep the calling thread on the processor of a member, if members have their own."""
        return bind(self._cpus[member % len(self._cpus)]) if self._cpus else bind_nowhere()

    def help(self, member: int) -> None:
        """Be a helper until the team is dismissed."""
        self.bind(member)
        epoch = 0
        while epoch >= 0:
            epoch = take_part(self.control, member, self.members, epoch, 0, 0)
            if epoch >= 0:
                self._sleep(epoch)

    def _sleep(self, epoch: int) -> None:
        with self.wake:
            calls = self._calls
            if fall_asleep(self.control, epoch):
                self.wake.wait_for(lambda: calls != self._calls)
                wake_up(self.control)


class Team:
    """`members` threads, the caller's included. One program at a time.

    With `pin` each stays on one processor, on cores of their own as long as there are any, fast
    ones first; the caller only while it is in `run`. Ignored where the system cannot (macOS).
    """

    def __init__(self, members: int, pin: bool = False) -> None:
        self.members = members
        self._shared = _Shared(members, pinning_order(usable_cpus()) if pin else [])
        for member in range(1, members):
            threading.Thread(
                target=self._shared.help, args=(member,), name=f"kernels-{member}", daemon=True
            ).start()
        self._dismiss = weakref.finalize(self, self._shared.dismiss)

    @property
    def halt_address(self) -> int:
        """Where an operation writes a 1 to end the program after itself."""
        return self._shared.control + HALT

    def run(self, program: np.ndarray[tuple[int, int], np.dtype[np.int64]]) -> int:
        """Run a program (operations, WORDS); return how many were done: all, unless one halted it.

        The arrays behind its addresses must be kept alive by the caller. Layout: `operation`.
        """
        shared, address, length = self._shared, program.ctypes.data, program.shape[0]
        if length == 0:
            return 0  # without a barrier members would lose each other
        program[:, COUNTER] = 0
        release = shared.bind(0)
        try:
            while (done := take_part(shared.control, 0, self.members, 0, address, length)) < 0:
                shared.rouse()
                time.sleep(WAKING_S)
        finally:
            release()
        return done

    def close(self) -> None:
        """Let the helpers end; the team cannot be used any more."""
        self._dismiss()


@cache
def _spins(nanoseconds: int) -> int:
    """Return how many turns of waiting take so long: one takes 1 to 50 ns, by processor."""
    times = []
    for _ in range(5):
        start = time.perf_counter_ns()
        spin(_TRIAL_SPINS)
        times.append(time.perf_counter_ns() - start)
    return max(1, nanoseconds * _TRIAL_SPINS // max(1, min(times)))


@cache
def _yield_address() -> int:
    """Return the address of a function that lets another thread run, 0 where none is known."""
    try:
        if os.name == "nt":
            function = ctypes.windll.kernel32.SwitchToThread  # type: ignore[attr-defined]
        else:
            function = ctypes.CDLL(None).sched_yield
    except (AttributeError, OSError):
        return 0
    return ctypes.cast(function, ctypes.c_void_p).value or 0
