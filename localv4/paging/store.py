"""Where the records of routed experts are: all in mapped files, or some of them in an arena.

Whoever runs tokens asks here. Compiled code finds a record by `addresses` and notes its use in
`uses`, so a hit costs no Python. All methods are for the one thread that starts programs; while a
program runs nothing is done here, so no record that it uses can be given up.
"""

import weakref
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from localv4.paging.populate import Populator
from localv4.paging.uses import Uses

ABSENT, ON_ITS_WAY = 0, -1
"""What `addresses` says of records that are not in memory."""


class ExpertStore(Protocol):
    """What a network needs to know of the records of its experts.

    `addresses` (layers, experts) i64 says where a record is: ABSENT, ON_ITS_WAY or its address.
    """

    addresses: NDArray[np.int64]
    uses: Uses

    @property
    def held_bytes(self) -> int:
        """Bytes of memory that belong to the store."""

    def foresee(self, known: Mapping[int, Sequence[int]]) -> None:
        """Be told what a token that begins needs of some layers, and have that read."""

    def request(self, layer: int, numbers: Iterable[int]) -> None:
        """Have absent records read; the token at hand needs them now."""

    @property
    def may_guess(self) -> bool:
        """Whether a guess would be read soon: all that is needed has come or is being read."""

    def guess(self, layer: int, numbers: Iterable[int]) -> None:
        """Have absent records read, the likeliest first, while nothing that is needed waits."""

    def count_misses(self, layer: int, numbers: Iterable[int]) -> None:
        """Note that a token stands still for want of some records."""

    def wait(self, layer: int, numbers: Iterable[int]) -> None:
        """Wait for one of some requested records, or more, unless all are there."""

    def end_token(self) -> None:
        """Learn what became of guesses and misses."""

    def begin_prompt(self, layer: int, chosen: NDArray[np.int64]) -> None:
        """Be told which experts (tokens, k) of a layer some tokens of a prompt use."""

    def end_prompt(self, layer: int) -> None:
        """Let everything go that is claimed of a layer."""

    def claim(self, layer: int, numbers: Iterable[int]) -> None:
        """Request records that must not be given up before they are released."""

    def release(self, layer: int, numbers: Iterable[int]) -> None:
        """Let claimed records go."""

    def count_claimed(self, layer: int, numbers: Iterable[int]) -> int:
        """Return how many of some records are claimed, whether they are there or on their way."""

    def can_hold(self, layer: int, numbers: Iterable[int]) -> bool:
        """Say whether there is room for all of these records at the same time."""

    def largest_claim(self, layer: int) -> int:
        """Return how many records of a layer to claim at a time."""

    def in_use(self) -> AbstractContextManager[None]:
        """Hold records where they are but for what this store itself does, while tokens run."""

    @property
    def close(self) -> Callable[[], object]:
        """Stop reading; records stay where they are."""


class MappedStore:
    """Every record is in a mapped file and stays there.

    With `ranges` (address, bytes) what lies there is brought into memory meanwhile.
    """

    held_bytes = 0

    def __init__(
        self, addresses: NDArray[np.int64], ranges: Iterable[tuple[int, int]] = ()
    ) -> None:
        self.addresses = addresses
        self.uses = Uses(*addresses.shape)
        self.populator = Populator(ranges)
        self.close = weakref.finalize(self, self.populator.close)

    def foresee(self, known: Mapping[int, Sequence[int]]) -> None:
        """Do nothing: the records are there."""

    def request(self, layer: int, numbers: Iterable[int]) -> None:
        """Do nothing: the record is there."""

    @property
    def may_guess(self) -> bool:
        """There is nothing to be read."""
        return False

    def guess(self, layer: int, numbers: Iterable[int]) -> None:
        """Do nothing."""

    def count_misses(self, layer: int, numbers: Iterable[int]) -> None:
        """Do nothing."""

    def wait(self, layer: int, numbers: Iterable[int]) -> None:
        """Do nothing."""

    def end_token(self) -> None:
        """Do nothing."""

    def begin_prompt(self, layer: int, chosen: NDArray[np.int64]) -> None:
        """Do nothing."""

    def end_prompt(self, layer: int) -> None:
        """Do nothing."""

    def claim(self, layer: int, numbers: Iterable[int]) -> None:
        """Do nothing."""

    def release(self, layer: int, numbers: Iterable[int]) -> None:
        """Do nothing."""

    def count_claimed(self, layer: int, numbers: Iterable[int]) -> int:
        """Nothing has to be claimed."""
        return 0

    def can_hold(self, layer: int, numbers: Iterable[int]) -> bool:
        """They are all there."""
        return True

    def largest_claim(self, layer: int) -> int:
        """Return the number of experts."""
        return int(self.addresses.shape[1])

    def in_use(self) -> AbstractContextManager[None]:
        """Do nothing."""
        return nullcontext()
