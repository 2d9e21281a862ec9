"""Memory for records: bounded, without dead ends for mixed sizes, given back from the tail."""

import ctypes
import random
import sys
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import numpy as np
import psutil
import pytest
from numpy.typing import NDArray

from localv4.kernels.buffers import SLACK_BYTES
from localv4.paging import address_space
from localv4.paging.address_space import HUGE_BYTES
from localv4.paging.arena import GRANULE_BYTES, Arena, footprint
from localv4.paging.raw_file import memory

G = GRANULE_BYTES
FLASH_SIZES = (204 * G, 156 * G, 120 * G)


def equal_costs(addresses: NDArray[np.int64]) -> NDArray[np.float64]:
    return np.ones(len(addresses))


def taken(arena: Arena, nbytes: int) -> int:
    address = arena.take(nbytes)
    assert address is not None
    return address


def fill(arena: Arena, nbytes: int) -> list[int]:
    """Take places until there is no room."""
    places = []
    while (address := arena.take(nbytes)) is not None:
        places.append(address)
    return places


def check_apart(places: dict[int, int], arena: Arena) -> None:
    """No place overlaps another, and all of them are what the arena says is used."""
    order = sorted(places)
    for before, after in pairwise(order):
        assert before + places[before] <= after
    assert sum(map(footprint, places.values())) == arena.used <= arena.capacity
    assert order == [] or order[-1] + places[order[-1]] - order[0] <= arena.capacity


def test_places_are_aligned_apart_and_within_capacity() -> None:
    arena = Arena(10 * G + 5)
    assert arena.capacity == 10 * G
    places = fill(arena, 3 * G - 100)
    assert len(places) == 3 and all(place % G == 0 for place in places)
    check_apart(dict.fromkeys(places, 3 * G), arena)
    assert arena.take(2 * G) is None
    taken(arena, G)
    assert arena.used == arena.capacity
    arena.close()


def test_a_place_is_used_again_and_neighbours_join() -> None:
    arena = Arena(4 * G)
    a, b, c, d = fill(arena, G)
    for place in (c, a, b):
        arena.give_back(place)
    assert arena.take(3 * G) == a
    with pytest.raises(KeyError):
        arena.give_back(b)
    arena.give_back(d)
    assert arena.take(G) == d
    arena.close()


def test_an_exact_hole_is_preferred_to_a_lower_one() -> None:
    arena = Arena(9 * G)
    three, _, two, _ = (taken(arena, n * G) for n in (3, 1, 2, 3))
    arena.give_back(three)
    arena.give_back(two)
    assert arena.take(2 * G) == two
    arena.close()


def test_memory_behind_the_last_record_can_be_read() -> None:
    arena = Arena(2 * G)
    last = taken(arena, 2 * G)
    memory(last, 2 * G)[:] = b"x" * (2 * G)
    assert bytes(memory(last + 2 * G, SLACK_BYTES)) == bytes(SLACK_BYTES)
    arena.close()


def test_memory_comes_when_it_is_used() -> None:
    process = psutil.Process()
    before = process.memory_info().rss
    arena = Arena(512 << 20)
    place = taken(arena, 64 << 20)
    memory(place, 64 << 20)[:] = b"\1" * (64 << 20)
    grown = process.memory_info().rss - before
    assert (64 << 20) <= grown < (200 << 20)  # the string of ones is part of it
    arena.close()


def test_what_to_evict_finds_the_cheapest_run() -> None:
    arena = Arena(8 * G)
    places = fill(arena, G)
    price = dict(zip(places, [1.0, 9, 1, 1, 9, 0.5, 9, 0.5], strict=True))

    def costs(addresses: NDArray[np.int64]) -> NDArray[np.float64]:
        return np.array([price[address] for address in addresses.tolist()])

    assert arena.what_to_evict(G, costs) in ([places[5]], [places[7]])
    assert arena.what_to_evict(2 * G, costs) == places[2:4]
    arena.give_back(places[6])
    assert arena.what_to_evict(2 * G, costs) in (places[5:6], places[7:8])
    assert arena.what_to_evict(G, costs) == []
    assert arena.what_to_evict(3 * G, costs) == [places[5], places[7]]
    assert arena.what_to_evict(9 * G, costs) is None
    arena.close()


def test_what_is_left_over_of_a_place_counts() -> None:
    """Of two records that cost the same, the one that fits goes."""
    arena = Arena(9 * G)
    _, two, _ = (taken(arena, n * G) for n in (3, 2, 4))
    assert arena.what_to_evict(2 * G, equal_costs) == [two]
    arena.close()


def test_records_that_must_stay_are_no_victims() -> None:
    arena = Arena(6 * G)
    places = fill(arena, G)

    def costs(addresses: NDArray[np.int64]) -> NDArray[np.float64]:
        return np.where(addresses == places[2], np.inf, 1.0)

    assert arena.what_to_evict(3 * G, costs) == places[3:]
    assert arena.what_to_evict(2 * G, costs) in (places[:2], places[3:5], places[4:])
    assert arena.what_to_evict(4 * G, costs) is None
    arena.close()


