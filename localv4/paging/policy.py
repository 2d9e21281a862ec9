"""Which records to give up when memory is needed."""

import math
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from localv4.errors import UsageError
from localv4.paging.half_life import HALF_LIVES, HalfLives
from localv4.paging.topics import TopicMemory
from localv4.paging.uses import GUARD_TOKENS, Uses

NAMES = ("decay", "lru", "lfu")
"""Policies by name; the first is the default."""

Keys = list[tuple[int, int]]
"""Experts as (layer, number)."""

Sizes = NDArray[np.int64]
"""Bytes of records: (layers,), or (layers, experts)."""

Mask = NDArray[np.bool_]


class Policy(Protocol):
    """An order in which records are given up."""

    name: str

    def victims(
        self, uses: Uses, resident: Mask, nbytes: Sizes, need: int, keep: Mask | None = None
    ) -> Keys:
        """Return residents to give up, the first first, that free at least `need` bytes together.

        `resident` and `keep` are (layers, experts). Nothing in `keep` is returned, and what recent
        tokens used only when nothing else is left; so it may free less than `need`.
        """

    def observe(self, uses: Uses) -> None:
        """Learn from the token that has just been decoded: what it used has the clock's time."""


def make_policy(name: str, uses: Uses) -> Policy:
    """Return the policy with this name and give `uses` its half-life. UsageError if unknown."""
    if name == "decay":
        uses.half_life = HALF_LIVES[-1]
        return DecayedFrequency()
    if name == "lru":
        return LeastRecentlyUsed()
    if name == "lfu":
        uses.half_life = math.inf
        return LeastFrequentlyUsed()
    raise UsageError(f"no cache policy {name!r}", hint=f"one of {', '.join(NAMES)}")


class LeastRecentlyUsed:
    """Give up what was used longest ago."""

    name = "lru"

    def victims(
        self, uses: Uses, resident: Mask, nbytes: Sizes, need: int, keep: Mask | None = None
    ) -> Keys:
        """See `Policy`."""
        layers = len(uses.last)
        order = uses.last * layers + np.arange(layers)[:, None]  # a token goes layer by layer
        return _coldest(order, uses, resident, nbytes, need, keep)

    def observe(self, uses: Uses) -> None:
        """Do nothing: there is nothing to adapt."""


class LeastFrequentlyUsed:
    """Give up what was used least often since the start."""

    name = "lfu"

    def victims(
        self, uses: Uses, resident: Mask, nbytes: Sizes, need: int, keep: Mask | None = None
    ) -> Keys:
        """See `Policy`."""
        return _coldest(uses.scores(), uses, resident, nbytes, need, keep)

    def observe(self, uses: Uses) -> None:
        """Do nothing: there is nothing to adapt."""


class DecayedFrequency:
    """Give up what was used least often of late in the present topic (`topics`, `half_life`)."""

    name = "decay"

    def __init__(self) -> None:
        self.memory = TopicMemory()
        self._half_lives = HalfLives()

    def victims(
        self, uses: Uses, resident: Mask, nbytes: Sizes, need: int, keep: Mask | None = None
    ) -> Keys:
        """See `Policy`."""
        return _coldest(uses.scores(), uses, resident, nbytes, need, keep)

    def observe(self, uses: Uses) -> None:
        """Notice a change of topic, and adapt the half-life; about 0.3 ms per token for Flash."""
        changes = self.memory.changes, self.memory.recalls
        self.memory.observe(uses)
        if changes != (self.memory.changes, self.memory.recalls):
            self._half_lives.restart(uses.scores())
        else:
            self._half_lives.observe(uses)


def _coldest(
    score: NDArray[np.floating] | NDArray[np.int64],
    uses: Uses,
    resident: Mask,
    nbytes: Sizes,
    need: int,
    keep: Mask | None,
) -> Keys:
    """Return the residents with the lowest scores that free `need` bytes, recent uses last.

    The score of an expert stands for the time that it saves per byte: on one device the time of a
    read is proportional to its bytes, so the size of a record does not enter.
    """
    if need <= 0:
        return []
    candidates = resident if keep is None else resident & ~keep
    recent = uses.last > uses.clock[0] - GUARD_TOKENS
    chosen = _lowest(score, candidates & ~recent, nbytes, need)
    sizes = _sizes(nbytes, score.shape).ravel()
    missing = need - int(sizes[chosen].sum())
    if missing > 0:
        chosen = np.append(chosen, _lowest(score, candidates & recent, nbytes, missing))
    return _keys(chosen, score.shape[1])


def _lowest(
    score: NDArray[np.floating] | NDArray[np.int64], candidates: Mask, nbytes: Sizes, need: int
) -> NDArray[np.int64]:
    """Return the flat places of candidates, lowest score first, up to `need` bytes together."""
    places = np.flatnonzero(candidates)
    if len(places) == 0:
        return places
    sizes = _sizes(nbytes, score.shape).ravel()
    count = min(len(places), -(-need // int(sizes[places].min())))
    values = score.ravel()[places]
    if count < len(places):
        # with all that are equal to the last: among them the first places come first
        chosen = values <= np.partition(values, count - 1)[count - 1]
        places, values = places[chosen], values[chosen]
    places = places[np.lexsort((places, values))]
    freed = np.cumsum(sizes[places])
    return places[: int(np.searchsorted(freed, need)) + 1]


def _sizes(nbytes: Sizes, shape: tuple[int, ...]) -> Sizes:
    """Return the bytes of each record (layers, experts), 0 for what is none."""
    return np.broadcast_to(nbytes[:, None] if nbytes.ndim == 1 else nbytes, shape)


def _keys(places: NDArray[np.int64], experts: int) -> Keys:
    """Return flat places as keys."""
    layers, numbers = np.divmod(places, experts)
    return list(zip(layers.tolist(), numbers.tolist(), strict=True))
