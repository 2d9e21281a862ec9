"""A team of threads that runs one compiled program together: start once, spin briefly, then sleep.

`prange` costs 3 to 100 microseconds per loop, by threading layer. Here helpers stay inside one
compiled function and wait for the next program by spinning, so that starting one costs about a
microsecond; after a while without work they leave it and sleep until they are woken.
"""

import ctypes
import os
import threading
import time
import weakref

import numpy as np

from localv4.kernels.compiler import kernel
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

_LINE = 64
"""Bytes of a cache line; every control word has a line of its own."""

# control words, as byte offsets
EPOCH, STOPPED, PROGRAM, LENGTH, ARRIVED, TURN, ASLEEP, YIELD, HALT = (_LINE * i for i in range(9))
_CONTROL_BYTES = _LINE * 10

SPINS = 30_000
"""Turns that a helper waits for work before it sleeps: about a millisecond."""

WAKING_S = 20e-6
"""Seconds between two looks at helpers that are waking up."""

MISSED_CALL_S = 0.1
"""Seconds after which a sleeper looks for work by itself."""

SPINS_AT_BARRIER = 2_000
"""Turns between two offers to the system to run somebody else: a member may lack a core."""


@device
def wait_for_all(control: int, members: int) -> bool:
    """Return when every member has called this for the same time; say whether one halted.

    The last to arrive decides that for all: TURN counts in steps of two, its lowest bit is the
    answer.
    """
    turn = atomic_load(control + TURN)
    if atomic_add(control + ARRIVED, 1) == members - 1:
        halted = was_halted(control)
        atomic_store(control + ARRIVED, 0)
        atomic_store(control + TURN, ((turn >> 1) + 1) * 2 + int(halted))
        return halted
    spins = 0
    now = turn
    while now == turn:
        pause()
        spins += 1
        if spins == SPINS_AT_BARRIER:
            spins = 0
            call_address(atomic_load(control + YIELD))
        now = atomic_load(control + TURN)
    halted_by_one: bool = now & 1 == 1
    return halted_by_one


@device
def was_halted(control: int) -> bool:
    """Say whether an operation has halted the program, and forget it."""
    if atomic_load(control + HALT) == 0:
        return False
    atomic_store(control + HALT, 0)
    return True


@device
def wait_for_program(control: int, epoch: int) -> bool:
    """Spin until a program after `epoch` is posted; return False when it gets quiet."""
    for _ in range(SPINS):
        if atomic_load(control + EPOCH) != epoch:
            return True
        pause()
    return False


@device
def post(control: int, program: int, length: int) -> None:
    """Give the helpers a program to run."""
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
        asleep: int = atomic_load(control + ASLEEP)
        if asleep > 0:
            return -asleep
        post(control, program, length)
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
def fall_asleep(control: int, change: int) -> int:
    """Count a sleeper in (1) or out (-1); return the epoch, read after the count."""
    atomic_add(control + ASLEEP, change)
    epoch: int = atomic_load(control + EPOCH)
    return epoch


class _Shared:
    """What helpers and team have in common; helpers must not keep the team itself alive."""

    def __init__(self, members: int) -> None:
        self.members = members
        self.wake = threading.Condition()
        self._calls = 0
        self._memory = np.zeros(_CONTROL_BYTES // 8 + 8, np.int64)
        self.control = -(-self._memory.ctypes.data // _LINE) * _LINE
        self._word(YIELD)[0] = _yield_address()

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

    def help(self, member: int) -> None:
        """Be a helper until the team is dismissed."""
        epoch = 0
        while epoch >= 0:
            epoch = take_part(self.control, member, self.members, epoch, 0, 0)
            if epoch >= 0:
                self._sleep(epoch)

    def _sleep(self, epoch: int) -> None:
        with self.wake:
            calls = self._calls
            # The time-out is for a program that was posted between the leader's look at the
            # sleepers and this count: the epoch tells.
            while fall_asleep(self.control, 1) == epoch and calls == self._calls:
                self.wake.wait(MISSED_CALL_S)
                fall_asleep(self.control, -1)
            fall_asleep(self.control, -1)


class Team:
    """`members` threads, the caller's included. One program at a time."""

    def __init__(self, members: int) -> None:
        self.members = members
        self._shared = _Shared(members)
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
        program[:, COUNTER] = 0
        shared, address = self._shared, program.ctypes.data
        length = program.shape[0]
        while (done := take_part(shared.control, 0, self.members, 0, address, length)) < 0:
            shared.rouse()
            time.sleep(WAKING_S)
        return done

    def close(self) -> None:
        """Let the helpers end; the team cannot be used any more."""
        self._dismiss()


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
