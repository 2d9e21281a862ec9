"""`localv4 fit`: will a model run here, how fast, and what would change that; before a download."""

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from localv4.cli import engine_options, options, terminal, worker
from localv4.cli.sizes import parse_bytes, parse_rate
from localv4.errors import UsageError

if TYPE_CHECKING:
    from rich.console import Console

    from localv4.cuda.options import GpuOptions
    from localv4.planning.assessment import Assessment, Request
    from localv4.planning.history import Run
    from localv4.planning.hit_rate import Routing
    from localv4.planning.machine import Machine
    from localv4.planning.model_facts import ModelFacts
    from localv4.planning.subject import Subject

TYPICAL_RATE = "100Mbit/s"

FitModel = Annotated[
    str | None,
    typer.Argument(
        metavar="MODEL",
        help="A known or installed model, name:quant, a path, or hf://org/repo (asks the hub).",
    ),
]
PlannedContext = Annotated[
    int | None,
    typer.Option(
        "-c",
        "--ctx-size",
        metavar="TOKENS",
        envvar="LOCALV4_CTX_SIZE",
        show_envvar=False,
        help="Context to plan memory for. Default: 32768.",
    ),
]
AllQuants = Annotated[
    bool, typer.Option("--all-quants", metavar="", help="Compare all forms of the model.")
]
Routes = Annotated[
    Path | None,
    typer.Option(
        "--routes",
        metavar="TRACE",
        help="What --trace-routes has recorded of this network, instead of typical text.",
    ),
]
DownloadRate = Annotated[
    str, typer.Option("--rate", metavar="RATE", help="Of the download: 100Mbit/s, 20MB/s.")
]


@dataclass(frozen=True, slots=True)
class Assumed:
    """A machine that somebody describes; None is measured here."""

    ram: int | None
    bandwidth: float | None
    disk: float | None
    cores: int | None
    gpu: int | None = None
    gpu_bandwidth: float | None = None

    @property
    def is_whole(self) -> bool:
        """Whether nothing of this machine matters."""
        return None not in (self.ram, self.bandwidth, self.disk)

    def instead_of(self, machine: "Machine") -> "Machine":
        """Return a machine with what is assumed in the place of what was measured."""
        return machine.with_assumptions(
            ram=self.ram,
            bandwidth=self.bandwidth,
            disk=self.disk,
            cores=self.cores,
            gpu=self.gpu,
            gpu_bandwidth=self.gpu_bandwidth,
        )


@dataclass(frozen=True, slots=True)
class Answer:
    """The form that was asked for or is recommended, and all of them."""

    subject: "Subject"
    machine: "Machine"
    request: "Request"
    chosen: "Assessment"
    found: "Sequence[Assessment]"
    rate: float
    routing: "Routing | None"

    @property
    def disk_free(self) -> int | None:
        """Bytes that the disk of this machine has left; None if that says nothing of this model."""
        return None if "disk" in self.machine.assumed else self.machine.disk_free

    @property
    def lacks_disk(self) -> bool:
        """Whether a model that is not here has no room on the disk."""
        free, is_here = self.disk_free, self.subject.source == "installed"
        return free is not None and not is_here and self.chosen.facts.file_bytes > free


def fit(
    model_argument: FitModel = None,
    model: options.Model = None,
    ram: engine_options.Ram = None,
    reserve: engine_options.Reserve = None,
    ctx_size: PlannedContext = None,
    io: engine_options.Io = engine_options.IoWay.AUTO,
    kv: engine_options.KvRows = None,
    device: engine_options.Device = "auto",
    gpu_mem: engine_options.GpuMem = None,
    assume_ram: options.AssumeRam = None,
    assume_bandwidth: options.AssumeBandwidth = None,
    assume_disk: options.AssumeDisk = None,
    assume_cores: options.AssumeCores = None,
    assume_gpu: options.AssumeGpu = None,
    assume_gpu_bandwidth: options.AssumeGpuBandwidth = None,
    all_quants: AllQuants = False,
    routes: Routes = None,
    rate: DownloadRate = TYPICAL_RATE,
    output_format: options.Format = options.OutputFormat.AUTO,
    as_json: options.Json = False,
    quiet: options.Quiet = False,
    no_color: options.NoColor = False,
) -> None:
    """Tell whether a model fits, pages or does not fit, and how fast it will be.

    Nothing is downloaded. Exit code 4 if it does not fit.
    """
    from localv4.engine.memory import MemoryOptions, check_ctx_size, row_format
    from localv4.planning.assessment import Request
    from localv4.planning.plan import DEFAULT_CTX

    reference = options.one_of(model_argument, model, "--model")
    gpu = engine_options.gpu_options(device, gpu_mem)
    request = Request(
        ram=parse_bytes(ram, "--ram") if ram else None,
        reserve=parse_bytes(reserve, "--reserve") if reserve else None,
        ctx=DEFAULT_CTX if ctx_size is None else ctx_size,
        io=io.value,
        gpu_memory=gpu.memory,
    )
    assumed = assumptions(
        *(assume_ram, assume_bandwidth, assume_disk, assume_cores),
        *(assume_gpu, assume_gpu_bandwidth),
    )
    rows = row_format(MemoryOptions(kv=kv.value if kv is not None else None))
    bytes_s = parse_rate(rate, "--rate")

    def answered() -> Answer:
        subject = _subject(reference, all_quants, quiet).with_rows(rows)
        if ctx_size is not None and subject.forms:
            check_ctx_size(ctx_size, subject.forms[0].config)
        return _answer(subject, request, assumed, gpu, bytes_s, routes, quiet)

    answer = worker.call(answered)
    if options.wants_json(output_format, as_json):
        terminal.print_json(_document(answer))
    else:
        console = terminal.make_console(sys.stdout, no_color=no_color)
        if all_quants:
            _print_forms(console, answer)
        else:
            _print_answer(console, answer)
    if answer.chosen.refusal is not None:
        sys.stdout.flush()
        raise answer.chosen.refusal


