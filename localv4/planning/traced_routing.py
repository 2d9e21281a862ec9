"""Hit rates from a recorded trace: what the cache of the engine would have done with it."""

import numpy as np

from localv4.errors import UsageError
from localv4.paging.replay import least_bytes, replay
from localv4.paging.trace import Trace
from localv4.planning.hit_rate import LEARNING, Bounds

SHARES = (0.05, 0.1, 0.15, 0.2, 0.27, 0.34, 0.45, 0.56, 0.67, 0.78, 0.9)
"""Of all experts, replayed at once; rates between them are interpolated."""

LEAST_TOKENS = 200
"""Fewer generated tokens are counted in a replay: mostly first uses."""


class TracedRouting:
    """What one recorded text would have found in memory.

    The misses of another text of the kind are between 0.9 and 1.25 times as many.
    """

    source = "replayed from a trace"

    def __init__(self, trace: Trace) -> None:
        """Replay a trace. Raises UsageError if it is too short to tell anything."""
        total, least = trace.head.experts * sum(trace.head.record_bytes), least_bytes(trace)
        capacities = [int(total * share) for share in SHARES if total * share >= least]
        found = replay(trace, ["decay"], [least, *capacities])
        if found.scored < LEAST_TOKENS:
            counted = f"the trace has {found.scored} generated tokens to count"
            raise UsageError(f"{counted}, {LEAST_TOKENS} are needed", hint="record a longer answer")
        outcomes = found.outcomes["decay"]
        self._shares = [0.0, *(outcome.resident for outcome in outcomes), 1.0]
        self._hits = [0.0, *(outcome.hits for outcome in outcomes), 1.0]

    def hit_rate(self, share: float) -> Bounds:
        """Return the share of chosen experts that were in memory when `share` of all were."""
        if share >= 1.0:
            return Bounds(1.0, 1.0, 1.0)
        missed = 1.0 - float(np.interp(share, self._shares, self._hits))
        most, _, fewest = LEARNING
        return Bounds(max(0.0, 1.0 - most * missed), 1.0 - missed, 1.0 - fewest * missed)
