"""Which records leave a store: those that wait to go, then the coldest, now or beforehand."""

import numpy as np
import pytest

from localv4.paging.departures import PREPARED, Departures
from localv4.paging.policy import Policy, make_policy
from localv4.paging.uses import Uses

LAYERS, EXPERTS, SIZE = 4, 40, 10
Key = tuple[int, int]


class Case:
    """A store of which every second record is in memory; the higher its number, the hotter."""

    def __init__(self) -> None:
        self.uses = Uses(LAYERS, EXPERTS)
        self.policy: Policy = make_policy("lfu", self.uses)
        self.uses.clock += 100
        self.uses.heat[:] = np.arange(LAYERS * EXPERTS).reshape(LAYERS, EXPERTS)
        self.uses.last[:] = 1
        self.addresses = np.zeros((LAYERS, EXPERTS), np.int64)
        self.addresses[:, ::2] = 1 + np.arange(LAYERS * EXPERTS // 2).reshape(LAYERS, -1)
        nbytes = np.full((LAYERS, EXPERTS), SIZE, np.int64)
        self.departures = Departures(self.policy, self.uses, self.addresses, nbytes)
        self.kept = np.zeros((LAYERS, EXPERTS), bool)

    def choose(self, count: int, *spared: Key) -> list[Key]:
        return self.departures.choose(count * SIZE, set(spared), self.kept)


@pytest.mark.parametrize("prepared", [True, False])
def test_the_coldest_go_but_for_those_that_must_stay(prepared: bool) -> None:
    case = Case()
    if prepared:
        case.departures.prepare(case.kept)
    case.kept[0, 4] = True
    assert case.choose(3, (0, 2), (3, 0)) == [(0, 0), (0, 6), (0, 8)]
    assert case.choose(0) == []


def test_what_is_going_goes_first_unless_it_is_used_again() -> None:
    case = Case()
    case.departures.prepare(case.kept)
    for number in (10, 20, 30):
        case.departures.add((3, number))
    case.departures.discard((3, 20))
    case.uses.clock += 1
    case.uses.last[3, 10] = case.uses.clock[0]
    assert case.choose(2) == [(3, 30), (0, 0)]
    assert case.departures.going() == [(3, 30)]


def test_what_was_chosen_beforehand_is_looked_at_again() -> None:
    case = Case()
    case.departures.prepare(case.kept)
    case.uses.last[0, 0] = case.uses.clock[0]  # used
    case.addresses[0, 2] = 0  # gone
    assert case.choose(1) == [(0, 4)]


def test_more_than_was_chosen_beforehand_can_go() -> None:
    case = Case()
    case.departures.prepare(case.kept)
    found = case.choose(PREPARED + 5)
    assert len(set(found)) == len(found) == PREPARED + 5
    assert sorted(found) == found  # from the coldest on


def test_a_token_is_prepared_for_once() -> None:
    case = Case()
    case.departures.prepare(case.kept)
    assert case.choose(1) == [(0, 0)]
    case.addresses[0, 0] = 0
    case.uses.heat[3, 38] = -1.0  # the coldest now
    case.departures.prepare(case.kept)
    assert case.choose(1) == [(0, 2)]
    case.uses.clock += 1
    case.departures.prepare(case.kept)
    assert case.choose(1) == [(3, 38)]