def assumptions(
    ram: str | None,
    bandwidth: str | None,
    disk: str | None,
    cores: int | None,
    gpu: str | None,
    gpu_bandwidth: str | None,
) -> Assumed:
    """Read the options that describe another machine. Raises UsageError."""
    if gpu_bandwidth is not None and gpu is None:
        raise UsageError("--assume-gpu-bandwidth needs --assume-gpu, the memory of the GPU")
    return Assumed(
        parse_bytes(ram, "--assume-ram") if ram else None,
        parse_rate(bandwidth, "--assume-bandwidth") if bandwidth else None,
        parse_rate(disk, "--assume-disk") if disk else None,
        cores,
        parse_bytes(gpu, "--assume-gpu") if gpu else None,
        parse_rate(gpu_bandwidth, "--assume-gpu-bandwidth") if gpu_bandwidth else None,
    )


def describe_machine(
    assumed: Assumed, place: Any, record_bytes: int, gpu: "GpuOptions", quiet: bool
) -> "Machine":
    """Return this machine, measured where it has to be, with what is assumed in its place."""
    from localv4.cli.loading import note
    from localv4.cuda.options import GpuOptions
    from localv4.planning.measuring import Wanted, known_machine, measured_machine

    def tell(what: str) -> None:
        if not quiet:
            note(f"measuring {what}")

    if assumed.is_whole:
        machine = known_machine(None)
    else:
        needs_disk = assumed.disk is None
        own_gpu = gpu if assumed.gpu is None else GpuOptions("cpu")
        wanted = Wanted(place if needs_disk else None, record_bytes, gpu=own_gpu)
        machine = measured_machine(wanted, tell)
    return assumed.instead_of(machine)


def _answer(
    subject: "Subject",
    request: "Request",
    assumed: Assumed,
    gpu: "GpuOptions",
    rate: float,
    routes: Path | None,
    quiet: bool,
) -> Answer:
    from localv4 import paths
    from localv4.planning.assessment import choose
    from localv4.planning.history import past_runs
    from localv4.planning.recipes import load_recipes

    if not subject.forms:
        raise UsageError(f"no form of {subject.name} has a known size")
    place = subject.path or paths.models_dir()
    record = max(facts.largest_expert_bytes for facts in subject.forms)
    machine = describe_machine(assumed, place, record, gpu, quiet)
    runs = [] if machine.assumed else past_runs(subject.name)
    routing = _routing(subject, routes)
    found = [
        assess_by_experience(facts, machine, request, routing, runs) for facts in subject.forms
    ]
    is_free = subject.chosen is None
    chosen = choose(found, load_recipes().default.name) if is_free else found[subject.chosen or 0]
    return Answer(subject, machine, request, chosen, found, rate, routing)


def assess_by_experience(
    facts: "ModelFacts",
    machine: "Machine",
    request: "Request | None",
    routing: "Routing | None",
    runs: "Sequence[Run]",
) -> "Assessment":
    """Plan and predict a model; what earlier runs of it achieved corrects the forecast."""
    from localv4.planning.assessment import assess
    from localv4.planning.history import correction

    one = assess(facts, machine, request, routing=routing)
    if not runs or one.plan is None:
        return one
    known = correction(runs, one.plan, one.gpu)
    return assess(facts, machine, request, routing=routing, correction=known)


