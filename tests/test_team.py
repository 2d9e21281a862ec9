"""A team runs every operation of a program once, in order, whatever sleeps or is missing a core."""

import os
import threading
import time

import numpy as np
import pytest
from numpy.typing import NDArray

if os.environ.get("NUMBA_DISABLE_JIT") == "1":
    pytest.skip("threads in kernels need the compiler", allow_module_level=True)

from localv4.kernels import activations
from localv4.kernels.operation import ALONGSIDE, QUANTIZE, WORDS
from localv4.kernels.packed import BLOCK
from localv4.kernels.team import MISSED_CALL_S, Team

COUNT = 64 * BLOCK


class Rounding:
    """A program that rounds `repeats` inputs one after another, and its outputs."""

    def __init__(self, repeats: int) -> None:
        rng = np.random.default_rng(1)
        self.x = rng.standard_normal((repeats, COUNT)).astype(np.float32)
        self.q = np.zeros((repeats, COUNT), np.int8)
        self.d = np.zeros((repeats, COUNT // BLOCK), np.float32)
        self.b = np.zeros((repeats, activations.sum_bytes(COUNT)), np.uint8)
        self.program = np.zeros((repeats, WORDS), np.int64)
        for i in range(repeats):
            buffers = (part[i].ctypes.data for part in (self.q, self.d, self.b))
            self.program[i, :6] = (QUANTIZE, self.x[i].ctypes.data, COUNT // BLOCK, *buffers)

    def expected(self) -> NDArray[np.float32]:
        """Scales of all blocks."""
        sizes = np.abs(self.x.reshape(len(self.x), -1, BLOCK)).max(2)
        return (sizes * np.float32(1 / 127)).astype(np.float32)

    def check(self) -> None:
        """Every block was done, and is wiped for the next time."""
        assert np.array_equal(self.d, self.expected())
        assert np.abs(self.q).max() == 127
        self.d[:], self.q[:] = 0, 0


@pytest.mark.parametrize("members", [1, 2, 3, 8])
def test_every_operation_is_done(members: int) -> None:
    team, work = Team(members), Rounding(20)
    for _ in range(50):
        team.run(work.program)
        work.check()
    team.close()


def test_operations_alongside() -> None:
    team, work = Team(3), Rounding(20)
    work.program[:, ALONGSIDE] = 1
    for _ in range(50):
        team.run(work.program)
        work.check()
    team.close()


def test_sleeping_helpers_wake_up() -> None:
    team, work = Team(3), Rounding(4)
    for pause_s in (0, 0.001, 0.01, 2.5 * MISSED_CALL_S, 0):
        time.sleep(pause_s)
        team.run(work.program)
        work.check()
    team.close()


def test_helpers_end_with_their_team() -> None:
    others, work = set(threading.enumerate()), Rounding(1)
    team = Team(4)
    team.run(work.program)
    helpers = set(threading.enumerate()) - others
    assert len(helpers) == 3
    del team
    for helper in helpers:
        helper.join(10)
        assert not helper.is_alive()


def test_many_teams_take_turns() -> None:
    teams, work = [Team(2) for _ in range(5)], Rounding(3)
    for _ in range(20):
        for team in teams:
            team.run(work.program)
            work.check()
    for team in teams:
        team.close()
