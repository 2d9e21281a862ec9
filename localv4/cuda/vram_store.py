"""Records of experts in the memory of a GPU: all of them, or those in use most.

The third tier above memory and disk. A record comes from the store of the host: where that reads
it from a disk first, the copy waits. Copies run in threads of their own, through pinned memory, so
the GPU computes meanwhile. What is given up is chosen as in the host's arena, by the same policy.
"""

import ctypes
import threading
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager

import numpy as np
from numpy.typing import NDArray

from localv4.cuda.gpu import Gpu, GpuError, Mark
from localv4.cuda.tier_counts import TierCounts
from localv4.paging.arena import GRANULE_BYTES, Arena
from localv4.paging.options import PolicyName
from localv4.paging.paged_store import PagedStore
from localv4.paging.policy import make_policy
from localv4.paging.readers import Finished, Key, Readers
from localv4.paging.store import ABSENT, ON_ITS_WAY, ExpertStore

COPY_THREADS = 6
"""Threads that copy, at most: filling pinned memory takes longer than sending it."""

COPY_SHARE = 4
"""One of so many threads copies where both devices compute: a team whose members have to wait for a
core is slower than a smaller one."""

PINNED_BYTES = 4 << 20
"""Bytes of each of the two pinned buffers of a thread."""

PROMOTIONS = 2
"""Records that are brought to the GPU after a token, at most."""

UNDER_WAY = 2
"""Records of a prompt that are claimed and have not come yet, at most, for each thread."""

WORTH = 1.25
"""So much hotter must a record be than the coldest one on the GPU to take its place."""


