"""How experts are brought into memory: what a user may choose, and a test."""

from dataclasses import dataclass
from typing import Literal

from localv4.paging.faults import Faults

IoChoice = Literal["auto", "map", "direct", "buffered"]
"""map: all records stay in mapped files; direct, buffered: they are read into an arena, past the
page cache of the system or through it; auto: map if everything fits, else direct."""

PolicyName = Literal["decay", "lru", "lfu"]

DEFAULT_READERS = 6


@dataclass(frozen=True, slots=True)
class PagingOptions:
    """`capacity_bytes` is the size of an arena, which is never made smaller than `floor_bytes`
    when other programs need memory; `io` how records get there, or "map".

    `readers` threads read; `policy` says who makes room; `prefetch`: read what the next layer may
    need while this one is computed. `faults` makes reading go wrong in tests.
    """

    capacity_bytes: int
    io: Literal["map", "direct", "buffered"]
    readers: int = DEFAULT_READERS
    policy: PolicyName = "decay"
    prefetch: bool = True
    floor_bytes: int = 0
    faults: Faults | None = None


KEEP_ALL = PagingOptions(capacity_bytes=1 << 62, io="map")
"""Everything stays in memory once it is there."""
