"""One model on one machine: does it fit, how fast will it be, and what would change that."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

from localv4.errors import DoesNotFitError
from localv4.planning.forecast import Forecast, make_forecast
from localv4.planning.gpu_forecast import GpuForecast, make_gpu_forecast
from localv4.planning.gpu_plan import GpuPlan, plan_gpu
from localv4.planning.hit_rate import Routing
from localv4.planning.machine import GpuFacts, Machine
from localv4.planning.memory import Memory
from localv4.planning.model_facts import ModelFacts
from localv4.planning.plan import DEFAULT_CTX, GIB, Io, Plan, make_plan

Verdict = Literal["fits", "pages", "does not fit"]

USABLE_TOK_S = 3.0
"""Slower than people read."""

WORTH_TELLING = 1.05
"""Changes that make decoding faster by less are not told."""

MODULES_GIB = (16, 32, 64)
"""Memory that can be added."""

CARDS = ((16, 450e9), (24, 900e9))
"""GPUs that can be added: GiB, and bytes per second of their memory."""


@dataclass(frozen=True, slots=True)
class Request:
    """What the user asks for; bytes and tokens, None where he leaves it to us."""

    ram: int | None = None
    reserve: int | None = None
    ctx: int = DEFAULT_CTX
    io: Io = "auto"
    position: int = 512
    gpu_memory: int | None = None


@dataclass(frozen=True, slots=True)
class Assessment:
    """A model in one form: its plan and forecast, or why it does not fit.

    `gpu` and `gpu_forecast` are those with the GPU of the machine, if it has one that can help.
    """

    facts: ModelFacts
    plan: Plan | None = None
    forecast: Forecast | None = None
    refusal: DoesNotFitError | None = None
    gpu: GpuPlan | None = None
    gpu_forecast: GpuForecast | None = None

    @property
    def verdict(self) -> Verdict:
        """Whether everything stays in memory, experts are paged, or neither is possible."""
        if self.plan is None:
            return "does not fit"
        return "fits" if self.plan.fits else "pages"

    @property
    def tok_s(self) -> float:
        """The likely speed of decoding; 0 if the model cannot run."""
        used = self.used_forecast
        return used.decode.likely if used is not None else 0.0

    @property
    def used_forecast(self) -> Forecast | GpuForecast | None:
        """The forecast of the device that will compute: the GPU, where it can help."""
        return self.gpu_forecast or self.forecast


@dataclass(frozen=True, slots=True)
class Change:
    """Something that would make decoding faster, and the speed it would have then."""

    what: str
    tok_s: float
    fits: bool


def assess(
    facts: ModelFacts,
    machine: Machine,
    request: Request | None = None,
    *,
    routing: Routing | None = None,
    correction: float = 1.0,
) -> Assessment:
    """Plan and predict a model; what does not fit is a result, not an error."""
    asked = request or Request()
    try:
        plan = make_plan(
            facts,
            machine.memory,
            ram=asked.ram,
            reserve=asked.reserve,
            ctx=asked.ctx,
            io=asked.io,
            threads=machine.cores,
        )
    except DoesNotFitError as error:
        return Assessment(facts, refusal=error)
    if machine.read_bytes_s is None or (machine.disk is None and not plan.fits):
        return Assessment(facts, plan)
    forecast = make_forecast(
        facts, plan, machine, routing=routing, position=asked.position, correction=correction
    )
    gpu = _gpu_plan(facts, plan, machine, asked)
    if gpu is None:
        return Assessment(facts, plan, forecast)
    with_gpu = make_gpu_forecast(
        *(facts, plan, gpu, machine),
        routing=routing,
        position=asked.position,
        correction=correction,
    )
    return Assessment(facts, plan, forecast, gpu=gpu, gpu_forecast=with_gpu)


def _gpu_plan(facts: ModelFacts, plan: Plan, machine: Machine, asked: Request) -> GpuPlan | None:
    """Return the plan for the GPU of a machine; None without one, or where it has too little."""
    card = machine.gpu
    if card is None:
        return None
    try:
        return plan_gpu(facts, card.name, card.free, memory=asked.gpu_memory, ctx=plan.ctx_size)
    except DoesNotFitError:
        return None


def choose(found: Sequence[Assessment], default: str) -> Assessment:
    """Return the form to recommend, of several in order of precision.

    The default if it decodes at USABLE_TOK_S or more; else the most precise one that does, of those
    with fewer bits; else the fastest. Where nothing fits it is the smallest one.
    """
    names = [one.facts.quant for one in found]
    first = names.index(default) if default in names else 0
    for one in found[first:]:
        if one.tok_s >= USABLE_TOK_S:
            return one
    if all(one.plan is None for one in found):
        return min(found, key=lambda one: one.facts.file_bytes)
    return max(found, key=lambda one: one.tok_s)


def what_would_change(
    chosen: Assessment,
    machine: Machine,
    request: Request,
    forms: Sequence[ModelFacts] = (),
    routing: Routing | None = None,
) -> list[Change]:
    """Return what would make a model faster, each computed like the forecast itself.

    `forms` are other forms of the model, of which those with fewer bits count.
    """
    options: list[tuple[str, ModelFacts, Machine, Request]] = []
    freed = replace(request, ram=None)
    for size in MODULES_GIB:
        memory = machine.memory
        more = Memory(memory.total + size * GIB, memory.available + size * GIB)
        options.append(
            (f"{size} GiB more memory", chosen.facts, replace(machine, memory=more), freed)
        )
    if machine.disk is not None and chosen.verdict != "fits":
        faster = replace(machine.disk, bytes_s=2 * machine.disk.bytes_s)
        gb_s = faster.bytes_s / 1e9
        twice = replace(machine, disk=faster)
        options.append((f"an SSD of {gb_s:.3g} GB/s", chosen.facts, twice, request))
    options += _cards(chosen, machine, request)
    for facts in forms:
        if facts.weight_bytes_per_token < chosen.facts.weight_bytes_per_token:
            options.append((f"{facts.quant}: fewer bits", facts, machine, request))
    changes = []
    for what, facts, other, asked in options:
        found = assess(facts, other, asked, routing=routing)
        if found.tok_s > WORTH_TELLING * chosen.tok_s:
            changes.append(Change(what, found.tok_s, found.verdict == "fits"))
    return changes


def _cards(
    chosen: Assessment, machine: Machine, request: Request
) -> list[tuple[str, ModelFacts, Machine, Request]]:
    """Return the GPUs with more memory than the machine's has, each as a change."""
    own = machine.gpu.total if machine.gpu is not None else 0
    freed = replace(request, gpu_memory=None)
    return [
        (
            f"a GPU of {size} GiB, {rate / 1e9:.0f} GB/s",
            chosen.facts,
            replace(machine, gpu=GpuFacts.assumed(size * GIB, rate)),
            freed,
        )
        for size, rate in CARDS
        if size * GIB > 1.25 * own
    ]
