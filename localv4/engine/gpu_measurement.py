"""What a benchmark finds of a GPU: what it copies, and the bound that the tiers of memory set."""

from dataclasses import dataclass

from localv4.engine.engine import Engine
from localv4.engine.gpu_stats import GpuMeter, GpuStats, gpu_meter
from localv4.planning.gpu_forecast import TierBytes, TierShares, bytes_by_tier
from localv4.planning.gpu_plan import GpuPlan
from localv4.planning.model_facts import ModelFacts


@dataclass(frozen=True, slots=True)
class GpuResult:
    """A test with a GPU: what this copies per second, and what it did in all samples.

    `token_bytes` are those that a generated token read, None for a prompt.
    """

    copy_bytes_s: float
    stats: GpuStats
    token_bytes: TierBytes | None

    def bound(self, read_roof: float) -> float | None:
        """Return the tokens per second that both memories would allow at the same time."""
        if self.token_bytes is None:
            return None
        return self.token_bytes.bound(self.copy_bytes_s, read_roof)


class GpuWatch:
    """Counts what the GPU of an engine does from now on."""

    def __init__(self, meter: GpuMeter, facts: ModelFacts, plan: GpuPlan, position: int) -> None:
        from localv4.cuda.probe import copy_bytes_s

        self._meter, self._facts, self._plan, self._position = meter, facts, plan, position
        self._copy_bytes_s = copy_bytes_s(meter.gpu)

    def result(self, generates: bool) -> GpuResult:
        """Return what has happened; `generates` tells tokens that were generated from a prompt."""
        stats = self._meter.stats()
        nbytes = None
        if generates:
            tiers = TierShares(**stats.tiers.shares())
            nbytes = bytes_by_tier(self._facts, self._plan, self._position, tiers)
        return GpuResult(self._copy_bytes_s, stats, nbytes)


def watch_gpu(engine: Engine, position: int) -> GpuWatch | None:
    """Watch the GPU of an engine, at a position of the context; None where none helps."""
    meter = gpu_meter(engine.network)
    if meter is None or engine.facts is None or engine.gpu_plan is None:
        return None
    return GpuWatch(meter, engine.facts, engine.gpu_plan, position)
