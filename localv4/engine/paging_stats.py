"""What paging cost an answer, and what bounded its speed."""

from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from localv4.engine.gpu_stats import GpuStats, gpu_meter
from localv4.engine.session import Network
from localv4.model.fast import FastTransformer
from localv4.paging.counts import PagingCounts
from localv4.paging.paged_store import PagedStore
from localv4.paging.read_statistics import ReadStatistics

Bound = Literal["compute", "memory", "disk"]

WAITING_SHARE = 0.3
"""Share of the time that tokens stand still for reads from which on the disk is the bound."""

MEMORY_SHARE = 0.6
"""Share of the read roof from which on memory is the bound."""


@dataclass(frozen=True, slots=True)
class PagingStats:
    """Paging while tokens were decoded.

    `counts` and `reads` are of that time alone, `experts_per_token` those of one layer;
    `resident_bytes` of `capacity_bytes` are in use now.
    """

    counts: PagingCounts
    reads: ReadStatistics
    experts_per_token: int
    resident_bytes: int
    capacity_bytes: int

    @property
    def hit_rate(self) -> float:
        """Share of experts that were in memory when a token came to them."""
        uses = self.counts.tokens * self.experts_per_token * len(self.counts.misses)
        return 1.0 - float(self.counts.misses.sum()) / uses if uses else 1.0

    @property
    def layer_hit_rates(self) -> list[float]:
        """The same for each layer."""
        uses = max(1, self.counts.tokens * self.experts_per_token)
        return [1.0 - float(misses) / uses for misses in self.counts.misses]

    def per_token(self, total: float) -> float:
        """Return a sum by token."""
        return total / max(1, self.counts.tokens)

    def document(self) -> dict[str, Any]:
        """Return all figures, as a JSON object; times in seconds."""
        counts, reads = self.counts, self.reads
        return {
            "tokens": counts.tokens,
            "hit_rate": self.hit_rate,
            "hit_rate_by_layer": self.layer_hit_rates,
            "misses_per_token": self.per_token(float(counts.misses.sum())),
            "bytes_per_token": {k: self.per_token(v) for k, v in counts.bytes.items()},
            "guesses": counts.guesses,
            "guesses_used": counts.guesses_used,
            "wait_s_per_token": self.per_token(counts.wait_s),
            "evictions": counts.evictions,
            "reader_bytes_s": reads.bytes_s,
            "reader_depth": reads.mean_depth,
            "reader_core_s_per_gb": reads.core_s_per_gb,
            "read_p50_s": reads.p50_s,
            "read_p99_s": reads.p99_s,
            "resident_bytes": self.resident_bytes,
            "capacity_bytes": self.capacity_bytes,
        }


class PagingMeter:
    """Reads off what a network pages, from the moment it is made until it is stopped."""

    def __init__(self, network: Network) -> None:
        store = network.host_store if isinstance(network, FastTransformer) else None
        self._store = store if isinstance(store, PagedStore) and store.pages else None
        self._gpu = gpu_meter(network)
        self._k = network.config.experts_per_token
        self._final: PagingStats | None = None
        if self._store is not None:
            self._counts, self._reads = self._store.counts.copy(), self._store.readers.statistics

    def stats(self) -> PagingStats | None:
        """Return what has happened so far; None for a network that does not page."""
        store = self._store
        if self._final is not None:
            return self._final
        if store is None:
            return None
        return PagingStats(
            store.counts.since(self._counts),
            store.readers.statistics.since(self._reads),
            self._k,
            store.arena.used,
            store.arena.capacity,
        )

    def gpu_stats(self) -> GpuStats | None:
        """Return what a GPU has done so far; None where none helps."""
        return self._gpu.stats() if self._gpu is not None else None

    def stop(self) -> None:
        """Keep what has happened; what comes later does not count."""
        self._final = self.stats()
        if self._gpu is not None:
            self._gpu.stop()


def bound_of(seconds: float, wait_s: float, read_share: float | None) -> Bound:
    """Say what held tokens up: the disk, memory (`read_share` of its roof, if known), or work."""
    if seconds > 0 and wait_s / seconds >= WAITING_SHARE:
        return "disk"
    return "memory" if read_share is None or read_share >= MEMORY_SHARE else "compute"


def spread(rates: list[float]) -> tuple[int, int]:
    """Return the layers with the lowest and the highest of some rates."""
    return int(np.argmin(rates)), int(np.argmax(rates))