@pytest.mark.parametrize("seed", range(4))
def test_mixed_sizes_have_no_dead_end(seed: int) -> None:
    """Records of three sizes come and go; a third of them must stay at any time."""
    choose = random.Random(seed)
    arena = Arena(4000 * G)
    places: dict[int, int] = {}
    busy: list[int] = []

    def costs(addresses: NDArray[np.int64]) -> NDArray[np.float64]:
        return np.array([np.inf if a in busy else choose.random() for a in addresses.tolist()])

    use = []
    for _ in range(400):
        nbytes = choose.choice(FLASH_SIZES)
        address = arena.take(nbytes)
        if address is None:
            victims = arena.what_to_evict(nbytes, costs)
            assert victims
            for victim in victims:
                arena.give_back(victim)
                del places[victim]
            address = taken(arena, nbytes)
        places[address] = nbytes
        busy = [*busy[-4:], address]
        check_apart(places, arena)
        use.append(arena.used / arena.capacity)
    assert np.mean(use[200:]) > 0.85
    arena.close()


def test_shrinking_names_what_is_in_the_way_and_gives_memory_back() -> None:
    arena = Arena(64 << 20)
    places = fill(arena, 4 << 20)
    for place in places:
        memory(place, 4 << 20)[:] = b"\2" * (4 << 20)
    in_the_way = arena.shrink(9 << 20)
    assert arena.capacity == 54 << 20  # ten of 64 MiB: whole large pages
    assert in_the_way == places[13:]
    assert arena.take(G) is None
    for place in in_the_way[1:]:
        arena.give_back(place)
    assert arena.release_tail() == 8 << 20  # the first of them reaches beyond the capacity
    assert arena.take(G) is None
    arena.give_back(in_the_way[0])
    assert arena.release_tail() == 2 << 20
    assert memory(places[0], 1)[0] == 2
    assert bytes(memory(places[-1], 4 << 20)) == bytes(4 << 20)
    assert arena.take(2 << 20) == in_the_way[0]
    arena.close()


def test_the_system_gets_the_memory() -> None:
    arena = Arena(96 << 20)
    place = taken(arena, 96 << 20)
    memory(place, 96 << 20)[:] = b"\3" * (96 << 20)
    process = psutil.Process()
    before = process.memory_info().rss
    assert arena.shrink(80 << 20) == [place]
    arena.give_back(place)
    assert arena.release_tail() == 80 << 20
    assert before - process.memory_info().rss > 76 << 20
    arena.close()


def test_growing_gives_the_tail_back_to_records() -> None:
    arena = Arena(64 << 20)
    places = fill(arena, 16 << 20)
    assert arena.shrink(30 << 20) == places[2:]
    arena.give_back(places[2])
    arena.grow(30 << 20)
    assert arena.capacity == 64 << 20
    assert arena.take(16 << 20) == places[2]  # the last one was in the way, and still is there
    assert arena.take(G) is None
    arena.grow(1 << 30)
    assert arena.capacity == arena.limit == 64 << 20
    arena.give_back(places[3])
    assert arena.take(16 << 20) == places[3]
    arena.close()


