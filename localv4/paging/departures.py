"""Which records go next when room is needed: those that wait to go, then the coldest.

To order all records by their scores takes a few tenths of a millisecond, and a token that halts
would wait for it before anything is read. So some of the coldest are chosen beforehand, while a
token waits for the disk anyhow, and looked at again when they are needed.
"""

from collections import deque
from collections.abc import Collection

import numpy as np
from numpy.typing import NDArray

from localv4.paging.policy import Keys, Mask, Policy
from localv4.paging.uses import Uses

PREPARED = 64
"""Records that are chosen beforehand: more than a token of a released model usually lacks."""

Key = tuple[int, int]


class Departures:
    """The order in which the records of a store leave it.

    `addresses` and `nbytes` (layers, experts) are those of the store; a record is in memory where
    its address is above 0.
    """

    def __init__(
        self, policy: Policy, uses: Uses, addresses: NDArray[np.int64], nbytes: NDArray[np.int64]
    ) -> None:
        self.policy, self.uses = policy, uses
        self._addresses, self._nbytes = addresses, nbytes
        self._going: dict[Key, int] = {}  # since when, the first to go first
        self._coldest: deque[Key] = deque()
        self._chosen_at = -1  # by the clock

    def add(self, key: Key) -> None:
        """Let a record go before any other, unless a token comes back to it."""
        self._going[key] = int(self.uses.clock[0])

    def discard(self, key: Key) -> None:
        """Do not prefer a record any more."""
        self._going.pop(key, None)

    def going(self) -> list[Key]:
        """Return the records that go before any other."""
        return list(self._going)

    def prepare(self, kept: Mask) -> None:
        """Choose the next ones, unless that has been done for the running token."""
        clock = int(self.uses.clock[0])
        if self._chosen_at != clock:
            need = PREPARED * int(self._nbytes.max())
            found = self.policy.victims(self.uses, self._addresses > 0, self._nbytes, need, kept)
            self._coldest, self._chosen_at = deque(found), clock

    def choose(self, need: int, spared: Collection[Key], kept: Mask) -> Keys:
        """Return what to give up for `need` bytes: nothing that is `spared` or `kept`."""
        chosen = self._take_going(need, spared, kept)
        need -= self._size(chosen)
        while need > 0 and self._coldest:
            key = self._coldest.popleft()
            must_stay = kept[key] or key in spared or key in chosen
            if not must_stay and self._is_still_cold(key):
                chosen.append(key)
                need -= int(self._nbytes[key])
        if need > 0:
            others = kept.copy()
            for key in (*spared, *chosen):
                others[key] = True
            resident = self._addresses > 0
            chosen += self.policy.victims(self.uses, resident, self._nbytes, need, others)
        return chosen

    def _take_going(self, need: int, spared: Collection[Key], kept: Mask) -> Keys:
        """Return what is going anyhow, for at most `need` bytes; forget what is used again."""
        chosen: Keys = []
        for key, since in list(self._going.items()):
            if need <= 0:
                break
            if self.uses.last[key] > since:
                del self._going[key]
            elif self._addresses[key] > 0 and not kept[key] and key not in spared:
                chosen.append(key)
                need -= int(self._nbytes[key])
        return chosen

    def _is_still_cold(self, key: Key) -> bool:
        return bool(self._addresses[key] > 0 and self.uses.last[key] < self._chosen_at)

    def _size(self, keys: Keys) -> int:
        return sum(int(self._nbytes[key]) for key in keys)
