"""A store with room for some of the records: others are read when they are needed.

Decoding. A record that a token lacks is read at once, in the place of the coldest one
(`departures`). What a token will probably choose in the next layer is read as a guess, when nothing
else waits to be read. A guess stays until its layer has passed: one that turns out wrong is the
first to go, or is not read at all if that has not begun.

Prompts. Nearly every expert of a layer is used once and not again for the rest of a chunk, so that
a scan would wash out everything. So a layer keeps as many records as it had: those that the prompt
uses most. The others pass through a few slots.
"""

import threading
import time
import weakref
from collections.abc import Iterable, Iterator, Mapping, Sequence, Set
from contextlib import contextmanager

import numpy as np
from numpy.typing import NDArray

from localv4.errors import DoesNotFitError
from localv4.paging.arena import Arena
from localv4.paging.counts import PagingCounts, Reason
from localv4.paging.departures import Departures
from localv4.paging.governor import Governor
from localv4.paging.policy import Policy
from localv4.paging.pressure import Gauge
from localv4.paging.readers import Finished, Key, Readers
from localv4.paging.store import ABSENT, ON_ITS_WAY
from localv4.paging.uses import GUARD_TOKENS, Uses

GUESS_SLOTS = 16
"""Records at most that are in memory because of a guess and nothing else."""

CLAIM_SLOTS = 16
"""Records of a prompt that are multiplied at a time; twice as many are read meanwhile."""

RECENT_COST = 1e6
"""What makes the record of a recent token dearer than any other."""


