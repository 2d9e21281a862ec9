"""What a run is expected to achieve, from what is known already: for `--stats` and the next run."""

from pathlib import Path

from localv4.planning.forecast import Forecast, make_forecast
from localv4.planning.history import correction, past_runs
from localv4.planning.hit_rate import Routing
from localv4.planning.measuring import known_machine
from localv4.planning.model_facts import ModelFacts
from localv4.planning.plan import Plan


def expect(
    model: str,
    facts: ModelFacts,
    plan: Plan,
    place: Path,
    *,
    routing: Routing | None = None,
    position: int = 512,
) -> Forecast | None:
    """Return the forecast of a model that is loaded from `place` as planned.

    None where this machine has not been measured: `localv4 doctor` does that. Takes a few
    milliseconds. Earlier runs of `model`, its name, correct it; `history.record_run` keeps the
    next one.
    """
    machine = known_machine(place)
    if machine.read_bytes_s is None or (machine.disk is None and not plan.fits):
        return None
    factor = correction(past_runs(model), plan)
    return make_forecast(
        facts, plan, machine, routing=routing, position=position, correction=factor
    )
