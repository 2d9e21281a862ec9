"""A team runs every operation of a program once, in order, whatever sleeps or is missing a core."""

import ctypes
import os
import random
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import numba
import numpy as np
import pytest
from numpy.typing import NDArray

if numba.config.DISABLE_JIT:
    pytest.skip("threads in kernels need the compiler", allow_module_level=True)

from team_entries import append, halt_when

from localv4.kernels import pinning
from localv4.kernels import team as team_module
from localv4.kernels.cores import Cpu, pinning_order, usable_cpus
from localv4.kernels.operation import ALONGSIDE, WORDS
from localv4.kernels.pinning import bind
from localv4.kernels.team import IDLE_NS, Team


class Roll:
    """A program in which all members take a chunk of every operation and note its number."""

    def __init__(self, operations: int, members: int) -> None:
        self.members = members
        self.seen = np.zeros(members, np.int64)
        self.log = np.zeros(operations * members + 1, np.int64)
        self.program = np.zeros((operations, WORDS), np.int64)
        for i in range(operations):
            words = (append.address, self.log.ctypes.data, i + 1, self.seen.ctypes.data)
            self.program[i, : len(words)] = words

    def check(self, done: int) -> None:
        """All members did the first operations, one after another, and no other; wipe that."""
        expected = np.repeat(np.arange(1, done + 1), self.members)
        count = int(self.log[0])
        assert count == done * self.members
        assert np.array_equal(self.log[1 : count + 1], expected)
        assert np.array_equal(self.seen, np.full(self.members, done))
        self.log[:], self.seen[:] = 0, 0


@pytest.fixture(params=[1, 2, 3, 8])
def members(request: pytest.FixtureRequest) -> int:
    """How many take part: fewer than there are cores, and more."""
    return int(request.param)


@pytest.mark.parametrize("pin", [False, True])
def test_every_operation_is_done_by_all_in_order(members: int, pin: bool) -> None:
    team, roll = Team(members, pin), Roll(20, members)
    for _ in range(30):
        assert team.run(roll.program) == 20
        roll.check(20)
    team.close()


def test_operations_alongside_are_done_before_the_next_barrier() -> None:
    team, roll = Team(3), Roll(20, 3)
    roll.program[:, ALONGSIDE] = 1
    roll.program[9, ALONGSIDE] = 0
    for _ in range(50):
        team.run(roll.program)
        first, second = roll.log[1:31], roll.log[31:61]
        assert sorted(first) == sorted([*range(1, 11)] * 3)
        assert sorted(second) == sorted([*range(11, 21)] * 3)
        roll.log[:] = 0
    team.close()


def test_counters_start_anew() -> None:
    team, roll = Team(2), Roll(3, 2)
    roll.program[:, -1] = 99
    team.run(roll.program)
    roll.check(3)
    team.close()


def test_an_empty_program() -> None:
    team, roll = Team(3), Roll(5, 3)
    for _ in range(100):
        assert team.run(roll.program[:0]) == 0
        team.run(roll.program)
        roll.check(5)
    team.close()


def with_halt(team: Team, roll: Roll, at: int, limit: int) -> NDArray[np.int64]:
    """Let the operation number `at` halt when it is called for the `limit`th time; its counter."""
    counter = np.zeros(1, np.int64)
    words = (halt_when.address, counter.ctypes.data, limit, team.halt_address)
    roll.program[at, : len(words)] = words
    return counter


def test_a_halted_program_goes_on_where_it_was(members: int) -> None:
    team, roll = Team(members), Roll(6, members)
    counter = with_halt(team, roll, 2, members)
    for _ in range(50):
        counter[0] = 0
        assert team.run(roll.program) == 3
        assert roll.log[0] == 2 * members and counter[0] == members
        assert team.run(roll.program[3:]) == 3
        assert roll.log[0] == 5 * members
        # not halted: the counter is beyond the limit
        roll.log[:] = 0
        assert team.run(roll.program) == 6
        assert roll.log[0] == 5 * members
        roll.log[:] = 0
    team.close()


def test_the_last_operation_halts(members: int) -> None:
    team, roll = Team(members), Roll(3, members)
    counter = with_halt(team, roll, 2, 1)
    for _ in range(30):
        counter[0] = 0
        assert team.run(roll.program) == 3
        roll.log[:] = 0
    team.close()


def test_a_halt_alongside_counts_at_the_barrier() -> None:
    team, roll = Team(3), Roll(4, 3)
    with_halt(team, roll, 0, 1)
    roll.program[0, ALONGSIDE] = 1
    assert team.run(roll.program) == 2
    team.close()


def test_a_late_halt_does_not_stop_the_next_program() -> None:
    team, roll = Team(2), Roll(4, 2)
    ctypes.c_int64.from_address(team.halt_address).value = 1
    assert team.run(roll.program) == 4
    roll.check(4)
    team.close()


