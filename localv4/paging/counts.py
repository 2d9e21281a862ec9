"""What paging did: misses, bytes by reason, waiting. Differences of two copies tell of a while."""

from copy import deepcopy
from typing import Literal, Self

import numpy as np

Reason = Literal["demand", "prompt", "guess", "warm"]
"""Why a record was read: a token lacked it, a prompt passes through, it may be needed, an earlier
session used it."""

_REASONS: tuple[Reason, ...] = ("demand", "prompt", "guess", "warm")


class PagingCounts:
    """Sums since the start of a store.

    `misses` (layers,) counts records that tokens lacked; `bytes` and `reads` are by reason;
    `wait_s` is the time for which programs stood still; `guesses_used` of `guesses` were right.
    """

    def __init__(self, layers: int) -> None:
        self.misses = np.zeros(layers, np.int64)
        self.tokens = 0
        self.bytes: dict[Reason, int] = dict.fromkeys(_REASONS, 0)
        self.reads: dict[Reason, int] = dict.fromkeys(_REASONS, 0)
        self.guesses = self.guesses_used = 0
        self.evictions = 0
        self.wait_s = 0.0

    def add_read(self, reason: Reason, nbytes: int) -> None:
        """Count a record that was read."""
        self.reads[reason] += 1
        self.bytes[reason] += nbytes

    def copy(self) -> Self:
        """Return the sums as they are now."""
        return deepcopy(self)

    def since(self, before: Self) -> Self:
        """Return what has been added since an earlier copy."""
        passed = deepcopy(self)
        for name, value in vars(before).items():
            mine = getattr(passed, name)
            if isinstance(value, dict):
                setattr(passed, name, {key: mine[key] - value[key] for key in value})
            else:
                setattr(passed, name, mine - value)
        return passed
