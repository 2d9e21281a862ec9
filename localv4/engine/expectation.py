"""Predicted against achieved speed of an answer."""

from dataclasses import dataclass, replace
from pathlib import Path

from localv4.engine.earlier_routing import earlier_routing
from localv4.engine.reply import ReplyStats
from localv4.planning.forecast import Forecast, make_forecast
from localv4.planning.gpu_forecast import GpuForecast, make_gpu_forecast
from localv4.planning.gpu_plan import GpuPlan
from localv4.planning.history import correction, past_runs, record_run
from localv4.planning.measuring import known_gpu, known_machine
from localv4.planning.model_facts import ModelFacts
from localv4.planning.plan import Plan

LEAST_TOKENS = 16
"""Fewer generated tokens are not worth a comparison."""


@dataclass(frozen=True, slots=True)
class Comparison:
    """Tokens per second: predicted (low, likely, high), achieved, and how far the one was off."""

    low: float
    predicted: float
    high: float
    achieved: float

    @property
    def error(self) -> float:
        """The prediction as a share of what was achieved, less one."""
        return self.predicted / self.achieved - 1


def expect(
    name: str,
    facts: ModelFacts,
    plan: Plan,
    place: Path,
    position: int,
    gpu: GpuPlan | None = None,
) -> Forecast | GpuForecast | None:
    """Return the forecast for a loaded model; None on a machine that was never measured."""
    machine = known_machine(place)
    has_all = plan.fits and (gpu is None or gpu.fits)
    routing = None if has_all else earlier_routing(place, facts.config)
    factor = correction(past_runs(name), plan, gpu)
    try:
        if gpu is None:
            return make_forecast(
                facts, plan, machine, routing=routing, position=position, correction=factor
            )
        return make_gpu_forecast(
            *(facts, plan, gpu, replace(machine, gpu=known_gpu(gpu.name))),
            routing=routing,
            position=position,
            correction=factor,
        )
    except ValueError:
        return None


def compare(
    name: str,
    plan: Plan,
    forecast: Forecast | GpuForecast,
    stats: ReplyStats,
    gpu: GpuPlan | None = None,
) -> Comparison | None:
    """Compare with an answer, and keep that for later forecasts; None if it is too short."""
    if stats.generated_tokens < LEAST_TOKENS:
        return None
    achieved = stats.decode_tok_s
    record_run(name, plan, forecast, achieved, stats.generated_tokens, gpu)
    rates = forecast.decode
    return Comparison(rates.low, rates.likely, rates.high, achieved)
