"""Guesses in a store: kept until their layer has passed, forgotten when a better one comes."""

import threading
import time
from collections.abc import Iterator

import numpy as np
import pytest

from localv4.errors import DoesNotFitError
from localv4.paging.arena import GRANULE_BYTES, Arena
from localv4.paging.paged_store import GUESS_SLOTS, PagedStore
from localv4.paging.policy import make_policy
from localv4.paging.readers import Key, Readers
from localv4.paging.store import ABSENT, ON_ITS_WAY
from localv4.paging.uses import Uses

LAYERS, EXPERTS, K = 20, 16, 3


class Case:
    """A store with room for some records; the disk can be held up."""

    def __init__(self, room: int, readers: int = 2) -> None:
        self.disk = threading.Event()
        self.disk.set()
        self.read: list[Key] = []
        self.uses = Uses(LAYERS, EXPERTS)
        self.uses.clock += 100
        sizes = np.full((LAYERS, EXPERTS), GRANULE_BYTES, np.int64)
        policy = make_policy("decay", self.uses)
        self.store = PagedStore(
            sizes, Arena(room * GRANULE_BYTES), Readers(self._load, readers), policy, self.uses
        )

    def _load(self, key: Key, address: int) -> int:
        self.read.append(key)
        assert self.disk.wait(10)
        return GRANULE_BYTES

    def use(self, layer: int, numbers: list[int]) -> None:
        """Let a token use experts of a layer."""
        self.store.request(layer, numbers)
        while (self.store.addresses[layer, numbers] <= 0).any():
            self.store.wait(layer, numbers)
        self.uses.record(layer, np.array(numbers))

    def settle(self) -> None:
        """Wait until nothing is being read, and let the store know."""
        while not self.store.readers.is_idle:
            time.sleep(0.001)
        self.store.guess(0, [])


@pytest.fixture
def case(request: pytest.FixtureRequest) -> Iterator[Case]:
    made = Case(request.param)
    yield made
    made.disk.set()
    made.store.close()


@pytest.mark.parametrize("case", [LAYERS * K + 20], indirect=True)
def test_every_layer_has_its_guesses(case: Case) -> None:
    for layer in range(LAYERS):
        case.store.guess(layer, [4, 5, 6])
        case.use(layer, [5, 6, 7])
    assert case.store.counts.guesses > GUESS_SLOTS
    case.store.end_token()
    case.settle()
    counts = case.store.counts
    # what was not read when the layer came is no guess any more
    assert counts.guesses_used == 2 * LAYERS
    assert 2 * LAYERS <= counts.guesses <= 3 * LAYERS
    assert set(case.read) >= {(layer, n) for layer in range(LAYERS) for n in (5, 6, 7)}


@pytest.mark.parametrize("case", [8], indirect=True)
def test_a_guess_stays_until_its_layer_has_passed(case: Case) -> None:
    case.use(0, [0, 1, 2])
    case.uses.clock += 1
    case.store.guess(3, [7, 8])
    case.settle()
    for layer in (0, 1, 2):
        case.use(layer, [9, 10])
        assert (case.store.addresses[3, [7, 8]] > 0).all()
    case.use(3, [7])
    assert case.read.count((3, 7)) == 1
    case.use(4, [1, 2])
    case.use(5, [1, 2])  # 8 is the first to go now that its layer has passed
    assert case.store.addresses[3, 8] == ABSENT and case.store.addresses[3, 7] > 0
    assert (case.store.counts.guesses, case.store.counts.guesses_used) == (2, 1)


@pytest.mark.parametrize("case", [12], indirect=True)
def test_a_better_guess_takes_the_place_of_one_that_has_not_begun(case: Case) -> None:
    case.disk.clear()
    case.store.request(0, [0, 1])
    assert not case.store.may_guess or len(case.read) == 2
    case.store.guess(1, [3, 4])
    assert case.store.addresses[1, 3] == ON_ITS_WAY
    case.store.guess(1, [4, 5])
    assert case.store.addresses[1, [3, 4, 5]].tolist() == [ABSENT, ON_ITS_WAY, ON_ITS_WAY]
    case.store.request(1, [5, 6])  # 4 is not wanted, and 5 is wanted now
    assert case.store.addresses[1, 4] == ABSENT
    assert case.store.arena.used == 4 * GRANULE_BYTES
    case.disk.set()
    case.settle()
    assert sorted(case.read) == [(0, 0), (0, 1), (1, 5), (1, 6)]
    assert case.store.counts.guesses == 1


@pytest.mark.parametrize("case", [3], indirect=True)
def test_guesses_make_room_for_what_is_needed(case: Case) -> None:
    case.store.guess(1, [3, 4])
    case.settle()
    case.use(0, [0, 1, 2])
    assert (case.store.addresses[0, :3] > 0).all()
    with pytest.raises(DoesNotFitError):
        case.use(0, [0, 1, 2, 3])


@pytest.mark.parametrize("case", [4], indirect=True)
def test_what_a_token_is_known_to_need_stays(case: Case) -> None:
    case.use(1, [0, 1])
    case.uses.clock += 5
    case.store.foresee({0: [4, 5], 1: [0, 1]})
    case.settle()
    assert (case.store.addresses[1, :2] > 0).all() and (case.store.addresses[0, 4:6] > 0).all()
    assert len(case.read) == 4