class PagedStore:
    """Records in an arena, at most as many as it has room for.

    `nbytes` (layers, experts) are the sizes of records. `refusal` says why they are not read as
    was asked for, if so.
    """

    refusal: str | None = None

    def __init__(
        self, nbytes: NDArray[np.int64], arena: Arena, readers: Readers, policy: Policy, uses: Uses
    ) -> None:
        self.nbytes, self.arena, self.readers = nbytes, arena, readers
        self.policy, self.uses = policy, uses
        self.addresses: NDArray[np.int64] = np.full(nbytes.shape, ABSENT, np.int64)
        self.counts = PagingCounts(len(nbytes))
        self._all_bytes = int(nbytes.sum())
        self._is_mixed = bool((nbytes != nbytes.flat[0]).any())
        self._claimed = np.zeros(nbytes.shape, bool)
        self._departures = Departures(policy, uses, self.addresses, nbytes)
        self._needed: set[Key] = set()  # by the layer at hand and later ones, for certain
        self._guessed: set[Key] = set()  # of layers that have not passed
        self._warming: set[Key] = set()  # of an earlier session, read when there is nothing else
        self._stays = np.zeros(nbytes.shape, bool)  # what a prompt shall leave in memory
        self._in_use = threading.Lock()
        self._change = 0  # bytes by which the arena shall grow or shrink as soon as it may
        self.close = weakref.finalize(self, readers.close)
        """Stop reading; records stay where they are. Nobody has to call this."""

    @property
    def held_bytes(self) -> int:
        """Bytes of memory that belong to the store."""
        return self.arena.used

    @property
    def pages(self) -> bool:
        """Whether there are more records than there is room for."""
        return self.arena.capacity < self._all_bytes

    @property
    def resident(self) -> NDArray[np.bool_]:
        """Which records (layers, experts) are in memory."""
        return self.addresses > 0

    def govern(self, floor_bytes: int, gauge: Gauge) -> None:
        """Give memory back from now on when other programs need it, down to `floor_bytes`."""
        budget, change = self.arena.capacity, weakref.WeakMethod(self.change_memory)

        def ask(nbytes: int) -> int:
            method = change()  # the thread must not keep the store alive
            return method(nbytes) if method is not None else 0

        governor = Governor(budget, min(floor_bytes, budget), lambda n: ask(-n), ask, gauge)
        weakref.finalize(self, governor.close)
        governor.start()

    @contextmanager
    def in_use(self) -> Iterator[None]:
        """Keep the governor's hands off: only at its end, and when nobody uses it, memory goes."""
        with self._in_use:
            yield
            self._follow_governor()

    def change_memory(self, nbytes: int) -> int:
        """Grow or shrink, now or when the running tokens end; return by how many bytes.

        Any thread may call this.
        """
        self._change += nbytes
        if self._in_use.acquire(blocking=False):
            try:
                self._follow_governor()
            finally:
                self._in_use.release()
        return abs(nbytes)

    def _follow_governor(self) -> None:
        """Do what the governor has asked for."""
        change, self._change = self._change, 0
        if change > 0:
            self.arena.grow(change)
        elif change < 0:
            for address in self.arena.shrink(-change):
                self._vacate(address)
            self.arena.release_tail()

    def _vacate(self, address: int) -> None:
        """Give up whatever lies at an address, when it is there if it is being read."""
        while not (self.addresses == address).any() and self._await_record():
            pass
        for layer, number in np.argwhere(self.addresses == address).tolist():
            self._give_up((layer, number))

    def foresee(self, known: Mapping[int, Sequence[int]]) -> None:
        """Be told what a token that begins needs of some layers, and have that read."""
        self._needed = {(layer, number) for layer, some in known.items() for number in some}
        for layer, numbers in known.items():
            self._request(layer, numbers)

    def request(self, layer: int, numbers: Iterable[int]) -> None:
        """Have absent records read; the token at hand needs them now."""
        wanted = list(numbers)
        later = {key for key in self._needed if key[0] > layer}
        self._needed = later | {(layer, number) for number in wanted}
        self._request(layer, wanted)

    def _request(self, layer: int, wanted: Sequence[int]) -> None:
        self._collect(self.readers.finished())
        self._settle_guesses(layer)
        states = self.addresses[layer, wanted].tolist()
        absent = [(layer, n) for n, at in zip(wanted, states, strict=True) if at == ABSENT]
        under_way = [(layer, n) for n, at in zip(wanted, states, strict=True) if at == ON_ITS_WAY]
        if under_way:
            unhurried = self._guessed | self._warming
            self.readers.make_urgent(key for key in under_way if key in unhurried)
        self._drop_guesses(key for key in self._guessed - self._needed if key[0] == layer)
        if absent:
            self._read(absent, {(layer, number) for number in wanted})

    def count_misses(self, layer: int, numbers: Iterable[int]) -> None:
        """Note that a token stands still for want of some records."""
        self.counts.misses[layer] += np.count_nonzero(self.addresses[layer, list(numbers)] <= 0)

    def _read(self, keys: Sequence[Key], wanted: Set[Key]) -> None:
        """Read some records now; none that is `wanted` with them is given up for them.

        Nor is what was guessed or is needed later, if there is room.
        """
        spared = wanted | self._needed | self._guessed
        if not self._is_mixed:
            need = len(keys) * int(self.nbytes.flat[0]) - (self.arena.capacity - self.arena.used)
            for victim in self._departures.choose(need, spared, self._claimed):
                self._give_up(victim)
        placed: list[tuple[Key, int]] = []
        for key in keys:
            while (address := self._place(key, spared, self._claimed)) is None:
                # slots of records that are being read cannot be had before these are there
                self._submit(placed, urgent=True)
                placed = []
                if self._drop_guesses(self._guessed - wanted) or self._await_record():
                    continue
                if spared == wanted:
                    raise DoesNotFitError(
                        f"no room for the experts of layer {key[0]}", hint="give more with --ram"
                    )
                spared = wanted
            placed.append((key, address))
        self._submit(placed, urgent=True)

    @property
    def may_guess(self) -> bool:
        """Whether a guess would be read soon: all that is needed has come or is being read."""
        return self.readers.has_begun_all

    def guess(self, layer: int, numbers: Iterable[int]) -> None:
        """Have absent records read, the likeliest first, while nothing that is needed waits.

        They take the place of what was guessed for the layer before and has not begun.
        """
        self._collect(self.readers.finished())
        self._settle_guesses(layer - 1)
        wanted = [(layer, number) for number in numbers]
        self._drop_guesses(key for key in self._guessed.difference(wanted) if key[0] == layer)
        spared = self._needed | self._guessed | set(wanted)
        kept = self._claimed | (self.uses.last >= self.uses.clock)  # what the token has used so far
        placed = []
        for key in wanted:
            if self.addresses[key] != ABSENT or len(self._guessed) >= GUESS_SLOTS:
                continue
            address = self._place(key, spared, kept)
            if address is None:
                break
            self._guessed.add(key)
            self.counts.guesses += 1
            placed.append((key, address))
        self._submit(placed, urgent=False)

    def _drop_guesses(self, keys: Iterable[Key]) -> bool:
        """Forget guesses whose reading has not begun; say whether there were any."""
        dropped = self.readers.cancel(keys)
        for key, address in dropped:
            self._guessed.discard(key)
            self.counts.guesses -= 1
            self.arena.give_back(address)
            self.addresses[key] = ABSENT
        return bool(dropped)

    def _settle_guesses(self, layer: int) -> None:
        """Learn what became of guesses for the layers before one: wrong ones go first."""
        passed = {key for key in self._guessed if key[0] < layer}
        if not passed:
            return
        self._drop_guesses(passed)
        for key in passed & self._guessed:
            if self.addresses[key] == ON_ITS_WAY:
                continue
            self._guessed.discard(key)
            if self.uses.last[key] == self.uses.clock[0]:
                self.counts.guesses_used += 1
            else:
                self._departures.add(key)

    def warm(self, keys: Iterable[Key]) -> None:
        """Have records read into free memory while nothing else is, in this order."""
        placed = []
        for key in keys:
            if self.addresses[key] != ABSENT:
                continue
            address = self.arena.take(int(self.nbytes[key]))
            if address is None:
                break
            self._warming.add(key)
            placed.append((key, address))
        self._submit(placed, urgent=False)

    def _submit(self, placed: Sequence[tuple[Key, int]], urgent: bool) -> None:
        for key, _ in placed:
            self.addresses[key] = ON_ITS_WAY
        self.readers.submit_all(placed, urgent=urgent)

    def wait(self, layer: int, numbers: Iterable[int]) -> None:
        """Wait for one of some requested records, or more, unless all are there.

        Raises what reading one of them raised.
        """
        wanted = list(numbers)
        start = time.perf_counter()
        absent = self._count_absent(layer, wanted)
        if absent and self.pages:
            self._departures.prepare(self._claimed)
        while absent and self._count_absent(layer, wanted) == absent:
            self._await_record()
            if (self.addresses[layer, wanted] == ABSENT).any():  # a guess failed
                self.request(layer, wanted)
        self.counts.wait_s += time.perf_counter() - start

    def _await_record(self) -> bool:
        """Wait until one or more of the records under way are there; False if none is."""
        if not self.readers.pending:
            return False
        self._collect(self.readers.wait())
        return True

    def _count_absent(self, layer: int, wanted: list[int]) -> int:
        return int(np.count_nonzero(self.addresses[layer, wanted] <= 0))

    def _collect(self, finished: Iterable[Finished]) -> None:
        """Make records known that have been read; a failed guess is only forgotten.

        Raises what reading another one raised, after all are booked.
        """
        failure: BaseException | None = None
        for read in finished:
            key = read.key
            if read.error is None:
                self.addresses[key] = read.address
                self.counts.add_read(self._reason(key), read.nbytes)
                self._warming.discard(key)
                continue
            self.addresses[key] = ABSENT
            self.arena.give_back(read.address)
            if key not in self._guessed and key not in self._warming:
                failure = read.error
            self._guessed.discard(key)
            self._warming.discard(key)
        if failure is not None:
            raise failure

    def _reason(self, key: Key) -> Reason:
        if key in self._guessed:
            return "guess"
        if key in self._warming:
            return "warm"
        return "prompt" if self._claimed[key] else "demand"

    def end_token(self) -> None:
        """Learn what became of guesses: wrong ones are the first to go."""
        self.counts.tokens += 1
        self._needed = set()
        self._settle_guesses(len(self.addresses))
        self._observe()

    def _observe(self) -> None:
        """Let the policy learn, which takes a part of a millisecond, where anything is given up."""
        if self.pages:
            self.policy.observe(self.uses)

    def begin_prompt(self, layer: int, chosen: NDArray[np.int64]) -> None:
        """Be told which experts (tokens, k) of a layer some tokens of a prompt use."""
        self.uses.record_tokens(layer, chosen)
        self._plan_prompt(layer, np.isin(np.arange(self.addresses.shape[1]), chosen))

    def _plan_prompt(self, layer: int, used: NDArray[np.bool_]) -> None:
        """Decide what stays in memory of a layer of which a prompt uses some experts."""
        self._claimed[layer, ~used] = False  # what was claimed before they were known
        here = self.resident[layer]
        order = np.argsort(-self.uses.scores_of(layer), kind="stable")
        self._stays[layer] = False
        self._stays[layer, order[: max(int(here.sum()), self._share(layer))]] = True
        for number in np.flatnonzero(here & ~self._stays[layer] & ~used).tolist():
            self._departures.add((layer, number))

    def end_prompt(self, layer: int) -> None:
        """Let everything go that is claimed of a layer."""
        self.release(layer, np.flatnonzero(self._claimed[layer]).tolist())

    def _share(self, layer: int) -> int:
        """Return how many records of a layer there is room for if all layers get as many."""
        one_of_each = int(self.nbytes.max(1).sum())
        return self.arena.capacity // one_of_each if self.nbytes[layer].any() else 0

    def claim(self, layer: int, numbers: Iterable[int]) -> None:
        """Request records that must not be given up before they are released."""
        wanted = list(numbers)
        self._claimed[layer, wanted] = True
        for number in wanted:
            self._departures.discard((layer, number))
        self._request(layer, wanted)

    def release(self, layer: int, numbers: Iterable[int]) -> None:
        """Let claimed records go; those that the prompt uses most stay."""
        for number in numbers:
            self._claimed[layer, number] = False
            if not self._stays[layer, number]:
                self._departures.add((layer, number))

    def count_claimed(self, layer: int, numbers: Iterable[int]) -> int:
        """Return how many of some records are claimed, whether they are there or on their way."""
        return int(np.count_nonzero(self._claimed[layer, list(numbers)]))

    def can_hold(self, layer: int, numbers: Iterable[int]) -> bool:
        """Say whether there is room for all of these records at the same time."""
        return int(self.nbytes[layer, list(numbers)].sum()) <= self.arena.capacity

    def largest_claim(self, layer: int) -> int:
        """Return how many records of a layer to claim at a time."""
        fitting = self.arena.capacity // (4 * max(1, int(self.nbytes[layer].max())))
        return max(1, min(CLAIM_SLOTS, int(fitting)))

    def _place(self, key: Key, spared: Set[Key], kept: NDArray[np.bool_]) -> int | None:
        """Return room for a record, giving up others; None if none can be given up.

        Those stay that are `spared`, or `kept` (layers, experts).
        """
        nbytes = int(self.nbytes[key])
        address = self.arena.take(nbytes)
        if address is None and not self._is_mixed:
            for victim in self._departures.choose(nbytes, spared, kept):
                self._give_up(victim)
            address = self.arena.take(nbytes)
        if address is None:
            # records of several sizes: neighbours have to go, or there is room but no place
            stay = kept.copy()
            for other in spared:
                stay[other] = True
            for place in self.arena.what_to_evict(nbytes, lambda at: self._costs(at, stay)) or ():
                self._vacate(place)
            address = self.arena.take(nbytes)
        return address

    def _costs(self, places: NDArray[np.int64], keep: NDArray[np.bool_]) -> NDArray[np.float64]:
        """Return what it costs to lose the records at some addresses."""
        flat = self.addresses.ravel()
        order = np.argsort(flat)
        found = order[np.minimum(np.searchsorted(flat, places, sorter=order), len(flat) - 1)]
        recent = self.uses.last > self.uses.clock - GUARD_TOKENS
        costs = (self.uses.scores() + np.where(recent, RECENT_COST, 0.0)).ravel()[found]
        width = self.addresses.shape[1]
        going = [key[0] * width + key[1] for key in self._departures.going()]
        costs[np.isin(found, going)] = 0.0
        costs[(flat[found] != places) | keep.ravel()[found]] = np.inf
        cost: NDArray[np.float64] = costs.astype(np.float64)
        return cost

    def _give_up(self, key: Key) -> None:
        self.arena.give_back(int(self.addresses[key]))
        self.addresses[key] = ABSENT
        self._departures.discard(key)
        self.counts.evictions += 1
