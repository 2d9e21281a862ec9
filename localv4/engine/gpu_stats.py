"""What a GPU did for an answer: experts by tier, what was brought to it, what bounded its speed."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, cast

from localv4.cuda.tier_counts import TierCounts
from localv4.cuda.vram_store import VramStore
from localv4.engine.session import Network
from localv4.model.fast import FastTransformer
from localv4.paging.counts import PagingCounts
from localv4.paging.paged_store import PagedStore

if TYPE_CHECKING:
    from localv4.cuda.driver import CudaGpu
    from localv4.cuda.transformer import GpuTransformer

Bound = Literal["GPU", "host", "PCIe", "disk"]

WAITING_SHARE = 0.3
"""Share of the time of tokens that goes to reads, or to copies, from which on these bound them."""


@dataclass(frozen=True, slots=True)
class Tiers:
    """Experts that decoded tokens used, by what had them when a token came to them."""

    gpu: int
    memory: int
    disk: int

    @property
    def total(self) -> int:
        """All uses."""
        return self.gpu + self.memory + self.disk

    def shares(self) -> dict[str, float]:
        """Return the part of each tier; of nothing the GPU has all."""
        total = self.total
        if not total:
            return {"gpu": 1.0, "memory": 0.0, "disk": 0.0}
        return {
            "gpu": self.gpu / total,
            "memory": self.memory / total,
            "disk": self.disk / total,
        }


@dataclass(frozen=True, slots=True)
class GpuStats:
    """A GPU while tokens were decoded: `counts` are those of its experts in that time.

    `disk_wait_s` is what the host waited for its disk; `used_bytes` of `total_bytes` of the GPU's
    memory are taken by this process. Of `all_layers` the first `layers` are the GPU's.
    """

    name: str
    counts: TierCounts
    tiers: Tiers
    disk_wait_s: float
    used_bytes: int
    total_bytes: int
    layers: int
    all_layers: int
    warning: str | None = None

    @property
    def uploaded_bytes(self) -> int:
        """Bytes of experts that were copied to the GPU."""
        return sum(self.counts.bytes.values())

    @property
    def promotions(self) -> int:
        """Experts that came to stay, because tokens keep choosing them."""
        return self.counts.reads["warm"]

    def per_token(self, total: float) -> float:
        """Return a sum by token."""
        return total / max(1, self.counts.tokens)

    def bound(self, seconds: float) -> Bound:
        """Say what held tokens up that took so long: what most of the time was spent on."""
        if seconds > 0 and self.disk_wait_s / seconds >= WAITING_SHARE:
            return "disk"
        if seconds > 0 and self.counts.wait_s / seconds >= WAITING_SHARE:
            return "PCIe"
        return "host" if self.counts.host_s > seconds / 2 else "GPU"

    def document(self, seconds: float) -> dict[str, Any]:
        """Return all figures, as a JSON object; `seconds` is what the tokens took."""
        counts = self.counts
        return {
            "name": self.name,
            "tokens": counts.tokens,
            "layers": self.layers,
            "experts_by_tier": self.tiers.shares(),
            "promotions_per_token": self.per_token(self.promotions),
            "uploaded_bytes_per_token": self.per_token(self.uploaded_bytes),
            "upload_wait_s_per_token": self.per_token(counts.wait_s),
            "host_s_per_token": self.per_token(counts.host_s),
            "disk_wait_s_per_token": self.per_token(self.disk_wait_s),
            "used_bytes": self.used_bytes,
            "total_bytes": self.total_bytes,
            "bound": self.bound(seconds),
            "warning": self.warning,
        }


class GpuMeter:
    """Reads off what a network does on a GPU, from now on until it is stopped."""

    def __init__(self, network: "GpuTransformer") -> None:
        self._network, self._store = network, network.vram
        self._counts, self._host = network.vram.counts.copy(), self._host_counts()
        self._final: GpuStats | None = None

    @property
    def gpu(self) -> "CudaGpu":
        """The GPU."""
        return cast("CudaGpu", self._network.gpu)

    def stats(self) -> GpuStats:
        """Return what has happened so far."""
        if self._final is not None:
            return self._final
        network, store = self._network, self._store
        counts, host = store.counts.since(self._counts), self._host_counts()
        passed = None if host is None or self._host is None else host.since(self._host)
        uses = counts.tokens * network.config.experts_per_token
        gpu = uses * network.gpu_layers - int(counts.misses.sum())
        disk = 0 if passed is None else int(passed.misses.sum())
        return GpuStats(
            network.gpu.name,
            counts,
            Tiers(gpu, uses * network.config.n_layers - gpu - disk, disk),
            0.0 if passed is None else passed.wait_s,
            network.gpu_bytes,
            network.gpu.total_bytes,
            network.gpu_layers,
            network.config.n_layers,
            network.warning,
        )

    def stop(self) -> None:
        """Keep what has happened; what comes later does not count."""
        self._final = self.stats()

    def _host_counts(self) -> PagingCounts | None:
        host = self._store.host
        return host.counts.copy() if isinstance(host, PagedStore) else None


def gpu_meter(network: Network) -> GpuMeter | None:
    """Return the meter of a network; None for one without a GPU, for which nothing is loaded."""
    if not isinstance(network, FastTransformer) or not isinstance(network.store, VramStore):
        return None
    from localv4.cuda.transformer import GpuTransformer

    return GpuMeter(network) if isinstance(network, GpuTransformer) else None
