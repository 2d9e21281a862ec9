"""Predicted against achieved speed of an answer."""

from dataclasses import dataclass
from pathlib import Path

from localv4.engine.earlier_routing import earlier_routing
from localv4.engine.reply import ReplyStats
from localv4.planning.forecast import Forecast, make_forecast
from localv4.planning.history import correction, past_runs, record_run
from localv4.planning.measuring import known_machine
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


def expect(name: str, facts: ModelFacts, plan: Plan, place: Path, position: int) -> Forecast | None:
    """Return the forecast for a loaded model; None on a machine that was never measured."""
    machine = known_machine(place)
    routing = None if plan.fits else earlier_routing(place, facts.config)
    known = correction(past_runs(name), plan)
    try:
        return make_forecast(
            facts, plan, machine, routing=routing, position=position, correction=known
        )
    except ValueError:
        return None


def compare(name: str, plan: Plan, forecast: Forecast, stats: ReplyStats) -> Comparison | None:
    """Compare with an answer, and keep that for later forecasts; None if it is too short."""
    if stats.generated_tokens < LEAST_TOKENS:
        return None
    achieved = stats.decode_tok_s
    record_run(name, plan, forecast, achieved, stats.generated_tokens)
    rates = forecast.decode
    return Comparison(rates.low, rates.likely, rates.high, achieved)
