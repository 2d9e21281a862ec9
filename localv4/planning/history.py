"""Predicted against achieved: kept after runs, shown, and used to correct the next forecast."""

import hashlib
import math
from collections.abc import Iterable, Sequence
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, StringConstraints, ValidationError

from localv4 import paths
from localv4.errors import LocalV4Error
from localv4.finished_file import finished_file
from localv4.planning.forecast import Forecast
from localv4.planning.gpu_forecast import GpuForecast
from localv4.planning.gpu_plan import GpuPlan
from localv4.planning.plan import Plan
from localv4.planning.profile import Identity, this_machine
from localv4.small_file import read_small_file

FILE_NAME = "forecasts.jsonl"
MAX_RUNS = 512
"""Older runs are dropped, half of them at a time."""
MAX_FILE_BYTES = 1 << 20
MAX_NAME_CHARS = 160

LAST_RUNS = 5
"""Runs that a correction looks at, the latest."""
SHARE_STEP = 0.1
"""Runs count for each other if memory held shares of the experts that differ by less."""
LEAST_CORRECTION, MOST_CORRECTION = 0.5, 2.0

LEAST_TOKENS = 16
"""Fewer generated tokens say nothing of speed."""

Rate = Annotated[float, Field(gt=0, lt=1e9)]


class Run(BaseModel):
    """One run: tokens per second that were predicted, without any correction, and achieved.

    `gpu` names the GPU that helped, which held `gpu_share` of all experts.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    at: datetime
    model: Annotated[str, StringConstraints(max_length=MAX_NAME_CHARS)]
    machine: str
    verdict: Literal["fits", "pages"]
    resident_share: Annotated[float, Field(ge=0, le=1)]
    predicted: Rate
    achieved: Rate
    gpu: Annotated[str, StringConstraints(max_length=MAX_NAME_CHARS)] | None = None
    gpu_share: Annotated[float, Field(ge=0, le=1)] = 0.0

    @property
    def error(self) -> float:
        """How far the prediction was off, as a part of what was achieved."""
        return self.predicted / self.achieved - 1


def record_run(
    model: str,
    plan: Plan,
    forecast: Forecast | GpuForecast,
    achieved: float,
    tokens: int,
    gpu: GpuPlan | None = None,
) -> Run | None:
    """Keep what a run achieved; `achieved` is in generated tokens per second.

    Returns None where there is nothing to learn from: too few tokens, or no folder to write to.
    """
    predicted = forecast.decode.likely / forecast.correction
    if tokens < LEAST_TOKENS or not 0 < achieved < math.inf:
        return None
    run = Run(
        at=datetime.now(UTC).replace(microsecond=0),
        model=model[:MAX_NAME_CHARS],
        machine=machine_key(this_machine()),
        verdict="fits" if plan.fits else "pages",
        resident_share=plan.resident_share,
        predicted=predicted,
        achieved=achieved,
        gpu=gpu.name[:MAX_NAME_CHARS] if gpu is not None else None,
        gpu_share=_gpu_share(gpu),
    )
    return run if _append(run) else None


def past_runs(model: str) -> list[Run]:
    """Return the runs of a model on this machine, the latest last."""
    key = machine_key(this_machine())
    return [run for run in read_runs(_path()) if run.model == model and run.machine == key]


def correction(runs: Sequence[Run], plan: Plan, gpu: GpuPlan | None = None) -> float:
    """Return by what to multiply the next prediction: the mean of what the last runs were off.

    Runs of the same verdict on the same devices, with about the same share of experts in each
    memory, count. One run is trusted half, several more.
    """
    verdict = "fits" if plan.fits else "pages"
    name, share = gpu.name[:MAX_NAME_CHARS] if gpu is not None else None, _gpu_share(gpu)
    alike = [
        run.achieved / run.predicted
        for run in runs
        if run.verdict == verdict
        and abs(run.resident_share - plan.resident_share) < SHARE_STEP
        and run.gpu == name
        and abs(run.gpu_share - share) < SHARE_STEP
    ][-LAST_RUNS:]
    if not alike:
        return 1.0
    mean = sum(map(math.log, alike)) / len(alike)
    trusted = mean * len(alike) / (len(alike) + 1)
    return min(MOST_CORRECTION, max(LEAST_CORRECTION, math.exp(trusted)))


def _gpu_share(gpu: GpuPlan | None) -> float:
    """Return the part of all experts that a GPU holds."""
    return gpu.resident_share * gpu.layers / gpu.all_layers if gpu is not None else 0.0


def machine_key(machine: Identity) -> str:
    """Return a short name of a machine that tells nothing of it."""
    return hashlib.sha256(machine.model_dump_json().encode()).hexdigest()[:12]


def read_runs(path: Path) -> list[Run]:
    """Return all runs in a file; lines that are none are left out."""
    try:
        lines = read_small_file(path, MAX_FILE_BYTES).splitlines()
    except LocalV4Error:
        return []
    runs = []
    for line in lines:
        with suppress(ValidationError, ValueError):
            runs.append(Run.model_validate_json(line))
    return runs


def _append(run: Run) -> bool:
    """Add a line; when there are too many, write the later half to a new file."""
    path = _path()
    try:
        paths.private_dir(path.parent)
        with path.open("a", encoding="utf-8") as file:
            file.write(f"{run.model_dump_json()}\n")
        runs = read_runs(path)
        if len(runs) > MAX_RUNS or not runs:
            _rewrite(path, runs[-MAX_RUNS // 2 :] or [run])
    except (OSError, LocalV4Error):
        return False
    return True


def _rewrite(path: Path, runs: Iterable[Run]) -> None:
    with finished_file(path) as file:
        file.writelines(f"{run.model_dump_json()}\n".encode() for run in runs)


def _path() -> Path:
    return paths.state_dir() / FILE_NAME