def _routing(subject: "Subject", routes: Path | None) -> "Routing | None":
    """Return what is known of the experts that the model chooses, None if nothing is."""
    from localv4.engine.earlier_routing import earlier_routing, traced_routing

    config = subject.forms[0].config
    if routes is not None:
        return traced_routing(routes, config)
    return None if subject.path is None else earlier_routing(subject.path, config)


def _subject(reference: str | None, all_quants: bool, quiet: bool) -> "Subject":
    """Find the model; of an official one that is here, `all_quants` adds what it can become."""
    from localv4.planning import subject as subjects

    if reference is None or not subjects.is_hub_reference(reference) or subjects.is_here(reference):
        found = subjects.find_subject(reference)
        return subjects.with_recipes(found) if all_quants else found

    from localv4.cli.loading import note
    from localv4.library.published import find_published
    from localv4.library.remote_headers import check_online, remote_headers

    check_online()
    if not quiet:
        note("reading the headers of the model's files on the hub")
    with remote_headers(find_published(reference)) as model:
        facts = subjects.facts_of_opened(reference, model.path, model.weight_bytes)
    return subjects.Subject(reference, "hub", (facts,), 0)


def _print_answer(console: "Console", answer: Answer) -> None:
    """Print everything about the chosen form."""
    from rich.text import Text

    from localv4.cli import plan_report as report
    from localv4.cli.gpu_report import gpu_memory_rows
    from localv4.cli.tables import print_section, print_table
    from localv4.planning.assessment import what_would_change
    from localv4.planning.history import past_runs

    one, machine = answer.chosen, answer.machine
    name = terminal.sanitize_line(one.facts.name)
    colour = report.COLOURS[one.verdict]
    console.print(Text.assemble((name, "bold"), "  ", (report.headline(one), colour)))
    if answer.lacks_disk:
        console.print(Text("the disk has no room for it: see Disk below", style="red"))
    if not one.facts.is_exact:
        console.print(Text("estimated from the size of its files", style="dim"))
    console.print()
    print_section(console, "Machine", report.machine_rows(machine))
    if one.plan is not None:
        print_section(console, "Speed", report.speed_rows(one))
        console.print(Text("Memory", style="bold"))
        rows = [(f"  {name}", size, remark) for name, size, remark in report.memory_rows(one.plan)]
        print_table(console, rows, numbers=frozenset({1}))
        console.print()
    if one.gpu is not None:
        print_section(console, "GPU memory", gpu_memory_rows(one.gpu))
    print_section(console, "Disk", report.disk_rows(one, answer.rate, answer.disk_free))
    forms = [other.facts for other in answer.found]
    changes = what_would_change(one, machine, answer.request, forms, answer.routing)
    if changes:
        print_section(console, "Faster with", report.change_rows(changes, one))
    runs = [] if machine.assumed else past_runs(answer.subject.name)
    if runs:
        print_section(console, "Last runs", report.run_rows(runs))


def _print_forms(console: "Console", answer: Answer) -> None:
    """Print a row for every form."""
    from localv4.cli import plan_report as report
    from localv4.cli.generation import format_bytes
    from localv4.cli.tables import print_section, print_table

    print_section(console, "Machine", report.machine_rows(answer.machine))
    rows = []
    for one in answer.found:
        plan, forecast = one.plan, one.used_forecast
        rows.append(
            (
                one.facts.quant or "as it is",
                one.verdict,
                format_bytes(one.facts.file_bytes),
                format_bytes(plan.total) if plan else "",
                f"{100 * plan.resident_share:.0f} %" if plan else "",
                report.range_text(forecast.decode) if forecast else "",
                report.range_text(forecast.prefill) if forecast else "",
                forecast.bottleneck if forecast else "",
                "<- chosen" if one is answer.chosen else "",
            )
        )
    header = ("QUANT", "", "ON DISK", "MEMORY", "EXPERTS", "TOK/S", "PROMPT TOK/S", "LIMIT", "")
    print_table(console, rows, header=header, numbers=frozenset({2, 3, 4, 5, 6}))


def _document(answer: Answer) -> dict[str, Any]:
    from localv4.cli import plan_report as report
    from localv4.planning.assessment import what_would_change

    forms = [other.facts for other in answer.found]
    changes = what_would_change(
        answer.chosen, answer.machine, answer.request, forms, answer.routing
    )
    return {
        "schema": 1,
        "model": answer.subject.name,
        "source": answer.subject.source,
        "machine": report.machine_document(answer.machine),
        "chosen": report.assessment_document(answer.chosen),
        "forms": [report.assessment_document(one) for one in answer.found],
        "lacks_disk": answer.lacks_disk,
        "download_s": (answer.chosen.facts.download_bytes or 0) / answer.rate,
        "changes": [
            {"what": change.what, "decode_tok_s": change.tok_s, "fits": change.fits}
            for change in changes
        ],
    }