def copiers_of(threads: int) -> int:
    """Return how many of some threads of the host copy where both devices compute; may be 0."""
    return min(COPY_THREADS, threads // COPY_SHARE)


class GpuSpace:
    """Memory of a GPU as an arena takes it."""

    def __init__(self, gpu: Gpu, nbytes: int) -> None:
        self._gpu = gpu
        self.base = gpu.allocate(max(1, nbytes))

    def commit(self, end: int) -> None:
        """Do nothing: the memory is there."""

    def release(self, start: int, end: int) -> None:
        """Do nothing: it is given back as a whole."""

    def close(self) -> None:
        """Give the memory back."""
        self._gpu.free(self.base)


class VramStore(PagedStore):
    """Records on a GPU, at most as many as there is room for; `addresses` are the GPU's.

    `host` is where the records come from, and stays so: it is asked for those that are absent here.
    Layers whose records have 0 bytes are not for the GPU. `copiers` threads copy.
    """

    def __init__(
        self,
        host: ExpertStore,
        nbytes: NDArray[np.int64],
        capacity: int,
        gpu: Gpu,
        policy: PolicyName,
        copiers: int = COPY_THREADS,
    ) -> None:
        self.host, self._copiers = host, copiers
        self._waiting: list[tuple[Key, int]] = []  # until the host has them
        sizes = -(-nbytes // GRANULE_BYTES) * GRANULE_BYTES
        arena = Arena(capacity, GpuSpace(gpu, capacity))
        self._gpu, self._copies = gpu, RecordCopies(host, nbytes, gpu)
        readers = Readers(self._copies.load, copiers)
        shared = host.policy if isinstance(host, PagedStore) else make_policy(policy, host.uses)
        super().__init__(sizes, arena, readers, shared, host.uses)
        self.counts: TierCounts = TierCounts(len(nbytes))

    @property
    def is_whole(self) -> bool:
        """Whether all records are on the GPU, of the layers that it computes."""
        return bool((self.resident | (self.nbytes == 0)).all())

    @contextmanager
    def in_use(self) -> Iterator[None]:
        """Hold the records of both tiers while tokens run."""
        with super().in_use(), self.host.in_use():
            yield

    def end_token(self) -> None:
        """Let both tiers learn from a token, unless all is here: they share uses and policy."""
        if not self.is_whole:
            self.host.end_token()
        super().end_token()

    def _observe(self) -> None:
        if not (isinstance(self.host, PagedStore) and self.host.pages):  # it has done so
            super()._observe()

    def _submit(self, placed: Sequence[tuple[Key, int]], urgent: bool) -> None:
        if placed:
            self._copies.mark = self._gpu.mark()
        for key, address in placed:
            layer, number = key
            self.addresses[key] = ON_ITS_WAY
            self.host.claim(layer, [number])
            if self.host.addresses[key] > 0:
                self.readers.submit(key, address, urgent=urgent)
            else:
                self._waiting.append((key, address))

    def _await_record(self) -> bool:
        """Wait until one or more of the records under way are there, or on the host at least."""
        self._pass_on()
        if self._waiting and not self.readers.pending:
            layer, number = self._waiting[0][0]
            self.host.wait(layer, [number])
            self._pass_on()
        return super()._await_record() or bool(self._waiting)

    def _pass_on(self) -> None:
        """Have records copied that the host has got by now."""
        left = []
        for key, address in self._waiting:
            if self.host.addresses[key] > 0:
                self.readers.submit(key, address)
            else:
                left.append((key, address))
        self._waiting = left

    def _collect(self, finished: Iterable[Finished]) -> None:
        done = list(finished)
        for read in done:
            self.host.release(read.key[0], [read.key[1]])
        super()._collect(done)

    def begin_prompt(self, layer: int, chosen: NDArray[np.int64]) -> None:
        """Be told which experts (tokens, k) of a layer some tokens of a prompt use."""
        if isinstance(self.host, PagedStore):
            self.host.begin_prompt(layer, chosen)
            under_way = np.flatnonzero(self.addresses[layer] == ON_ITS_WAY).tolist()
            self.host.claim(layer, under_way)  # also what was claimed before they were known
        else:
            self.uses.record_tokens(layer, chosen)
        self._plan_prompt(layer, np.isin(np.arange(self.addresses.shape[1]), chosen))

    def largest_claim(self, layer: int) -> int:
        """Return how many records of a layer to claim at a time, before a prompt has chosen any."""
        if self.is_whole:
            return int(self.addresses.shape[1])
        return max(1, self.most_under_way(layer) // 2)

    def most_under_way(self, layer: int) -> int:
        """Return how many records of a layer to have copied at a time: all threads are busy."""
        fitting = self.arena.capacity // (4 * max(1, int(self.nbytes[layer].max())))
        return max(1, min(UNDER_WAY * self._copiers, int(fitting), self.host.largest_claim(layer)))

    def poll(self) -> None:
        """Learn what has come, without waiting."""
        self._pass_on()
        self._collect(self.readers.finished())

    def fill(self) -> None:
        """Bring as many records as there is room for, and wait for them: the first layers first."""
        sizes = self.nbytes.ravel().cumsum()
        count = int(np.searchsorted(sizes, self.arena.capacity, side="right"))
        places = np.flatnonzero(self.nbytes.ravel()[:count])
        keys = [divmod(place, self.nbytes.shape[1]) for place in places.tolist()]
        for layer in sorted({key[0] for key in keys}):
            numbers = [number for at, number in keys if at == layer]
            self.request(layer, numbers)
            while (self.addresses[layer, numbers] <= 0).any():
                self.wait(layer, numbers)

    def promote(self, candidates: Iterable[Key]) -> None:
        """Bring the hottest of some records that the host has, in the place of colder ones."""
        self._collect(self.readers.finished())
        scores = self.uses.scores()
        absent = [
            k for k in candidates if self.addresses[k] == ABSENT and self.host.addresses[k] > 0
        ]
        absent.sort(key=lambda key: -scores[key])
        for key in absent[:PROMOTIONS]:
            coldest = float(scores[self.resident].min()) if self.resident.any() else 0.0
            has_room = self.arena.used + int(self.nbytes[key]) <= self.arena.capacity
            if not has_room and scores[key] < WORTH * coldest:
                return
            address = self._place(key, {key}, self._claimed)
            if address is None:
                return
            self._warming.add(key)
            self._submit([(key, address)], urgent=True)


class RecordCopies:
    """Copies records of the host's store; threads keep this alive, and so must not keep more.

    `mark` is when the last places were given: what the GPU was asked for before may still read
    what was there.
    """

    mark: Mark = None

    def __init__(self, host: ExpertStore, lengths: NDArray[np.int64], gpu: Gpu) -> None:
        self._host, self._lengths, self._copier = host, lengths, Copier(gpu)

    def load(self, key: Key, address: int) -> int:
        """Copy a record that the host has; it may be given up there meanwhile, for want of memory.

        Raises GpuError in that case.
        """
        nbytes, source = int(self._lengths[key]), int(self._host.addresses[key])
        if source > 0:
            self._copier.copy(address, source, nbytes, self.mark)
        if source <= 0 or self._host.addresses[key] != source:
            raise GpuError(f"expert {key[1]} of layer {key[0]} left memory while it was copied")
        return nbytes


class Copier:
    """Copies to a GPU, in any thread: each fills one of its two buffers while the other is sent."""

    def __init__(self, gpu: Gpu) -> None:
        self._gpu = gpu
        self._own = threading.local()

    def copy(self, target: int, source: int, nbytes: int, mark: Mark = None) -> None:
        """Copy `nbytes` from host memory after a mark; return when they are there."""
        if not hasattr(self._own, "lanes"):
            self._own.lanes = [self._gpu.new_lane(PINNED_BYTES) for _ in range(2)]
        if mark is not None:
            for lane in self._own.lanes:
                lane.follow(mark)
        for number, done in enumerate(range(0, nbytes, PINNED_BYTES)):
            lane = self._own.lanes[number % 2]
            part = min(PINNED_BYTES, nbytes - done)
            lane.wait()
            ctypes.memmove(lane.buffer, source + done, part)
            lane.send(target + done, part)
        for lane in self._own.lanes:
            lane.wait()
