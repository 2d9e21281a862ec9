"""`localv4 doctor`: what this machine can do, what keeps it from that, and which models suit it."""

import sys
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Annotated, Any

import typer

from localv4.cli import options, terminal, worker
from localv4.cli.fit import Assumed, assess_by_experience, assumptions
from localv4.errors import LocalV4Error

if TYPE_CHECKING:
    from collections.abc import Sequence

    from rich.console import Console

    from localv4.library.installed import InstalledModel
    from localv4.planning.assessment import Assessment
    from localv4.planning.history import Run
    from localv4.planning.machine import Machine
    from localv4.planning.problems import Problem

Quick = Annotated[
    bool,
    typer.Option(
        "--quick", metavar="", help="Measure only what has never been measured, and no kernels."
    ),
]


@dataclass(frozen=True, slots=True)
class Examined:
    """A model here: what was found, or why its files cannot be read; its earlier runs."""

    name: str
    assessment: "Assessment | None"
    problem: str | None
    runs: "Sequence[Run]"


@dataclass(frozen=True, slots=True)
class Examination:
    """Everything that was found."""

    machine: "Machine"
    problems: "Sequence[Problem]"
    models: "Sequence[Examined]"


def doctor(
    model: options.ModelArgument = None,
    quick: Quick = False,
    assume_ram: options.AssumeRam = None,
    assume_bandwidth: options.AssumeBandwidth = None,
    assume_disk: options.AssumeDisk = None,
    assume_cores: options.AssumeCores = None,
    assume_gpu: options.AssumeGpu = None,
    assume_gpu_bandwidth: options.AssumeGpuBandwidth = None,
    output_format: options.Format = options.OutputFormat.AUTO,
    as_json: options.Json = False,
    quiet: options.Quiet = False,
    no_color: options.NoColor = False,
) -> None:
    """Measure this machine, name what holds it back, and tell for each model whether it fits.

    Takes half a minute; what was measured is kept for `fit` and for loading models.
    """
    assumed = assumptions(
        *(assume_ram, assume_bandwidth, assume_disk, assume_cores),
        *(assume_gpu, assume_gpu_bandwidth),
    )
    found = worker.call(lambda: _examine(model, quick, assumed, quiet))
    if options.wants_json(output_format, as_json):
        terminal.print_json(_document(found))
        return
    _print(terminal.make_console(sys.stdout, no_color=no_color), found)


def _examine(reference: str | None, quick: bool, assumed: Assumed, quiet: bool) -> Examination:
    from localv4 import paths
    from localv4.library import installed
    from localv4.planning.problems import find_problems

    models = [installed.resolve(reference)] if reference else installed.list_installed()
    place = models[0].path if reference else paths.models_dir()
    own = _measure(place, quick or assumed.is_whole, assumed.gpu is None, quiet)
    problems = find_problems(own)
    machine = assumed.instead_of(own)
    return Examination(machine, problems, [_look_at(model, machine) for model in models])


def _measure(place: Any, quick: bool, gpu: bool, quiet: bool) -> "Machine":
    from localv4.cli.loading import note
    from localv4.cuda.options import GpuOptions
    from localv4.planning.measuring import Wanted, measured_machine
    from localv4.planning.recipes import load_recipes
    from localv4.planning.subject import flash_network

    def tell(what: str) -> None:
        if not quiet:
            note(f"measuring {what}")

    kernels = None if quick else (flash_network(), load_recipes().by_name["lossless"])
    asked = GpuOptions("auto" if gpu else "cpu")
    return measured_machine(Wanted(place, kernels=kernels, anew=not quick, gpu=asked), tell)


def _look_at(model: "InstalledModel", machine: "Machine") -> Examined:
    """Plan and predict a model; damaged files are a finding, not an error."""
    from localv4.engine.earlier_routing import earlier_routing
    from localv4.planning.history import past_runs
    from localv4.planning.measuring import known_machine
    from localv4.planning.subject import facts_of_installed

    name = terminal.sanitize_line(model.name)
    try:
        facts = facts_of_installed(model)
    except LocalV4Error as error:
        return Examined(name, None, error.message, ())
    runs = [] if machine.assumed else past_runs(model.name)
    own_disk = known_machine(model.path).disk
    if own_disk is not None and "disk" not in machine.assumed:
        machine = replace(machine, disk=own_disk)
    routing = earlier_routing(model.path, facts.config)
    one = assess_by_experience(facts, machine, None, routing, runs)
    return Examined(name, one, None, runs)


def _print(console: "Console", found: Examination) -> None:
    from rich.text import Text

    from localv4.cli import plan_report as report
    from localv4.cli.tables import print_section, print_table

    print_section(console, "Machine", report.machine_rows(found.machine))
    if found.problems:
        rows = [(problem.what, problem.remedy) for problem in found.problems]
        print_section(console, "Found", rows)
    header = ("MODEL", "", "MEMORY", "TOK/S", "PROMPT TOK/S", "LIMIT", "LAST RUN")
    rows_of_models = [_row(model) for model in found.models]
    console.print(Text("Models", style="bold"))
    print_table(console, rows_of_models, header=header, numbers=frozenset({2, 3, 4}))


def _row(model: Examined) -> tuple[str, ...]:
    from localv4.cli import plan_report as report
    from localv4.cli.generation import format_bytes

    one = model.assessment
    if one is None:
        return model.name, f"cannot be read: {model.problem}", "", "", "", "", ""
    plan, forecast = one.plan, one.used_forecast
    verdict: str = one.verdict
    if plan is not None and not plan.fits:
        verdict = f"pages {format_bytes(plan.paged_bytes)}"
    return (
        model.name,
        verdict if one.refusal is None else f"{verdict}: {one.refusal.hint}",
        format_bytes(plan.total) if plan else "",
        report.range_text(forecast.decode) if forecast else "",
        report.range_text(forecast.prefill) if forecast else "",
        report.bottleneck_of(forecast) if forecast else "",
        report.run_rows(model.runs[-1:])[0][1] if model.runs else "",
    )


def _document(found: Examination) -> dict[str, Any]:
    from localv4 import __version__
    from localv4.cli import plan_report as report

    return {
        "schema": 1,
        "localv4": __version__,
        "machine": report.machine_document(found.machine),
        "problems": [{"what": one.what, "remedy": one.remedy} for one in found.problems],
        "models": [
            {
                "name": model.name,
                "problem": "cannot be read" if model.problem else None,
                "assessment": report.assessment_document(model.assessment)
                if model.assessment
                else None,
                "runs": [run.model_dump(mode="json") for run in model.runs],
            }
            for model in found.models
        ],
    }