@pytest.mark.parametrize("seed", range(6))
def test_any_course_of_events_keeps_places_apart(seed: int) -> None:
    """At the end, with all records gone, the whole capacity is one place again."""
    choose = random.Random(seed)
    arena = Arena(choose.choice([60, 3000]) * G)
    places: dict[int, int] = {}
    in_the_way: list[int] = []
    for _ in range(600):
        what = choose.random()
        if what < 0.55:
            nbytes = choose.randint(1, arena.limit // 6)
            address = arena.take(nbytes)
            if address is not None:
                places[address] = nbytes
        elif what < 0.9 and places:
            gone = choose.choice(list(places))
            arena.give_back(gone)
            del places[gone]
        elif what < 0.95:
            in_the_way = arena.shrink(choose.randint(0, arena.limit // 10))
            assert in_the_way == sorted(in_the_way) and set(in_the_way) <= set(places)
        elif choose.random() < 0.3:
            for address in [place for place in in_the_way if place in places]:
                arena.give_back(address)
                del places[address]
            arena.release_tail()
        else:
            arena.grow(choose.randint(0, arena.limit // 10))
        order = sorted(places)
        assert all(a + places[a] <= b for a, b in pairwise(order))
        assert arena.used == sum(map(footprint, places.values()))
        assert arena.capacity <= arena.limit
    for address in places:
        arena.give_back(address)
    arena.release_tail()
    assert arena.used == 0 and arena.release_tail() == 0
    assert arena.take(arena.capacity + 1) is None
    assert arena.capacity == 0 or arena.take(arena.capacity) is not None
    arena.close()


def test_a_capacity_of_nothing_has_no_room() -> None:
    arena = Arena(0)
    assert arena.take(1) is None and arena.what_to_evict(1, equal_costs) is None
    arena.close()


def test_shrinking_to_nothing_and_back() -> None:
    arena = Arena(40 << 20)
    place = taken(arena, 40 << 20)
    assert arena.shrink(1 << 40) == [place]
    arena.give_back(place)
    arena.release_tail()
    assert (arena.capacity, arena.used) == (0, 0)
    arena.grow(HUGE_BYTES + 1)
    assert arena.capacity == HUGE_BYTES and arena.take(HUGE_BYTES) == place
    arena.close()


def test_too_many_addresses_are_a_memory_error() -> None:
    with pytest.raises(MemoryError, match="addresses"):
        Arena(1 << 62)


@pytest.mark.skipif(sys.platform == "win32", reason="pages are exchanged by mmap")
def test_fresh_pages_take_the_place_of_old_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    """What macOS does: checked here, as the call is the same."""
    monkeypatch.setattr(sys, "platform", "darwin")
    space = address_space.PosixSpace(4 * HUGE_BYTES, huge=True)
    memory(space.base, 4 * HUGE_BYTES)[:] = b"\4" * (4 * HUGE_BYTES)
    space.release(HUGE_BYTES, 3 * HUGE_BYTES)
    state = bytes(memory(space.base, 4 * HUGE_BYTES)[::HUGE_BYTES])
    assert state == b"\4\0\0\4"
    space.close()


class FakeKernel32:
    """VirtualAlloc and VirtualFree, which note what they are asked for."""

    class Call:
        restype: object = None
        argtypes: object = None

        def __init__(self, answer: Callable[..., int]) -> None:
            self.answer = answer

        def __call__(self, *arguments: int) -> int:
            return self.answer(*arguments)

    def __init__(self, most: int) -> None:
        self.committed: dict[int, int] = {}
        self.most = most
        self.VirtualAlloc = self.Call(self._allocate)
        self.VirtualFree = self.Call(self._free)

    def _allocate(self, address: int | None, nbytes: int, kind: int, protection: int) -> int:
        if kind == 0x2000:  # MEM_RESERVE
            assert address is None
            return 5 << 16
        assert kind == 0x1000 and protection == 4 and address is not None
        if sum(self.committed.values()) + nbytes > self.most:
            return 0
        self.committed[address] = nbytes
        return address

    def _free(self, address: int, nbytes: int, kind: int) -> int:
        assert (kind, nbytes > 0) in ((0x4000, True), (0x8000, False))
        for start, size in list(self.committed.items()):
            if kind == 0x8000 or start >= address:
                del self.committed[start]
            elif start + size > address:
                assert address + nbytes >= start + size
                self.committed[start] = address - start
        return 1

    def end(self) -> int:
        """Where committed memory ends; it has no gaps."""
        at = HUGE_BYTES  # the first large page behind 5 << 16
        for start, nbytes in sorted(self.committed.items()):
            assert start == at
            at += nbytes
        return at - HUGE_BYTES


def test_windows_commits_what_is_used_and_what_kernels_read_behind_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    system = FakeKernel32(most=300 << 20)
    monkeypatch.setattr(sys, "platform", "win32")
    monkeypatch.setattr(ctypes, "WinDLL", lambda name, use_last_error: system, raising=False)
    arena = Arena(400 << 20)
    assert system.end() == 0
    places = [taken(arena, 64 << 20) for _ in range(3)]
    assert places[0] == HUGE_BYTES
    assert (192 << 20) + SLACK_BYTES <= system.end() <= 256 << 20
    taken(arena, 60 << 20)
    with pytest.raises(MemoryError, match="more bytes of memory"):
        arena.take(64 << 20)
    used = arena.used
    assert arena.shrink(200 << 20) == arena.shrink(0) != []
    for place in arena.shrink(0):
        arena.give_back(place)
    assert arena.used < used
    assert arena.release_tail() > 0
    assert arena.capacity + SLACK_BYTES <= system.end() < 270 << 20
    arena.close()
    assert system.committed == {}


@pytest.mark.skipif(not Path("/proc/self/smaps").exists(), reason="Linux tells of large pages")
def test_large_pages_are_asked_for_and_children_do_not_get_them() -> None:
    arena = Arena(64 << 20)
    base = taken(arena, G)
    flags = ""
    for line in Path("/proc/self/smaps").read_text("ascii").splitlines():
        word = line.split()[0]
        if "-" in word and not word.endswith(":"):
            start, end = (int(number, 16) for number in word.split("-"))
            inside = start <= base < end
        elif word == "VmFlags:" and inside:
            flags = line
    assert {"hg", "dc"} <= set(flags.split())
    arena.close()