def sleepers(team: Team) -> int:
    """How many helpers are asleep."""
    return ctypes.c_int64.from_address(team._shared.control + team_module.ASLEEP).value


def wait_until(condition: Callable[[], bool]) -> None:
    """Return as soon as something holds; fail when it does not within a minute."""
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.001)


def test_helpers_without_work_sleep_and_wake_up(members: int) -> None:
    team, roll = Team(members), Roll(4, members)
    for _ in range(10):
        wait_until(lambda: sleepers(team) == members - 1)
        assert team.run(roll.program) == 4
        roll.check(4)
    team.close()


def test_programs_that_come_as_helpers_fall_asleep() -> None:
    teams = {members: Team(members) for members in (2, 3, 8)}
    chance = random.Random(1)
    idle_s = IDLE_NS / 1e9
    for _ in range(150):
        members = chance.choice(list(teams))
        roll = Roll(3, members)
        assert teams[members].run(roll.program) == 3
        roll.check(3)
        time.sleep(chance.choice((0, 0, idle_s / 2, idle_s, 1.5 * idle_s)))
    for team in teams.values():
        team.close()


def test_many_teams_at_the_same_time() -> None:
    failures: list[BaseException] = []

    def work(members: int, pin: bool) -> None:
        try:
            team, roll = Team(members, pin), Roll(10, members)
            for _ in range(20):
                assert team.run(roll.program) == 10
                roll.check(10)
            team.close()
        except BaseException as error:
            failures.append(error)

    threads = [
        threading.Thread(target=work, args=(members, pin))
        for members in (1, 2, 3)
        for pin in (False, True)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(100)
        assert not thread.is_alive()
    assert not failures


def test_a_team_serves_one_thread_after_another() -> None:
    team, roll = Team(3), Roll(5, 3)

    def work() -> None:
        team.run(roll.program)
        roll.check(5)

    for _ in range(10):
        thread = threading.Thread(target=work)
        thread.start()
        thread.join(60)
        assert not thread.is_alive()
    team.close()


def test_helpers_end_with_their_team() -> None:
    others, roll = set(threading.enumerate()), Roll(1, 4)
    team = Team(4)
    team.run(roll.program)
    helpers = set(threading.enumerate()) - others
    assert len(helpers) == 3
    del team
    for helper in helpers:
        helper.join(60)
        assert not helper.is_alive()


def test_a_process_may_end_with_its_team() -> None:
    code = """
import numpy as np, threading
from team_entries import append
from test_team import Roll
from localv4.kernels.team import Team
team, roll = Team(4), Roll(2, 4)
team.run(roll.program)
print(roll.log[0])
"""
    command = [sys.executable, "-c", code]
    result = subprocess.run(
        command, cwd=Path(__file__).parent, capture_output=True, text=True, timeout=120
    )
    assert result.stdout == "8\n" and result.returncode == 0, result.stderr


# what the process had before any team was there
ALLOWED = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else set()

needs_affinity = pytest.mark.skipif(
    not hasattr(os, "sched_setaffinity"), reason="threads cannot be asked where they may run"
)


@needs_affinity
def test_only_helpers_stay_bound() -> None:
    team, roll = Team(3, pin=True), Roll(2, 3)
    team.run(roll.program)
    assert os.sched_getaffinity(0) == ALLOWED
    helpers = {t.native_id for t in threading.enumerate() if t.name in ("kernels-1", "kernels-2")}
    order = [cpu.number for cpu in pinning_order(usable_cpus())]
    bound = [os.sched_getaffinity(helper) for helper in helpers if helper is not None]
    assert {order[1 % len(order)]} in bound and {order[2 % len(order)]} in bound
    team.close()


@needs_affinity
def test_a_thread_that_was_bound_is_released() -> None:
    cpu = usable_cpus()[-1]
    release = bind(cpu)
    assert os.sched_getaffinity(0) == {cpu.number}
    release()
    assert os.sched_getaffinity(0) == ALLOWED


@pytest.mark.parametrize("platform", ["linux", "darwin", "win32"])
def test_a_system_that_refuses_to_bind(platform: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(_: object) -> None:
        raise PermissionError("not here")

    monkeypatch.setattr(pinning, "_bind_linux", refuse)
    monkeypatch.setattr(pinning, "_bind_windows", refuse)
    monkeypatch.setattr(sys, "platform", platform)
    bind(Cpu(0, 0))()


def test_waiting_is_measured_in_time() -> None:
    spins = ctypes.c_int64.from_address(Team(1)._shared.control + team_module.SPINS).value
    # a turn takes no less than a cycle and no more than a hundred nanoseconds
    assert team_module.OFFER_NS / 100 <= spins <= team_module.OFFER_NS * 10
