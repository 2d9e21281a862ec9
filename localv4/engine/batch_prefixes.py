"""Beginnings that prompts have in common: processed once, then every row goes on from a fork.

Of the prompts that wait, those that come soon are compared with the next one. What it shares with
any of them becomes a *trunk*: a timeline that ends where the prompts part. The few newest trunks
are kept, so that rows with two system prompts may come in any order.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from localv4.engine.session import Session

LEAST_SHARED = 32
"""Tokens: to fork a timeline costs about as much as to process so many."""

MOST_TRUNKS = 3

Ids = NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class Start:
    """Where a row begins: its `session` is a trunk until it has `shared` tokens of the prompt.

    Then the row goes on in a fork of it. With `shared` 0 the session is the row's own.
    """

    session: Session
    shared: int


class Prefixes:
    """The trunks of a batch, the last one used at the end."""

    def __init__(self, new_session: Callable[[], Session]) -> None:
        self._new_session = new_session
        self._trunks: list[Session] = []

    @property
    def nbytes(self) -> int:
        """Bytes of memory that the trunks hold."""
        return sum(trunk.state_bytes for trunk in self._trunks)

    def clear(self) -> None:
        """Give their memory back."""
        self._trunks.clear()

    def start(self, ids: Ids, upcoming: Iterable[Ids]) -> Start:
        """Return where a row of these ids begins, when the prompts of `upcoming` follow it."""
        tips = [np.array(trunk.tokens, np.int64) for trunk in self._trunks]
        common = [_in_common(ids, other) for other in (*tips, *upcoming)]
        reach = [_reach(trunk, known) for trunk, known in zip(self._trunks, common, strict=False)]
        known = max(reach, default=0)
        wanted = _best_end(common, known)
        if wanted < known + LEAST_SHARED and known < LEAST_SHARED:
            return Start(self._new_session(), 0)
        session = self._from_trunk(reach.index(known)) if known else self._new_session()
        if wanted < known + LEAST_SHARED:
            if session.position == known:
                return Start(session, known)
            session = session.fork()
            session.rollback(known)
            return Start(session, 0)
        if known:
            session = session.fork()
            session.rollback(known)
        self._trunks = [*self._trunks, session][-MOST_TRUNKS:]
        return Start(session, wanted)

    def _from_trunk(self, index: int) -> Session:
        """Return a trunk that is used once more."""
        trunk = self._trunks.pop(index)
        self._trunks.append(trunk)
        return trunk


def _reach(trunk: Session, known: int) -> int:
    """Return how many of `known` common tokens a fork of the trunk can start with."""
    if known == trunk.position:
        return known
    rung = trunk.ladder.below(known)
    return rung.position if rung is not None else 0


def _best_end(common: list[int], known: int) -> int:
    """Return where a trunk that has `known` tokens should end, so that it saves the most.

    `common` says how many tokens each of the other prompts shares with the next one.
    """
    ends = sorted(common, reverse=True)
    savings = [(end - known) * (others + 1) for others, end in enumerate(ends)]
    best = int(np.argmax(savings)) if savings else 0
    return ends[best] if savings and savings[best] > 0 else known


def _in_common(mine: Ids, other: Ids) -> int:
    """Return how many ids two prompts have in common at their beginning."""
    most = min(mine.size, other.size)
    different = np.flatnonzero(mine[:most] != other[:most])
    return int(different[0]) if different.size else most
